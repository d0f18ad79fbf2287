//! The log: one event a line, to standard error or a file, in Firecracker's form.
//!
//! `2026-01-02T03:04:05.678901Z [vm-1:vcpu0:ERROR:vmm/src/vcpu.rs:12] what happened`, where level and
//! origin are optional. A line is one `write`, so lines of several threads do not mix.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

use log::{LevelFilter, Log, Metadata, Record};

/// How the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// What is logged.
    pub level: LevelFilter,
    /// Whether each line shows its level.
    pub show_level: bool,
    /// Whether each line shows the place in the source.
    pub show_origin: bool,
}

struct Logger {
    id: String,
    options: Options,
    /// Standard error without one.
    file: Option<File>,
}

/// Starts the log of machine `id`. Once; a second call changes nothing.
pub fn start(id: String, options: Options, file: Option<File>) {
    log::set_max_level(options.level);
    // It fails only if there is a logger. One is for the life of the process, hence the leak.
    let _ = log::set_logger(Box::leak(Box::new(Logger { id, options, file })));
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= self.options.level
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = self.line(record, SystemTime::now());
        // There is nobody to tell that the log cannot be written.
        let _ = match &self.file {
            Some(file) => (&*file).write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

impl Logger {
    fn line(&self, record: &Record<'_>, now: SystemTime) -> String {
        let thread = std::thread::current();
        let thread = match thread.name() {
            None | Some("main") => "control",
            Some(name) => name,
        };
        let mut line = String::with_capacity(160);
        // Writing to a string does not fail.
        let _ = write!(line, "{} [{}:{thread}", timestamp(now), self.id);
        if self.options.show_level {
            let _ = write!(line, ":{}", record.level());
        }
        if self.options.show_origin
            && let (Some(file), Some(at)) = (record.file(), record.line())
        {
            let _ = write!(line, ":{file}:{at}");
        }
        let _ = writeln!(line, "] {}", record.args());
        line
    }
}

/// UTC, in RFC 3339.
fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:06}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_micros()
    )
}

/// The Gregorian date of a day since 1970-01-01. Years are counted from March, so that a leap day
/// is the last of its year; 400 of them have 146,097 days.
fn date(days: u64) -> (u64, u64, u64) {
    // From 0000-03-01 on.
    let days = days.saturating_add(719_468);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let year = era * 400 + year;
    if month < 10 {
        (year, month + 3, day_of_month)
    } else {
        (year + 1, month - 9, day_of_month)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, "2000-02-28T23:59:59.000000Z"),
            (951_868_799, "2000-02-29T23:59:59.000000Z"),
            (1_709_251_200, "2024-03-01T00:00:00.000000Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_line_has_its_parts() {
        let logger = Logger {
            id: "vm-1".into(),
            options: Options {
                level: LevelFilter::Info,
                show_level: true,
                show_origin: true,
            },
            file: None,
        };
        let line = logger.line(
            &Record::builder()
                .args(format_args!("hello"))
                .level(log::Level::Warn)
                .file(Some("a.rs"))
                .line(Some(7))
                .build(),
            UNIX_EPOCH,
        );
        let (start, end) = line.split_once(" [vm-1:").unwrap();
        assert_eq!(start, "1970-01-01T00:00:00.000000Z");
        assert!(end.ends_with(":WARN:a.rs:7] hello\n"), "{end}");
    }
}

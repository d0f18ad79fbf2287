//! One line, made without allocating.

use std::fmt::{self, Write as _};
use std::time::SystemTime;

use log::Record;

use super::time::Timestamp;
use super::{MAX_LINE, Options};

/// Stands at the end of a line that was cut.
const CUT: &str = "...\n";

/// A line in a buffer of its own.
pub struct Line {
    buffer: [u8; MAX_LINE],
    length: usize,
}

impl Line {
    /// The line for `record`, now, of the thread that calls.
    pub fn new(id: &str, options: &Options, record: &Record<'_>) -> Self {
        let mut line = Self {
            buffer: [0; MAX_LINE],
            length: 0,
        };
        line.fill(id, options, record, SystemTime::now());
        line
    }

    /// With its newline.
    pub fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or_default()
    }

    fn fill(&mut self, id: &str, options: &Options, record: &Record<'_>, now: SystemTime) {
        // It fails where the buffer ends.
        let written = self.write_parts(id, options, record, now);
        let end = if written.is_ok() && self.length < MAX_LINE {
            "\n"
        } else {
            CUT
        };
        self.length = self.length.min(MAX_LINE.saturating_sub(end.len()));
        let room = self.buffer.get_mut(self.length..).unwrap_or_default();
        for (to, from) in room.iter_mut().zip(end.bytes()) {
            *to = from;
        }
        self.length = self.length.saturating_add(end.len());
    }

    fn write_parts(
        &mut self,
        id: &str,
        options: &Options,
        record: &Record<'_>,
        now: SystemTime,
    ) -> fmt::Result {
        write!(self, "{} [{id}:", Timestamp(now))?;
        self.write_thread_name()?;
        if options.show_level {
            write!(self, ":{}", record.level())?;
        }
        if options.show_origin
            && let (Some(file), Some(at)) = (record.file(), record.line())
        {
            write!(self, ":{file}:{at}")?;
        }
        write!(self, "] {}", record.args())
    }

    fn write_thread_name(&mut self) -> fmt::Result {
        let name = crate::lockdown::thread_name();
        let end = name.iter().position(|byte| *byte == 0);
        let name = name.get(..end.unwrap_or(name.len())).unwrap_or_default();
        self.write_str(std::str::from_utf8(name).unwrap_or("?"))
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.buffer.get_mut(self.length..).unwrap_or_default();
        let count = text.len().min(room.len());
        let (Some(to), Some(from)) = (room.get_mut(..count), text.as_bytes().get(..count)) else {
            return Err(fmt::Error);
        };
        to.copy_from_slice(from);
        // One event is one line, whatever is in it.
        for byte in to.iter_mut().filter(|byte| byte.is_ascii_control()) {
            *byte = b' ';
        }
        self.length = self.length.saturating_add(count);
        if count < text.len() {
            return Err(fmt::Error);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logging::Filter;
    use std::time::UNIX_EPOCH;

    fn line(args: fmt::Arguments<'_>) -> String {
        let options = Options {
            level: Some(log::LevelFilter::Info),
            show_level: true,
            show_origin: true,
            filter: Filter::default(),
        };
        let mut line = Line {
            buffer: [0; MAX_LINE],
            length: 0,
        };
        let record = Record::builder()
            .args(args)
            .level(log::Level::Warn)
            .file(Some("a.rs"))
            .line(Some(7))
            .build();
        line.fill("vm-1", &options, &record, UNIX_EPOCH);
        String::from_utf8(line.bytes().to_vec()).unwrap()
    }

    #[test]
    fn a_line_has_its_parts() {
        crate::lockdown::name_thread("device");
        assert_eq!(
            line(format_args!("hello")),
            "1970-01-01T00:00:00.000000Z [vm-1:device:WARN:a.rs:7] hello\n"
        );
    }

    #[test]
    fn one_event_is_one_line() {
        let text = line(format_args!("two\nlines{} {}\x1b[2J", '\n', '\r'));
        assert_eq!(text.matches('\n').count(), 1, "{text:?}");
        assert!(text.ends_with("] two lines    [2J\n"), "{text:?}");
    }

    #[test]
    fn what_is_too_long_is_cut() {
        let long = "x".repeat(MAX_LINE);
        let text = line(format_args!("{long}"));
        assert_eq!(text.len(), MAX_LINE);
        assert!(text.ends_with("x...\n"));
        let empty = line(format_args!("")).len();
        let exact = "x".repeat(MAX_LINE - empty);
        assert!(line(format_args!("{exact}")).ends_with("x\n"));
    }
}

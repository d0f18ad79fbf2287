//! The log: one event a line, to standard error or a file, in Firecracker's form.
//!
//! `2026-01-02T03:04:05.678901Z [vm-1:vcpu0:ERROR:vmm/src/vcpu.rs:12] what happened`, where level and
//! origin are optional. A line is one `write` of at most [`MAX_LINE`] bytes, so lines of several
//! threads do not mix.
//!
//! Logging never waits. A line that its reader has no room for is dropped and counted, and the next one
//! that gets through says how many were; one place in the source that logs too often is held back
//! ([`limit`]). Between a record and the descriptor there is no lock that is waited for and no
//! allocation: a signal handler that interrupts a thread in here may log as well.

mod filter;
mod limit;
mod line;
mod time;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock};

use log::{LevelFilter, Log, Metadata, Record};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub use filter::{Filter, FilterError};
use limit::{Limiter, Verdict};
use line::Line;

use crate::config;
use crate::metrics::fields::LoggerMetrics;

/// Longest line in bytes, its newline included; what is longer is cut. A pipe takes so many in one
/// piece or not at all (PIPE_BUF), and has room for them whenever poll(2) says it is writable.
pub const MAX_LINE: usize = 4096;

/// How the log looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// What is logged. Unless it is said: what went right, too, to a file, and what went wrong alone to standard error.
    pub level: Option<LevelFilter>,
    /// Whether each line shows its level.
    pub show_level: bool,
    /// Whether each line shows the place in the source.
    pub show_origin: bool,
    /// Which modules are logged, and how much of them.
    pub filter: Filter,
}

/// What the log counts. It has no owner but the process, so neither have they.
static METRICS: LoggerMetrics = LoggerMetrics::new();
static LOGGER: OnceLock<Logger> = OnceLock::new();

/// What the log counts.
pub fn metrics() -> &'static LoggerMetrics {
    &METRICS
}

struct Logger {
    id: String,
    settings: RwLock<Settings>,
    limiter: Limiter,
    /// Lines that could not be written since the last one that was.
    dropped: AtomicU64,
    metrics: &'static LoggerMetrics,
}

struct Settings {
    options: Options,
    /// Standard error without one.
    file: Option<File>,
}

/// Starts the log of machine `id`. Once; a second call changes nothing.
pub fn start(id: String, options: Options, file: Option<File>) {
    let level = options.max_level(file.is_some());
    let logger = LOGGER.get_or_init(|| Logger::new(id, options, file, &METRICS));
    if log::set_logger(logger).is_ok() {
        log::set_max_level(level);
    }
}

/// Changes how the log looks; and where it goes, with a `file`. Nothing happens before [`start`].
fn reconfigure(change: impl FnOnce(&mut Options), file: Option<File>) {
    let Some(logger) = LOGGER.get() else {
        return;
    };
    // Whoever logs holds it for one write that does not wait.
    let mut settings = logger
        .settings
        .write()
        .unwrap_or_else(PoisonError::into_inner);
    change(&mut settings.options);
    if file.is_some() {
        settings.file = file;
    }
    log::set_max_level(settings.options.max_level(settings.file.is_some()));
}

/// Changes what `change` names, and where the log goes if there is a `file`.
///
/// # Errors
/// When its module is none; nothing is changed then.
pub fn apply(change: &config::Logger, file: Option<File>) -> Result<(), FilterError> {
    let filter = change.module.as_deref().map(str::parse).transpose()?;
    let update = |options: &mut Options| {
        if let Some(level) = change.level {
            options.level = Some(level.0);
        }
        options.show_level = change.show_level.unwrap_or(options.show_level);
        options.show_origin = change.show_log_origin.unwrap_or(options.show_origin);
        if let Some(filter) = filter {
            options.filter = filter;
        }
    };
    reconfigure(update, file);
    Ok(())
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let settings = self.settings.try_read();
        settings.is_ok_and(|settings| settings.allow(metadata))
    }

    fn log(&self, record: &Record<'_>) {
        // A reconfiguration is under way, perhaps in the very thread that a signal has interrupted.
        let Ok(settings) = self.settings.try_read() else {
            self.drop_line();
            return;
        };
        if !settings.allow(record.metadata()) {
            return;
        }
        match self.limiter.admit(record) {
            Verdict::Suppressed => self.metrics.rate_limited_log_count.inc(),
            Verdict::Admitted { suppressed } => {
                if suppressed > 0 {
                    let args = format_args!("{suppressed} lines suppressed: they came too often");
                    self.write(&settings, &notice(record, args));
                }
                self.write(&settings, record);
            }
        }
    }

    fn flush(&self) {}
}

/// A line about lines, from the same place as `record`.
fn notice<'a>(record: &Record<'a>, args: std::fmt::Arguments<'a>) -> Record<'a> {
    Record::builder()
        .args(args)
        .metadata(record.metadata().clone())
        .module_path(record.module_path())
        .file(record.file())
        .line(record.line())
        .build()
}

impl Options {
    /// What is logged, to a file or to standard error.
    fn level(&self, to_file: bool) -> LevelFilter {
        self.level.unwrap_or(match to_file {
            true => LevelFilter::Info,
            false => LevelFilter::Warn,
        })
    }

    fn max_level(&self, to_file: bool) -> LevelFilter {
        self.filter.max_level(self.level(to_file))
    }
}

impl Settings {
    fn allow(&self, metadata: &Metadata<'_>) -> bool {
        let options = &self.options;
        let level = options.level(self.file.is_some());
        metadata.level() <= options.filter.level_of(metadata.target(), level)
    }
}

impl Logger {
    fn new(
        id: String,
        options: Options,
        file: Option<File>,
        metrics: &'static LoggerMetrics,
    ) -> Self {
        Self {
            id,
            settings: RwLock::new(Settings { options, file }),
            limiter: Limiter::new(),
            dropped: AtomicU64::new(0),
            metrics,
        }
    }

    fn drop_line(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
        self.metrics.missed_log_count.inc();
    }

    fn write(&self, settings: &Settings, record: &Record<'_>) {
        let stderr = io::stderr();
        let sink = match &settings.file {
            Some(file) => file.as_fd(),
            None => stderr.as_fd(),
        };
        let dropped = self.dropped.load(Ordering::Relaxed);
        if dropped > 0 {
            let args = format_args!("{dropped} lines dropped: nobody took them in time");
            let line = Line::new(&self.id, &settings.options, &notice(record, args));
            if write_now(sink, line.bytes()).is_ok() {
                // Other threads may have dropped more meanwhile, or reported the same ones.
                let rest = |now: u64| Some(now.saturating_sub(dropped));
                let order = Ordering::Relaxed;
                let _ = self.dropped.fetch_update(order, order, rest);
            }
        }
        let line = Line::new(&self.id, &settings.options, record);
        if write_now(sink, line.bytes()).is_err() {
            self.drop_line();
        }
    }
}

/// Writes all of `bytes` if that is possible without waiting.
///
/// The descriptor may be shared with other processes, whose files must not become non-blocking for our
/// sake: so it is asked first whether it has room, and room is always for one line. Only a process
/// that fills the same pipe in between could make the write wait; descriptors that were opened for
/// the log alone are non-blocking besides.
fn write_now(sink: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    let mut ready = [PollFd::new(sink, PollFlags::POLLOUT)];
    match poll(&mut ready, PollTimeout::ZERO) {
        Ok(0) => return Err(Errno::EAGAIN),
        Ok(_) => {}
        Err(error) => return Err(error),
    }
    match nix::unistd::write(sink, bytes) {
        Ok(count) if count == bytes.len() => Ok(()),
        // A disk that is full, or a socket that took a part: the line is lost.
        Ok(_) => Err(Errno::EIO),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;

//! Tells people how far a machine is.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use super::frames::Frames;
use super::watch::Progress;
use crate::say;

/// How often, in a log and in a terminal.
const SELDOM: Duration = Duration::from_secs(1);
const OFTEN: Duration = Duration::from_millis(200);

/// MiB, rounded.
pub fn mib(bytes: u64) -> u64 {
    bytes.saturating_add(1 << 19) >> 20
}

/// Who tells.
pub struct Show {
    terminal: bool,
    last: Instant,
    /// The cursor is behind a line of ours.
    open: bool,
}

impl Show {
    /// Looks where standard error goes.
    pub fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            last: Instant::now(),
            open: false,
        }
    }

    /// From time to time, says how far it is.
    pub fn show(&mut self, progress: &Progress, frames: &Frames) {
        let pause = if self.terminal { OFTEN } else { SELDOM };
        if self.last.elapsed() < pause {
            return;
        }
        self.last = Instant::now();
        let line = format!(
            "{}, round {}: {} MiB sent, {} MiB left, {} MB/s",
            progress.phase,
            progress.round,
            mib(frames.bytes()),
            mib(progress.left_pages.saturating_mul(4096)),
            progress.bytes_per_second / 1_000_000,
        );
        match self.terminal {
            true => say::error_text(format_args!("\r\x1b[K{line}")),
            false => say::error_text(format_args!("{line}\n")),
        }
        self.open = self.terminal;
    }

    /// Before anything else is said.
    pub fn end(&mut self) {
        if std::mem::take(&mut self.open) {
            say::error_text("\r\x1b[K");
        }
    }
}

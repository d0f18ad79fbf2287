//! Processes named so that a recycled number is never taken for the old process.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process id with the moment at which that process started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    /// Its id.
    pub pid: u32,
    /// Clock ticks since boot at its start (proc(5), field 22 of `stat`); 0 when it was gone already.
    pub start_time: u64,
}

impl ProcessRef {
    /// A process that is known to run now.
    pub fn of(pid: u32) -> Self {
        Self {
            pid,
            start_time: start_time(pid).unwrap_or(0),
        }
    }

    /// This process.
    pub fn own() -> Self {
        Self::of(std::process::id())
    }

    /// True when that very process still exists.
    pub fn exists(self) -> bool {
        self.start_time != 0 && start_time(self.pid) == Some(self.start_time)
    }

    /// Sends it a signal, if it still exists.
    pub fn signal(self, signal: Signal) {
        if self.exists() {
            signal_pid(self.pid, signal);
        }
    }
}

/// Sends a signal; that the process is gone is no error.
pub fn signal_pid(pid: u32, signal: Signal) {
    // 0 and what does not fit would name groups of processes.
    if let Some(pid) = i32::try_from(pid).ok().filter(|pid| *pid > 1) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold spaces and parentheses itself: count after the last one.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// All processes.
pub fn all() -> Vec<u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Processes one of whose user ids this is; those that are dead and only not yet reaped do not count.
pub fn of_user(uid: u32) -> Vec<u32> {
    all()
        .into_iter()
        .filter(|pid| {
            // The owner of the directory would not do: root owns those of non-dumpable processes.
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
            let is_dead =
                field("State:").is_some_and(|state| state.trim_start().starts_with(['Z', 'X']));
            let is_of_user = field("Uid:")
                .is_some_and(|ids| ids.split_whitespace().any(|id| id.parse() == Ok(uid)));
            is_of_user && !is_dead
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_exists_and_another_start_is_another_process() {
        let own = ProcessRef::own();
        assert!(own.exists());
        let other = ProcessRef {
            start_time: own.start_time.wrapping_add(1),
            ..own
        };
        assert!(!other.exists());
        assert!(of_user(nix::unistd::geteuid().as_raw()).contains(&own.pid));
    }
}

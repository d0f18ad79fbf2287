//! Processes named so that a recycled number is never taken for the old process.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::PidfdFlags;
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
        if let Some(process) = open(self.pid).filter(|_| self.exists()) {
            send(&process, signal);
        }
    }
}

/// Sends a signal to a child of ours that was not waited for, whose number thus is nobody else's; that it has ended is no
/// error.
pub fn signal_pid(pid: u32, signal: Signal) {
    // 0 and what does not fit would name groups of processes.
    if let Some(pid) = i32::try_from(pid).ok().filter(|pid| *pid > 1) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// A descriptor for a process. What is true of its number after this is true of it, if it exists then.
fn open(pid: u32) -> Option<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).ok()?)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
}

fn send(process: &OwnedFd, signal: Signal) {
    // That it has ended is no error.
    if let Some(signal) = rustix::process::Signal::from_named_raw(signal as i32) {
        let _ = rustix::process::pidfd_send_signal(process, signal);
    }
}

/// When it started; none when it is gone, or dead and only not yet reaped.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold spaces and parentheses itself: count after the last one.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let is_dead = matches!(fields.next(), Some("Z" | "X"));
    fields.nth(18)?.parse().ok().filter(|_| !is_dead)
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

/// The user ids of a process; none when it is dead, if only not yet reaped.
fn users(pid: u32) -> Vec<u32> {
    // The owner of the directory would not do: root owns those of non-dumpable processes.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
    if field("State:").is_some_and(|state| state.trim_start().starts_with(['Z', 'X'])) {
        return Vec::new();
    }
    let ids = field("Uid:").unwrap_or_default().split_whitespace();
    ids.filter_map(|id| id.parse().ok()).collect()
}

/// Processes one of whose user ids this is.
pub fn of_user(uid: u32) -> Vec<u32> {
    let mut processes = all();
    processes.retain(|pid| users(*pid).contains(&uid));
    processes
}

/// Every user id that a process has.
pub fn all_users() -> BTreeSet<u32> {
    all().into_iter().flat_map(users).collect()
}

/// Kills the processes of this user that did not start before `since`, but never this one. Returns how many there were.
pub fn kill_user(uid: u32, since: u64) -> usize {
    let is_meant = |pid: u32| {
        pid != std::process::id()
            && users(pid).contains(&uid)
            && start_time(pid).is_some_and(|start| start >= since)
    };
    let mut killed = 0usize;
    for pid in all().into_iter().filter(|pid| is_meant(*pid)) {
        // Looked at again once the descriptor is there: the number may be another's by now.
        if let Some(process) = open(pid).filter(|_| is_meant(pid)) {
            send(&process, Signal::SIGKILL);
            killed = killed.saturating_add(1);
        }
    }
    killed
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
        let uid = nix::unistd::geteuid().as_raw();
        assert!(of_user(uid).contains(&own.pid) && all_users().contains(&uid));
    }

    #[test]
    fn only_later_processes_of_the_user_are_killed() {
        use std::os::unix::process::CommandExt;
        const UID: u32 = 4_000_000_017;
        let mut child = std::process::Command::new("/bin/sleep")
            .arg("60")
            .uid(UID)
            .spawn()
            .unwrap();
        let since = ProcessRef::of(child.id()).start_time;
        assert_eq!(kill_user(UID, since + 1), 0);
        assert_eq!(child.try_wait().unwrap(), None);
        assert_eq!(kill_user(UID + 1, since), 0);
        assert_eq!(kill_user(UID, since), 1);
        child.wait().unwrap();
        assert_eq!(kill_user(UID, since), 0);
    }

    #[test]
    fn a_dead_child_does_not_exist() {
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let process = ProcessRef::of(child.id());
        while start_time(child.id()).is_some() {
            std::thread::yield_now();
        }
        assert!(!process.exists());
        child.wait().unwrap();
    }
}

//! Holds everything in the guest but init, while the machine is saved and until a machine that goes on from the snapshot is
//! another one: nothing in it draws a random number that others draw, too.
//!
//! By the freezer of cgroups (version 2), of which programs notice nothing.

use crate::protocol::FREEZE_PORT;
use crate::say;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, listen, socket,
};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Where cgroups are.
const GROUPS: &str = "/sys/fs/cgroup";
/// Where the command is: init, which must not be held, stays in the root.
const COMMAND: &str = "/sys/fs/cgroup/casemate";
/// How long processes may take to be held: one in an uninterruptible sleep takes as long as that.
const PATIENCE: Duration = Duration::from_secs(2);
/// Any context id (`VMADDR_CID_ANY`, vsock(7)).
const ANY_CID: u32 = u32::MAX;

/// Starts a command so that it and its children can be held; where the guest has no such cgroups, as always.
pub fn in_group<T>(start: impl FnOnce() -> T) -> T {
    // Init goes there and back: what it starts there is there from its first instruction.
    let enter = |group: &str| fs::write(Path::new(group).join("cgroup.procs"), "0");
    let made = fs::create_dir(COMMAND).and_then(|()| enter(COMMAND));
    let started = start();
    if made.is_ok()
        && let Err(error) = enter(GROUPS)
    {
        say(&format!("cannot leave the command's cgroup: {error}"));
    }
    started
}

/// Takes whoever asks for the guest to be held.
#[derive(Debug, Default)]
pub struct Freezer {
    listener: Option<OwnedFd>,
    /// Who has asked, and has not gone yet.
    asking: Option<OwnedFd>,
    /// All is held.
    held: bool,
}

impl Freezer {
    /// Listens. A kernel without vsock has nobody who could ask.
    pub fn listen() -> Self {
        let listener = || -> Result<OwnedFd, Errno> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
            bind(listener.as_raw_fd(), &VsockAddr::new(ANY_CID, FREEZE_PORT))?;
            listen(&listener, Backlog::new(1)?)?;
            Ok(listener)
        };
        Self {
            listener: listener().ok(),
            ..Self::default()
        }
    }

    /// What becomes readable when there is something to do.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.asking
            .as_ref()
            .or(self.listener.as_ref())
            .map(AsFd::as_fd)
    }

    /// Does it: takes who asks, or lets all go on when that one has gone.
    pub fn take(&mut self) {
        match (&self.asking, &self.listener) {
            (Some(asking), _) => match nix::unistd::read(asking, &mut [0; 16]) {
                // Nothing is to be said.
                Ok(1..) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                Ok(_) => {
                    self.asking = None;
                    self.let_go();
                }
                // The connection is gone without its end: this machine goes on from a snapshot. All is held until it has
                // become another one.
                Err(_) => self.asking = None,
            },
            (None, Some(listener)) => {
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                let Ok(number) = accept4(listener.as_raw_fd(), flags) else {
                    return;
                };
                let asking = owned(number);
                self.held = hold();
                if !self.held {
                    set_all(false);
                }
                let answer = if self.held { b"F" } else { b"N" };
                let _ = nix::unistd::write(&asking, answer);
                self.asking = Some(asking);
            }
            (None, None) => {}
        }
    }

    /// Lets everything go on.
    pub fn let_go(&mut self) {
        if std::mem::take(&mut self.held) {
            set_all(false);
        }
    }
}

#[allow(unsafe_code)] // accept4 gives a number.
fn owned(number: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor, for this caller alone.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// The groups below the root, whoever made them.
fn groups() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(GROUPS).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths.filter(|path| path.join("cgroup.freeze").exists())
}

fn set_all(held: bool) {
    for group in groups() {
        // One that has gone holds nobody.
        let _ = fs::write(group.join("cgroup.freeze"), if held { "1" } else { "0" });
    }
}

/// Holds all; whether that was done in time.
fn hold() -> bool {
    if !Path::new(COMMAND).join("cgroup.freeze").exists() {
        return false;
    }
    set_all(true);
    let deadline = Instant::now() + PATIENCE;
    let is_held = |group: PathBuf| {
        let events = fs::read_to_string(group.join("cgroup.events"));
        events.map_or(true, |events| events.lines().any(|line| line == "frozen 1"))
    };
    while !groups().all(is_held) {
        if Instant::now() >= deadline {
            return false;
        }
        sleep(Duration::from_millis(1));
    }
    true
}

//! Resource limits, user, capabilities: what the process may ask of the kernel by itself.

use std::os::fd::BorrowedFd;

use caps::{CapSet, CapsHashSet};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Pid, Uid, getppid, getresgid, getresuid, setgroups, setresgid, setresuid};

use crate::arguments::Limits;
use crate::error::{Context, Error, Result, refused};
use crate::sys;

/// Sets the resource limits. Says which one could not be raised as far as it was asked for.
///
/// # Errors
/// What `setrlimit(2)` says, but for a limit that this host does not let us raise: the lower one stays.
pub fn limit(limits: &Limits) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    let mut set = |resource, name: &str, value: u64, asked: bool| -> Result<()> {
        match setrlimit(resource, value, value) {
            Ok(()) => Ok(()),
            Err(Errno::EPERM) => {
                let (_, most) = getrlimit(resource).doing("read limit", name)?;
                if asked {
                    notes.push(format!(
                        "--resource-limit {name}={value}: stays at {most}, no privilege to raise it"
                    ));
                }
                setrlimit(resource, most, most).doing("set limit", name)
            }
            Err(error) => Err(error).doing("set limit", name),
        }
    };
    set(
        Resource::RLIMIT_NOFILE,
        "no-file",
        limits.no_file,
        limits.no_file_asked,
    )?;
    if let Some(fsize) = limits.fsize {
        set(Resource::RLIMIT_FSIZE, "fsize", fsize, true)?;
    }
    // A core dump is the guest's memory on the host's disk. 1 and not 0: only 1 also stops a dump
    // into a program (core(5)).
    set(Resource::RLIMIT_CORE, "core", 1, false)?;
    Ok(notes)
}

/// Empties the bounding set and locks the secure bits.
///
/// # Errors
/// Without CAP_SETPCAP.
pub fn empty_bounding_set() -> Result<()> {
    sys::drop_bounding_set(0).doing("empty", "the capability bounding set")?;
    sys::lock_secure_bits().doing("lock", "the secure bits")
}

/// Becomes that user, for good and in every sense: keyring and tracing included.
///
/// # Errors
/// Without CAP_SETUID and CAP_SETGID, or if the kernel refuses a new keyring.
pub fn become_user(uid: u32, gid: u32) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setgroups(&[]).doing("leave", "all supplementary groups")?;
    setresgid(gid, gid, gid).doing("take gid", gid.to_string())?;
    setresuid(uid, uid, uid).doing("take uid", uid.to_string())?;
    let uids = getresuid().doing("read", "the uids")?;
    let gids = getresgid().doing("read", "the gids")?;
    let became = [uids.real, uids.effective, uids.saved] == [uid; 3]
        && [gids.real, gids.effective, gids.saved] == [gid; 3];
    if !became {
        return refused("uid and gid", "the kernel did not change them all");
    }
    // The change of user does this by itself, unless the host's fs.suid_dumpable says otherwise:
    // nobody of that user may trace this process, and its memory goes into no core dump.
    prctl::set_dumpable(false).doing("forbid", "core dumps and tracing")?;
    // The caller's session keyring gives its keys to whoever possesses it, whatever his uid. After the
    // change of user, whose quota the new, empty one counts against.
    sys::new_session_keyring().doing("leave", "the session keyring")
}

/// Empties every capability set, and looks.
///
/// # Errors
/// If one is not empty then.
pub fn drop_capabilities() -> Result<()> {
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
    ] {
        caps::clear(None, set)?;
    }
    expect_capabilities(&CapsHashSet::new())
}

/// Looks whether every capability set is that one.
///
/// # Errors
/// If one is not.
pub fn expect_capabilities(wanted: &CapsHashSet) -> Result<()> {
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
        CapSet::Bounding,
    ] {
        if caps::read(None, set)? != *wanted {
            return refused(
                format!("{set:?} capabilities"),
                "not those that were to stay",
            );
        }
    }
    Ok(())
}

/// What "the parent" is to [`die_with_parent`].
#[derive(Debug)]
pub enum Parent<'a> {
    /// Whoever started the jailer, by its number then.
    Caller(Pid),
    /// The jailer's other half. By descriptor: in a new PID namespace its number is 0.
    OtherHalf(BorrowedFd<'a>),
}

/// Asks to be killed when the parent ends, and looks whether it has already.
///
/// # Errors
/// [`Error::ParentGone`] or [`Error::CallerGone`] if it has.
pub fn die_with_parent(parent: &Parent<'_>) -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL).doing("set", "the parent death signal")?;
    match parent {
        Parent::Caller(number) if getppid() != *number => Err(Error::CallerGone),
        Parent::Caller(_) => Ok(()),
        Parent::OtherHalf(pidfd) => {
            let mut wait = [PollFd::new(*pidfd, PollFlags::POLLIN)];
            match poll(&mut wait, PollTimeout::ZERO).doing("look after", "the parent")? {
                0 => Ok(()),
                _ => Err(Error::ParentGone),
            }
        }
    }
}

/// No exec gives privileges from here on.
///
/// # Errors
/// What `prctl(2)` says.
pub fn no_new_privileges() -> Result<()> {
    prctl::set_no_new_privs().doing("set", "no_new_privs")
}

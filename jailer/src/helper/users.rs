//! A helper's user namespace: ids of its own, and the capabilities that it was given, over those alone.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, pipe};

use crate::credentials::expect_capabilities;
use crate::error::{Context, Result, refused};
use crate::sys;

/// Makes a user namespace whose ids 0 and on, `count` of them, are `uid` and `gid` and on outside.
///
/// Another process enters it first: who may write the map is not who is in it.
///
/// # Errors
/// If the host has no user namespaces, or none left.
pub fn make(uid: u32, gid: u32, count: u32) -> Result<OwnedFd> {
    let (our_read, their_write) = pipe().doing("make", "a pipe")?;
    let (their_read, our_write) = pipe().doing("make", "a pipe")?;
    match sys::fork().doing("fork", "for the user namespace")? {
        ForkResult::Child => {
            drop((our_read, our_write));
            let errno = unshare(CloneFlags::CLONE_NEWUSER)
                .err()
                .unwrap_or(Errno::UnknownErrno);
            let told = File::from(their_write).write_all(&(errno as i32).to_ne_bytes());
            // Until the other end is closed; then the namespace is held by its descriptor.
            let _ = told.and_then(|()| File::from(their_read).read(&mut [0]));
            std::process::exit(0);
        }
        ForkResult::Parent { child } => {
            drop((their_read, their_write));
            let made = map(child, our_read, uid, gid, count);
            drop(our_write);
            let _ = waitpid(child, None);
            made
        }
    }
}

fn map(child: Pid, answer: OwnedFd, uid: u32, gid: u32, count: u32) -> Result<OwnedFd> {
    let mut errno = [0; 4];
    File::from(answer)
        .read_exact(&mut errno)
        .doing("make", "a user namespace")?;
    match Errno::from_raw(i32::from_ne_bytes(errno)) {
        Errno::UnknownErrno => {}
        Errno::ENOSPC | Errno::EPERM | Errno::EINVAL => {
            return refused(
                "user namespace",
                "this host gives none: see sysctl user.max_user_namespaces, and whether the jailer is in a chroot",
            );
        }
        errno => return Err(errno).doing("make", "a user namespace"),
    }
    for (file, first) in [("uid_map", uid), ("gid_map", gid)] {
        let path = format!("/proc/{child}/{file}");
        std::fs::write(&path, format!("0 {first} {count}\n")).doing("write", path)?;
    }
    let path = format!("/proc/{child}/ns/user");
    Ok(File::open(&path).doing("open", path)?.into())
}

/// Enters it. The caller is nobody there, with every capability, until it takes an id.
///
/// # Errors
/// What `setns(2)` says.
pub fn enter(namespace: &OwnedFd) -> Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWUSER).doing("enter", "the user namespace")
}

/// Leaves these capabilities, which outlast exec, and no others: neither now nor by an exec or an id later.
///
/// # Errors
/// If the sets are not as they must be then.
pub fn keep_capabilities(wanted: &[Capability]) -> Result<()> {
    let wanted: CapsHashSet = wanted.iter().copied().collect();
    let mask = wanted.iter().fold(0, |mask, one| mask | one.bitmask());
    sys::drop_bounding_set(mask).doing("reduce", "the capability bounding set")?;
    caps::set(None, CapSet::Inheritable, &wanted)?;
    caps::set(None, CapSet::Ambient, &wanted)?;
    sys::lock_secure_bits().doing("lock", "the secure bits")?;
    caps::set(None, CapSet::Effective, &wanted)?;
    caps::set(None, CapSet::Permitted, &wanted)?;
    expect_capabilities(&wanted)
}

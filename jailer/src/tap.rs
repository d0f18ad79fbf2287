//! Tap interfaces: attached by name in their network namespace, used by descriptor from any.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;
use nix::sys::statfs::{FsType, fstatfs};

use crate::error::{Context, Result, refused};
use crate::sys;

/// Magic number of the file system of namespace descriptors (`linux/magic.h`).
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// Ethernet frames, no packet information in front, a virtio-net header in front.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Enters the network namespace at `path`. Symbolic links are followed: `/var/run` is one.
///
/// # Errors
/// If there is none.
pub fn enter_netns(path: &Path) -> Result<()> {
    let object = path.display().to_string();
    // O_NONBLOCK: a FIFO must be refused, not waited for.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let file = open(path, flags, Mode::empty()).doing("open", &object)?;
    let kind = fstatfs(&file).doing("look at", &object)?.filesystem_type();
    if kind != NSFS_MAGIC {
        return refused(
            object,
            "not a network namespace: make one with `ip netns add`",
        );
    }
    setns(&file, CloneFlags::CLONE_NEWNET).doing("enter", object)
}

/// Opens the interface's queue, non-blocking.
///
/// # Errors
/// If there is no such interface, it is no tap, or somebody uses it.
pub fn open_tap(name: &str) -> Result<OwnedFd> {
    // TUNSETIFF would make an interface that is not there.
    match if_nametoindex(name) {
        Ok(_) => {}
        Err(Errno::ENODEV) => return missing(name),
        Err(error) => return Err(error).doing("look for interface", name),
    }
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let tun = open("/dev/net/tun", flags, Mode::empty()).doing("open", "/dev/net/tun")?;
    match sys::attach_tap(tun.as_fd(), name, FLAGS) {
        Ok(()) => {}
        Err(Errno::EBUSY) => {
            return refused(
                name,
                "another program uses this tap: every machine needs one of its own",
            );
        }
        Err(Errno::EINVAL) => {
            return refused(
                name,
                "not a tap interface with one queue: make it with `ip tuntap add mode tap`",
            );
        }
        Err(error) => return Err(error).doing("attach to tap", name),
    }
    // Had it gone in between, TUNSETIFF has made one, which goes away with its descriptor.
    let attached = sys::tap_flags(tun.as_fd()).doing("look at tap", name)?;
    if attached & libc::IFF_PERSIST == 0 {
        return missing(name);
    }
    Ok(tun)
}

fn missing<T>(name: &str) -> Result<T> {
    refused(
        name,
        "no such interface in that network namespace: make it with `ip tuntap add mode tap`",
    )
}

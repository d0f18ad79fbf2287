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

/// Opens so many queues of the interface, non-blocking.
///
/// # Errors
/// If there is no such interface, it is no tap, has one queue where several are wanted, or somebody
/// uses it.
pub fn open_tap(name: &str, queues: u8) -> Result<Vec<OwnedFd>> {
    // TUNSETIFF would make an interface that is not there.
    match if_nametoindex(name) {
        Ok(_) => {}
        Err(Errno::ENODEV) => return missing(name),
        Err(error) => return Err(error).doing("look for interface", name),
    }
    let several = FLAGS | libc::IFF_MULTI_QUEUE;
    (0..queues)
        .map(|_| match queues {
            // An interface made for several queues can do with one.
            1 => match attach(name, FLAGS)? {
                Ok(queue) => Ok(queue),
                Err(Errno::EINVAL) => attached(name, attach(name, several)?),
                failed => attached(name, failed),
            },
            _ => attached(name, attach(name, several)?),
        })
        .collect()
}

fn attach(name: &str, flags: libc::c_int) -> Result<nix::Result<OwnedFd>> {
    let open_flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let tun = open("/dev/net/tun", open_flags, Mode::empty()).doing("open", "/dev/net/tun")?;
    let attached = sys::attach_tap(tun.as_fd(), name, flags);
    if attached.is_ok() {
        // Had it gone in between, TUNSETIFF has made one, which goes away with its descriptor.
        let flags = sys::tap_flags(tun.as_fd()).doing("look at tap", name)?;
        if flags & libc::IFF_PERSIST == 0 {
            return missing(name);
        }
    }
    Ok(attached.map(|()| tun))
}

fn attached(name: &str, result: nix::Result<OwnedFd>) -> Result<OwnedFd> {
    match result {
        Err(Errno::EBUSY | Errno::E2BIG) => refused(
            name,
            "another program uses this tap: every machine needs one of its own",
        ),
        Err(Errno::EINVAL) => refused(
            name,
            "not a tap interface, or one with a single queue where several are wanted: make it with \
             `ip tuntap add mode tap`, and `multi_queue`",
        ),
        other => other.doing("attach to tap", name),
    }
}

fn missing<T>(name: &str) -> Result<T> {
    refused(
        name,
        "no such interface in that network namespace: make it with `ip tuntap add mode tap`",
    )
}

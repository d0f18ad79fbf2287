//! Opening a tap that exists.
#![allow(unsafe_code)] // TUNSETIFF, which no library offers as a safe call.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, openat2};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::virtio::net;

/// Longest interface name in bytes (IFNAMSIZ, less its NUL).
const MAX_NAME: usize = 15;

ioctl_iow_nr!(TUNSETIFF, b'T' as u32, 202, libc::c_int);

/// Attaches to `queues` queues of the tap `name`, as virtio-net wants it.
///
/// # Errors
/// When no interface has the name (TUNSETIFF would make one), it is no tap, it is in use, it has
/// one queue and several are asked for, or the caller may not.
pub fn open(name: &str, queues: u8) -> io::Result<Vec<File>> {
    check_name(name)?;
    nix::net::if_::if_nametoindex(name).map_err(|_| missing())?;
    let tun = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
    };
    let queue = |_| attach(tun, name, queues > 1);
    (0..queues).map(queue).collect()
}

/// Attaches to one queue of the tap `name` and prepares it for a card: for the broker, whose policy knows these calls
/// and no others.
///
/// # Errors
/// As [`open`].
pub fn open_queue(name: &str, several: bool) -> io::Result<OwnedFd> {
    check_name(name)?;
    let tun = || {
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let tun = openat2(AT_FDCWD, "/dev/net/tun", OpenHow::new().flags(flags))?;
        Ok(File::from(tun))
    };
    let queue = attach(tun, name, several)?;
    // Had it not been there, it was made just now, and goes away with its descriptor.
    if net::prepare(&queue, several)? & libc::IFF_PERSIST == 0 {
        return Err(missing());
    }
    Ok(queue.into())
}

fn missing() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "there is no such interface")
}

fn check_name(name: &str) -> io::Result<()> {
    if name.len() > MAX_NAME {
        return Err(missing());
    }
    Ok(())
}

/// Attaches what `tun` opens to a queue of the tap `name`, one of several or the only one.
fn attach(tun: impl Fn() -> io::Result<File>, name: &str, several: bool) -> io::Result<File> {
    let more = if several { libc::IFF_MULTI_QUEUE } else { 0 };
    match attach_to(tun()?, name, more) {
        // A tap made for several queues can do with one.
        Err(error) if !several && error.kind() == io::ErrorKind::InvalidInput => {
            attach_to(tun()?, name, libc::IFF_MULTI_QUEUE)
        }
        result => result,
    }
}

fn attach_to(tun: File, name: &str, more: libc::c_int) -> io::Result<File> {
    // SAFETY: all zeros is a valid ifreq, plain old data with no references.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    // The flags fit: they are bits 1, 8, 12 and 14.
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more) as libc::c_short;
    // SAFETY: TUNSETIFF reads an ifreq, which is what the reference is to.
    if unsafe { ioctl_with_ref(&tun, TUNSETIFF(), &request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tun)
}

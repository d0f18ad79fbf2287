//! Opening a tap that exists.
#![allow(unsafe_code)] // TUNSETIFF, which no library offers as a safe call.

use std::fs::{File, OpenOptions};
use std::io;

use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

/// Longest interface name in bytes (IFNAMSIZ, less its NUL).
const MAX_NAME: usize = 15;

ioctl_iow_nr!(TUNSETIFF, b'T' as u32, 202, libc::c_int);

/// Attaches to the tap `name`, as virtio-net wants it.
///
/// # Errors
/// When no interface has the name (TUNSETIFF would make one), it is no tap, it is in use, or the
/// caller may not.
pub fn open(name: &str) -> io::Result<File> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "there is no such interface");
    if name.len() > MAX_NAME {
        return Err(missing());
    }
    nix::net::if_::if_nametoindex(name).map_err(|_| missing())?;
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: all zeros is a valid ifreq, plain old data with no references.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    // The flags fit: they are bits 1, 12 and 14.
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads an ifreq, which is what the reference is to.
    if unsafe { ioctl_with_ref(&tun, TUNSETIFF(), &request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tun)
}

//! The tap's ioctls (linux/if_tun.h), which no library offers as safe calls.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

const TUN: u32 = b'T' as u32;
ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, libc::c_uint);
ioctl_ior_nr!(TUNGETIFF, TUN, 210, libc::c_uint);
ioctl_iow_nr!(TUNSETQUEUE, TUN, 217, libc::c_int);
ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, libc::c_int);

/// What the guest takes from us unfinished: checksums and large segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(libc::c_uint);

impl Offloads {
    /// Packets without a checksum. The others need it.
    pub const CSUM: Self = Self(1);
    /// TCP over IPv4 larger than the MTU.
    pub const TSO4: Self = Self(2);
    /// TCP over IPv6 larger than the MTU.
    pub const TSO6: Self = Self(4);
    /// UDP larger than the MTU.
    pub const UFO: Self = Self(16);
    /// Large TCP packets may carry ECN marks.
    pub const ECN: Self = Self(8);
    /// UDP over IPv4 larger than the MTU, to be cut into datagrams.
    pub const USO4: Self = Self(32);
    /// The same over IPv6.
    pub const USO6: Self = Self(64);

    /// Both.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Makes `tap` non-blocking and has it put a header of `header` bytes before each frame. Returns its flags.
///
/// # Errors
/// When it is no tap, or lacks IFF_VNET_HDR or IFF_NO_PI, so that frames would be misread; or
/// IFF_MULTI_QUEUE, if it is to be one of several queues.
pub fn prepare(tap: &File, header: libc::c_int, one_of_several: bool) -> io::Result<libc::c_int> {
    // SAFETY: all zeros is a valid ifreq, plain old data with no references.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes an ifreq, which is what the reference is to.
    check(unsafe { ioctl_with_mut_ref(tap, TUNGETIFF(), &mut request) })?;
    // SAFETY: TUNGETIFF stores the flags in this member of the union.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    for (flag, name) in [
        (libc::IFF_TAP, "IFF_TAP"),
        (libc::IFF_NO_PI, "IFF_NO_PI"),
        (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
        (libc::IFF_MULTI_QUEUE, "IFF_MULTI_QUEUE"),
    ] {
        let is_needed = flag != libc::IFF_MULTI_QUEUE || one_of_several;
        if is_needed && flags & flag == 0 {
            return Err(io::Error::other(format!("it was opened without {name}")));
        }
    }
    // SAFETY: TUNSETVNETHDRSZ reads an int, which is what the reference is to.
    check(unsafe { ioctl_with_ref(tap, TUNSETVNETHDRSZ(), &header) })?;
    fcntl(tap, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
    Ok(flags)
}

/// Tells `tap` what may be handed to the guest unfinished.
///
/// # Errors
/// When the kernel does not know one of them.
pub fn set_offloads(tap: &File, offloads: Offloads) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its flags by value and touches no memory.
    check(unsafe { ioctl_with_val(tap, TUNSETOFFLOAD(), offloads.0.into()) })
}

/// Has the kernel use this queue of a tap that has several, or not. A descriptor whose queue is not
/// used has no frames and cannot be watched.
///
/// # Errors
/// When the tap has one queue only, or this one is as asked for already.
pub fn use_queue(tap: &File, used: bool) -> io::Result<()> {
    // SAFETY: all zeros is a valid ifreq, plain old data with no references.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flag = if used {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    // They fit: they are bits 9 and 10.
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: TUNSETQUEUE reads an ifreq, which is what the reference is to.
    check(unsafe { ioctl_with_ref(tap, TUNSETQUEUE(), &request) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A new tap, for tests: it is gone when its last descriptor is closed.
#[cfg(test)]
pub fn create(name: &str, flags: libc::c_int) -> File {
    vmm_sys_util::ioctl_iow_nr!(TUNSETIFF, TUN, 202, libc::c_int);
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all zeros is a valid ifreq, plain old data with no references.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | flags) as i16;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which is what the reference is to.
    check(unsafe { ioctl_with_mut_ref(&tap, TUNSETIFF(), &mut request) }).unwrap();
    tap
}

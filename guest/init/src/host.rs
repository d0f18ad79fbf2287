//! The way to the host, and the loopback interface.

use crate::protocol::{HOST_CID, PORT};
use crate::{Error, say};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, VsockAddr, connect as connect_to, socket,
};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Connects to the runtime over vsock.
pub fn connect(patience: Duration) -> Result<OwnedFd, Error> {
    let deadline = Instant::now() + patience;
    loop {
        let stream = socket(
            AddressFamily::Vsock,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .map_err(|errno| {
            let why = match errno {
                Errno::EAFNOSUPPORT => {
                    "the kernel has no driver vsock: register it with its modules"
                }
                _ => errno.desc(),
            };
            Error::other(format!("no connection to the host: {why}"))
        })?;
        match connect_to(stream.as_raw_fd(), &VsockAddr::new(HOST_CID, PORT)) {
            Ok(()) => return Ok(stream),
            // The device is found some time after its driver was loaded.
            Err(errno) if Instant::now() >= deadline => {
                let why = match errno {
                    Errno::ENODEV => {
                        "the kernel has no driver vmw_vsock_virtio_transport or virtio_mmio: register it with its \
                         modules; or the machine has no vsock device"
                    }
                    _ => errno.desc(),
                };
                return Err(Error::other(format!(
                    "no connection to the host (vsock port {PORT}): {why}"
                )));
            }
            Err(_) => sleep(Duration::from_millis(10)),
        }
    }
}

/// Brings `lo` up: programs expect 127.0.0.1. A kernel without networking goes without.
#[allow(unsafe_code)] // The interface ioctls have no safe wrapper.
pub fn loopback_up() {
    let Ok(any) = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    ) else {
        return;
    };
    // SAFETY: ifreq is plain data of integers and byte arrays, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is a valid ifreq with a terminated name, borrowed for the call (netdevice(7)).
    let result = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
    if result != 0 {
        say(&format!(
            "cannot bring lo up: {}",
            io::Error::last_os_error()
        ));
    }
}

//! Makes this machine another one than those that go on from the same snapshot.

use crate::protocol::Identity;
use crate::{Error, say};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};

/// Becomes `identity`. The kernel's random numbers come first: nothing else of the guest's goes on before they are its own.
pub fn take(identity: &Identity, random: Option<&File>) -> Result<(), Error> {
    if !identity.is_valid() {
        return Err(Error::other("from the host: an identity that is none"));
    }
    match random {
        Some(random) => reseed(random, &identity.entropy).map_err(|errno| {
            Error::other(format!(
                "cannot reseed the kernel's random numbers: {errno}"
            ))
        })?,
        None => return Err(Error::other("no /dev/urandom to be reseeded")),
    }
    if let Err(error) = nix::unistd::sethostname(&identity.hostname) {
        say(&format!(
            "cannot set the host name to {:?}: {error}",
            identity.hostname
        ));
    }
    let (seconds, nanoseconds) = (identity.time / 1_000_000_000, identity.time % 1_000_000_000);
    let time = TimeSpec::new(seconds.cast_signed(), nanoseconds.cast_signed());
    if let Err(errno) = clock_settime(ClockId::CLOCK_REALTIME, time) {
        say(&format!("cannot set the clock: {errno}"));
    }
    for (card, address) in cards().iter().zip(&identity.addresses) {
        if let Err(errno) = set_address(card, *address) {
            say(&format!("cannot set the address of {card}: {errno}"));
        }
    }
    Ok(())
}

/// `struct rand_pool_info` of linux/random.h, with as much as an identity has.
#[repr(C)]
struct Pool {
    /// In bits.
    entropy_count: libc::c_int,
    /// In bytes.
    size: libc::c_int,
    bytes: [u8; crate::protocol::ENTROPY_BYTES],
}

const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Puts bytes into the kernel's pool, which counts them as random, and makes its generator start anew from the pool
/// (random(4)).
#[allow(unsafe_code)] // Neither ioctl has a safe wrapper.
fn reseed(random: &File, bytes: &[u8]) -> Result<(), Errno> {
    let bytes = bytes.try_into().map_err(|_| Errno::EINVAL)?;
    let size = crate::protocol::ENTROPY_BYTES as libc::c_int;
    let pool = Pool {
        entropy_count: size * 8,
        size,
        bytes,
    };
    // SAFETY: the pool is a rand_pool_info with `size` bytes behind it, borrowed for the call, which only reads it.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, &pool) };
    Errno::result(added)?;
    // SAFETY: it takes no argument.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _) };
    match Errno::result(reseeded) {
        // Before Linux 4.14; what was added then counts from the next reseeding on.
        Err(Errno::EINVAL | Errno::ENOTTY) => Ok(()),
        other => other.map(drop),
    }
}

/// Names of the network cards, in the order of their devices.
fn cards() -> Vec<String> {
    let entries = fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten();
    let mut cards: Vec<(usize, String)> = entries
        .filter_map(|entry| {
            let device = fs::canonicalize(entry.path().join("device")).ok()?;
            let device = device.file_name()?.to_str()?;
            let number = device.strip_prefix("virtio")?.parse().ok()?;
            Some((number, entry.file_name().into_string().ok()?))
        })
        .collect();
    cards.sort();
    cards.into_iter().map(|(_, name)| name).collect()
}

/// Sets a card's hardware address (netdevice(7)).
#[allow(unsafe_code)] // The interface ioctls have no safe wrapper.
fn set_address(card: &str, address: [u8; 6]) -> Result<(), Errno> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let any: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
    // SAFETY: ifreq is plain data of integers and byte arrays, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One less than there is room for, so that it ends in a zero.
    let room = request.ifr_name.len().saturating_sub(1);
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(card.bytes()) {
        *to = from.cast_signed();
    }
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().zip(address) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_hwaddr = libc::sockaddr {
        sa_family: libc::ARPHRD_ETHER,
        sa_data: data,
    };
    // SAFETY: the request is a valid ifreq with a terminated name, borrowed for the call.
    let set = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFHWADDR as _, &request) };
    Errno::result(set).map(drop)
}

//! Descriptors that cross a process boundary: sent and received with a message, inherited by
//! number, or kept across a fork.
#![allow(unsafe_code)] // Numbers become owned descriptors here, and nowhere else in this crate.

use std::collections::BTreeSet;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::{ForkResult, Pid, fork};

/// Most descriptors that a packet can bring (SCM_MAX_FD). The control buffer has room for all of them:
/// when the kernel cuts it, nix hides what came, and that would stay open for ever.
const MAX_DESCRIPTORS: usize = 253;

/// One packet as it came.
#[derive(Debug)]
pub struct Received {
    /// Bytes of it in the buffer; zero when the other end is closed.
    pub length: usize,
    /// Whether something of it was lost: it was longer than the buffer, or brought more
    /// descriptors than one.
    pub truncated: bool,
    /// Whether a descriptor came that this process had no room for (`RLIMIT_NOFILE`).
    pub descriptor_lost: bool,
    /// The descriptor that came with it, close-on-exec.
    pub descriptor: Option<OwnedFd>,
}

/// Why a number was not taken over as a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    /// 0, 1 and 2 belong to the standard library; negative numbers to nobody.
    #[error("descriptor {0} cannot be taken over: numbers start at 3")]
    Reserved(RawFd),
    /// Named twice.
    #[error("descriptor {0} is named twice")]
    Twice(RawFd),
    /// Not open in this process.
    #[error("descriptor {0} is not open")]
    Closed(RawFd),
}

/// Which side of a fork this is.
#[derive(Debug)]
pub enum Fork {
    /// The new process.
    Child,
    /// The old one, with the new one's id.
    Parent(Pid),
}

/// Sends one packet, never waiting and never raising SIGPIPE.
///
/// # Errors
/// What `sendmsg(2)` says: `EAGAIN` when the socket's buffer is full, `EPIPE` when nobody listens.
pub fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let numbers = descriptor.map(|fd| [fd.as_raw_fd()]);
    let rights = numbers.as_ref().map(|n| [ControlMessage::ScmRights(n)]);
    let control: &[ControlMessage] = rights.as_ref().map_or(&[], |r| r);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        let result = sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            flags,
            None,
        );
        match result {
            Err(Errno::EINTR) => {}
            // A packet is sent whole or not at all.
            other => return other.map(drop),
        }
    }
}

/// Receives one packet, never waiting, with at most one descriptor.
///
/// # Errors
/// What `recvmsg(2)` says: `EAGAIN` when there is none.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Received, Errno> {
    let mut control = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    loop {
        let mut parts = [IoSliceMut::new(buffer)];
        let message = match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)
        {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let mut descriptor = None;
        let mut extra = false;
        // Own every one of them, so that none leaks.
        if let Ok(messages) = message.cmsgs() {
            for item in messages {
                if let ControlMessageOwned::ScmRights(numbers) = item {
                    for number in numbers {
                        // SAFETY: the kernel has just installed this number for us, and nothing
                        // else in the process knows it.
                        let owned = unsafe { OwnedFd::from_raw_fd(number) };
                        extra |= descriptor.replace(owned).is_some();
                    }
                }
            }
        }
        let cut = message.flags.contains(MsgFlags::MSG_TRUNC);
        return Ok(Received {
            length: message.bytes,
            truncated: cut || extra,
            // The buffer has room for all, so this is what is left of cutting.
            descriptor_lost: message.flags.contains(MsgFlags::MSG_CTRUNC),
            descriptor,
        });
    }
}

/// Numbers that this process has taken over: each is owned once, for good.
static ADOPTED: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes over a descriptor that was inherited by number, and marks it close-on-exec.
///
/// Call it before the process opens anything of its own: an inherited number is known not to belong to
/// any part of this program only as long as nothing has been opened since its start.
///
/// # Errors
/// If the number is below 3, was taken over before, or is not open.
pub fn adopt(number: RawFd) -> Result<OwnedFd, AdoptError> {
    if number < 3 {
        return Err(AdoptError::Reserved(number));
    }
    let mut adopted = ADOPTED.lock().unwrap_or_else(PoisonError::into_inner);
    if adopted.contains(&number) {
        return Err(AdoptError::Twice(number));
    }
    // SAFETY: borrowed only for this call, whose very purpose is to find out whether it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|_| AdoptError::Closed(number))?;
    adopted.insert(number);
    // SAFETY: it is open (just checked) and not a standard stream; the register above gives each
    // number away at most once, and the caller's part is to ask before opening anything.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Forks, if this process has a single thread.
///
/// # Errors
/// `EBUSY` if there are several threads, else what `fork(2)` says.
pub fn fork_single_threaded() -> Result<Fork, Errno> {
    // Threads are counted by their directories: `..`, `.` and one for each thread.
    let threads = std::fs::read_dir("/proc/self/task")
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO)))?;
    if threads.count() != 1 {
        return Err(Errno::EBUSY);
    }
    // SAFETY: the process has one thread, this one, so no lock of libc or of the allocator can be
    // held by a thread that does not exist in the child.
    match unsafe { fork() }? {
        ForkResult::Child => Ok(Fork::Child),
        ForkResult::Parent { child } => Ok(Fork::Parent(child)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, IntoRawFd};

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap()
    }

    #[test]
    fn a_descriptor_travels() {
        let (a, b) = pair();
        let file = std::fs::File::open("/dev/null").unwrap();
        send(a.as_fd(), b"x", Some(file.as_fd())).unwrap();
        let mut buffer = [0; 8];
        let got = receive(b.as_fd(), &mut buffer).unwrap();
        assert_eq!((got.length, got.truncated), (1, false));
        let flags = fcntl(got.descriptor.unwrap(), FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, FdFlag::FD_CLOEXEC.bits());
        assert_eq!(receive(b.as_fd(), &mut buffer).unwrap_err(), Errno::EAGAIN);
        drop(a);
        assert_eq!(receive(b.as_fd(), &mut buffer).unwrap().length, 0);
    }

    #[test]
    fn several_descriptors_are_noticed() {
        let (a, b) = pair();
        let file = std::fs::File::open("/dev/null").unwrap();
        let many = [file.as_raw_fd(); 3];
        sendmsg::<()>(
            a.as_raw_fd(),
            &[IoSlice::new(b"x")],
            &[ControlMessage::ScmRights(&many)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        assert!(receive(b.as_fd(), &mut [0; 8]).unwrap().truncated);
        // None of them stays open: nobody holds the socket once this end is closed.
        let (hostage, mut watched) = UnixStream::pair().unwrap();
        let many = [hostage.as_raw_fd(); MAX_DESCRIPTORS];
        let control = [ControlMessage::ScmRights(&many)];
        let flags = MsgFlags::empty();
        sendmsg::<()>(a.as_raw_fd(), &[IoSlice::new(b"x")], &control, flags, None).unwrap();
        assert!(receive(b.as_fd(), &mut [0; 8]).unwrap().truncated);
        drop(hostage);
        watched.set_nonblocking(true).unwrap();
        assert_eq!(watched.read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn a_number_is_taken_once() {
        assert_eq!(adopt(2).unwrap_err(), AdoptError::Reserved(2));
        assert_eq!(adopt(-1).unwrap_err(), AdoptError::Reserved(-1));
        assert_eq!(adopt(999_999).unwrap_err(), AdoptError::Closed(999_999));
        let number = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        let owned = adopt(number).unwrap();
        assert_eq!(adopt(number).unwrap_err(), AdoptError::Twice(number));
        drop(owned);
    }
}

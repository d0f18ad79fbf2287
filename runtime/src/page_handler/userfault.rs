//! A VMM's userfaultfd(2): what the kernel says by it, and pages for those who wait.
//!
//! Unsafe code lives here because ioctl(2) has no safe form. It is sound because each request is given its own structure,
//! and what that points to in this process is a page that is alive for the call. Where in the VMM it goes is the VMM's to
//! say: the kernel lets it be nothing but memory that the VMM has registered itself.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE, uffd_msg, uffdio_copy, uffdio_range, uffdio_zeropage,
};
use linux_raw_sys::ioctl::{UFFDIO_COPY, UFFDIO_ZEROPAGE};
use nix::errno::Errno;

use super::source::PAGE;

/// Bytes of one message.
const MESSAGE: usize = size_of::<uffd_msg>();
/// Most messages that are read at once.
const AT_ONCE: usize = 64;

nix::ioctl_readwrite_bad!(
    /// Bytes for pages that are not there.
    uffdio_copy_request,
    UFFDIO_COPY,
    uffdio_copy
);
nix::ioctl_readwrite_bad!(
    /// Zeroes for them.
    uffdio_zeropage_request,
    UFFDIO_ZEROPAGE,
    uffdio_zeropage
);

/// What the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody waits for the page with this address.
    Fault(u64),
    /// What lies between these addresses was given back.
    Removed(u64, u64),
}

/// What came of bringing a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is there, or nobody wants it any more.
    Done,
    /// Something was given back: that is to be read first.
    Later,
    /// The VMM has ended.
    Ended,
}

/// A descriptor that a VMM says is a userfaultfd.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Whatever it is: of another kind of descriptor no request here means anything.
    pub fn new(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// The next things that the kernel has to say; none if it has nothing to.
    ///
    /// # Errors
    /// When it is not a userfaultfd, or one that tells of other things.
    pub fn read(&self) -> Result<Vec<Event>, Errno> {
        let mut bytes = [0; MESSAGE * AT_ONCE];
        let count = match nix::unistd::read(&self.0, &mut bytes) {
            Ok(count) => count,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        parse(bytes.get(..count).unwrap_or_default()).ok_or(Errno::EPROTO)
    }

    /// Brings the page at `start`.
    ///
    /// # Errors
    /// What the host says.
    pub fn copy(&self, start: u64, page: &[u8; PAGE]) -> Result<Outcome, Errno> {
        let mut request = uffdio_copy {
            dst: start,
            src: page.as_ptr() as u64,
            len: PAGE as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: see the module's words.
        outcome(unsafe { uffdio_copy_request(self.0.as_raw_fd(), &mut request) })
    }

    /// Brings a page of zeroes at `start`.
    ///
    /// # Errors
    /// What the host says.
    pub fn zero(&self, start: u64) -> Result<Outcome, Errno> {
        let mut request = uffdio_zeropage {
            range: uffdio_range {
                start,
                len: PAGE as u64,
            },
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: see the module's words.
        outcome(unsafe { uffdio_zeropage_request(self.0.as_raw_fd(), &mut request) })
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn outcome(result: Result<i32, Errno>) -> Result<Outcome, Errno> {
    match result {
        // EEXIST: another fault has brought it. ENOENT: the memory is not registered any more.
        Ok(_) | Err(Errno::EEXIST | Errno::ENOENT) => Ok(Outcome::Done),
        Err(Errno::EAGAIN) => Ok(Outcome::Later),
        Err(Errno::ESRCH) => Ok(Outcome::Ended),
        Err(error) => Err(error),
    }
}

/// Messages as they were read: whole ones, of the kinds that a VMM asks for.
fn parse(bytes: &[u8]) -> Option<Vec<Event>> {
    let (messages, rest) = bytes.as_chunks::<MESSAGE>();
    if messages.is_empty() || !rest.is_empty() {
        return None;
    }
    let event = |message: &[u8; MESSAGE]| {
        let word = |at: usize| {
            let bytes = message.get(at..at.checked_add(8)?)?;
            Some(u64::from_ne_bytes(bytes.try_into().ok()?))
        };
        // struct uffd_msg (linux/userfaultfd.h): the kind, then from byte 8 on a union.
        match u32::from(*message.first()?) {
            UFFD_EVENT_PAGEFAULT => word(16).map(Event::Fault),
            UFFD_EVENT_REMOVE => Some(Event::Removed(word(8)?, word(16)?)),
            _ => None,
        }
    };
    messages.iter().map(event).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, words: [u64; 3]) -> Vec<u8> {
        let mut bytes = vec![0; 8];
        bytes[0] = kind;
        words
            .iter()
            .for_each(|word| bytes.extend_from_slice(&word.to_ne_bytes()));
        bytes
    }

    #[test]
    fn messages_are_read_whole() {
        let fault = message(0x12, [0, 0x7000, 0]);
        let removed = message(0x15, [0x1000, 0x3000, 0]);
        let both = [fault.clone(), removed].concat();
        let events = [Event::Fault(0x7000), Event::Removed(0x1000, 0x3000)];
        assert_eq!(parse(&both).unwrap(), events);
        // What no userfaultfd says that was asked for this.
        for bytes in [&[][..], &fault[..31], &both[..33], &message(0x13, [0; 3])] {
            assert_eq!(parse(bytes), None);
        }
    }

    #[test]
    fn another_kind_of_descriptor_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        let userfault = Userfault::new(file.into());
        assert!(userfault.read().is_err());
        assert!(userfault.copy(4096, &[0; PAGE]).is_err());
        assert!(userfault.zero(4096).is_err());
    }
}

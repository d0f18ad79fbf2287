//! Pieces of guest memory as `iovec`s, so that the kernel copies straight between a descriptor and
//! the guest.
//!
//! Unsafe code lives here because the kernel is given raw addresses of guest memory. It is sound
//! because every address comes from a `VolatileSlice` of mapped guest memory whose borrow is held
//! while the addresses exist, and because nothing here makes a Rust reference to those bytes: the
//! guest may change them at any time, and only the kernel touches them.
#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use thiserror::Error;
use vm_memory::bitmap::Bitmap as _;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryError, Permissions};

use super::GuestMemory;

/// Most pieces that one system call takes (UIO_MAXIOV).
pub const MAX_PIECES: usize = 1024;

/// A run of bytes in guest memory, as the guest gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub address: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// Why segments could not be turned into `iovec`s.
#[derive(Debug, Error)]
pub enum Error {
    /// A segment does not lie in guest memory.
    #[error("guest memory at {address:#x}+{len:#x}: {source}")]
    OutOfMemory {
        /// Guest-physical address of the segment.
        address: u64,
        /// Its length in bytes.
        len: u32,
        /// What the memory said.
        source: GuestMemoryError,
    },
    /// More pieces than a system call takes.
    #[error("more than {MAX_PIECES} pieces of guest memory in one request")]
    TooMany,
}

/// Room for `iovec`s, kept between requests so that none of them allocates.
#[derive(Default)]
pub struct IoVecBuffer {
    pieces: Vec<libc::iovec>,
}

// SAFETY: the addresses are left over from earlier requests and never followed: `IoVecs`, which
// does follow them, borrows the buffer and is rebuilt for each request.
unsafe impl Send for IoVecBuffer {}

impl IoVecBuffer {
    /// The bytes of `segments` from `skip` on, at most `limit` of them, for use with `access`.
    ///
    /// # Errors
    /// When a byte asked for is not guest memory, or the pieces are too many.
    pub fn fill<'a, 's>(
        &'a mut self,
        memory: &'a GuestMemory,
        segments: impl IntoIterator<Item = &'s Segment>,
        mut skip: u64,
        limit: u64,
        access: Permissions,
    ) -> Result<IoVecs<'a>, Error> {
        self.pieces.clear();
        let mut left = limit;
        for segment in segments {
            let Some(len) = u64::from(segment.len).checked_sub(skip) else {
                skip = skip.saturating_sub(u64::from(segment.len));
                continue;
            };
            let len = len.min(left);
            if len == 0 {
                skip = 0;
                continue;
            }
            let bad = |source| Error::OutOfMemory {
                address: segment.address.0,
                len: segment.len,
                source,
            };
            let start = segment
                .address
                .0
                .checked_add(skip)
                .ok_or_else(|| bad(GuestMemoryError::GuestAddressOverflow))?;
            skip = 0;
            left = left.saturating_sub(len);
            // `len` came from a u32, so it fits.
            for slice in memory
                .get_slices(GuestAddress(start), len as usize, access)
                .map_err(bad)?
            {
                let slice = slice.map_err(bad)?;
                if access != Permissions::Read {
                    slice.bitmap().mark_dirty(0, slice.len());
                }
                if self.pieces.len() == MAX_PIECES {
                    return Err(Error::TooMany);
                }
                self.pieces.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(IoVecs {
            pieces: &mut self.pieces,
            len: limit.saturating_sub(left),
            memory: PhantomData,
        })
    }
}

impl IoVecBuffer {
    /// The pieces of the last fill, for a kernel that goes on with them after the call returned. Whoever
    /// follows these addresses keeps the memory mapped for as long.
    pub fn raw(&self) -> (*const libc::iovec, u32) {
        // At most `MAX_PIECES`, so the cast loses nothing.
        (self.pieces.as_ptr(), self.pieces.len() as u32)
    }

    /// Leaves out the first `count` bytes of the last fill.
    pub fn advance(&mut self, count: u64) {
        advance(&mut self.pieces, count);
    }
}

/// Pieces of guest memory that a system call reads or fills, and perhaps a last one of our own.
pub struct IoVecs<'a> {
    pieces: &'a mut Vec<libc::iovec>,
    len: u64,
    memory: PhantomData<&'a GuestMemory>,
}

impl<'a> IoVecs<'a> {
    /// Adds `spill` behind the guest's pieces: what does not fit in them is read there.
    ///
    /// # Errors
    /// When the pieces are too many.
    pub fn with_spill(self, spill: &'a mut [u8]) -> Result<Self, Error> {
        if self.pieces.len() == MAX_PIECES {
            return Err(Error::TooMany);
        }
        self.pieces.push(libc::iovec {
            iov_base: spill.as_mut_ptr().cast(),
            iov_len: spill.len(),
        });
        let len = self.len.saturating_add(spill.len() as u64);
        Ok(Self { len, ..self })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Leaves out the first `count` bytes, for the rest of a short read or write.
    pub fn advance(&mut self, count: u64) {
        let count = count.min(self.len);
        self.len = self.len.saturating_sub(count);
        advance(self.pieces, count);
    }

    /// preadv(2): fills guest memory from `file` at `offset`.
    ///
    /// # Errors
    /// What the system call says.
    pub fn read_at(&self, file: BorrowedFd<'_>, offset: i64) -> io::Result<u64> {
        let (pieces, count) = self.raw();
        // SAFETY: the pieces are mapped guest memory (see the module's words) and live as long as
        // `self`; the kernel writes no more than their lengths.
        done(unsafe { libc::preadv(file.as_raw_fd(), pieces, count, offset) })
    }

    /// pwritev(2): writes guest memory to `file` at `offset`.
    ///
    /// # Errors
    /// What the system call says.
    pub fn write_at(&self, file: BorrowedFd<'_>, offset: i64) -> io::Result<u64> {
        let (pieces, count) = self.raw();
        // SAFETY: as for `read_at`; the kernel only reads the pieces.
        done(unsafe { libc::pwritev(file.as_raw_fd(), pieces, count, offset) })
    }

    /// readv(2): fills guest memory from `fd`.
    ///
    /// # Errors
    /// What the system call says.
    pub fn read(&mut self, fd: BorrowedFd<'_>) -> io::Result<u64> {
        let (pieces, count) = self.raw();
        // SAFETY: as for `read_at`; a piece of our own is borrowed as long as `self` is.
        done(unsafe { libc::readv(fd.as_raw_fd(), pieces, count) })
    }

    /// writev(2): writes guest memory to `fd`.
    ///
    /// # Errors
    /// What the system call says.
    pub fn write(&self, fd: BorrowedFd<'_>) -> io::Result<u64> {
        let (pieces, count) = self.raw();
        // SAFETY: as for `write_at`.
        done(unsafe { libc::writev(fd.as_raw_fd(), pieces, count) })
    }

    /// sendmsg(2) with `MSG_DONTWAIT | MSG_NOSIGNAL`: sends guest memory on a socket.
    ///
    /// # Errors
    /// What the system call says; `WouldBlock` when the socket is full.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<u64> {
        let message = self.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: `message` points at the pieces, which live as long as `self`; it has neither
        // an address nor control data.
        done(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) })
    }

    /// recvmsg(2) with `MSG_DONTWAIT`: fills guest memory from a socket.
    ///
    /// # Errors
    /// What the system call says; `WouldBlock` when there is nothing to read.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<u64> {
        let mut message = self.message();
        // SAFETY: as for `send`; the kernel writes no more than the pieces' lengths.
        done(unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
    }

    /// getrandom(2) with `GRND_NONBLOCK`: fills guest memory with random bytes, piece by piece,
    /// and says how many it filled.
    ///
    /// The system call itself, not the C library's function: since glibc 2.41 that one computes the
    /// bytes in this process, in a page that it maps at its first use with every signal blocked. A
    /// sealed thread may not map such a page and would die of it without a word.
    ///
    /// # Errors
    /// When not one byte could be had.
    pub fn fill_random(&mut self) -> io::Result<u64> {
        let mut filled = 0;
        while let Some(piece) = self.pieces.first() {
            // SAFETY: the piece is mapped guest memory of that length (see the module's words), and
            // the kernel writes no more than that.
            let result = done(unsafe {
                libc::syscall(
                    libc::SYS_getrandom,
                    piece.iov_base,
                    piece.iov_len,
                    libc::GRND_NONBLOCK,
                ) as isize
            });
            match result {
                Ok(count) => {
                    filled += count;
                    self.advance(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if filled == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(filled)
    }

    fn raw(&self) -> (*const libc::iovec, libc::c_int) {
        // At most `MAX_PIECES`, so the cast loses nothing.
        (self.pieces.as_ptr(), self.pieces.len() as libc::c_int)
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: all zeros is a valid msghdr: null pointers with zero lengths.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.pieces.as_mut_ptr();
        message.msg_iovlen = self.pieces.len();
        message
    }
}

/// Leaves out the first `count` bytes of `pieces`.
fn advance(pieces: &mut Vec<libc::iovec>, mut count: u64) {
    let mut whole = 0;
    for piece in pieces.iter_mut() {
        let len = piece.iov_len as u64;
        if count < len {
            // SAFETY: `count` is less than the piece's length, so the address stays inside it.
            piece.iov_base = unsafe { piece.iov_base.byte_add(count as usize) };
            piece.iov_len = piece.iov_len.saturating_sub(count as usize);
            break;
        }
        count = count.saturating_sub(len);
        whole += 1;
    }
    pieces.drain(..whole);
}

/// The result of a system call that moves bytes.
pub(crate) fn done(result: isize) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;
    use vm_memory::Bytes as _;

    fn memory() -> GuestMemory {
        // Two regions with a hole, and a seam between two that touch.
        GuestMemory::from_ranges(&[
            (GuestAddress(0), 0x1000),
            (GuestAddress(0x1000), 0x1000),
            (GuestAddress(0x4000), 0x1000),
        ])
        .unwrap()
    }

    fn segment(address: u64, len: u32) -> Segment {
        Segment {
            address: GuestAddress(address),
            len,
        }
    }

    #[test]
    fn splits_skips_and_limits() {
        let memory = memory();
        let mut buffer = IoVecBuffer::default();
        let segments = [segment(0xff0, 0x20), segment(0x4000, 0), segment(0x4000, 8)];
        let all = buffer
            .fill(&memory, &segments, 0, u64::MAX, Permissions::Write)
            .unwrap();
        assert_eq!((all.len(), all.pieces.len()), (0x28, 3));
        for (skip, limit, len, pieces) in [
            (0x20, 100, 8, 1),
            (4, 0xc, 0xc, 1),
            (0x1f, 2, 2, 2),
            (0x28, 9, 0, 0),
            (u64::MAX, 9, 0, 0),
            (0, 0, 0, 0),
        ] {
            let part = buffer
                .fill(&memory, &segments, skip, limit, Permissions::Read)
                .unwrap();
            assert_eq!((part.len(), part.pieces.len()), (len, pieces));
        }
    }

    #[test]
    fn refuses_what_is_not_memory() {
        let memory = memory();
        let mut buffer = IoVecBuffer::default();
        for bad in [
            segment(0x2000, 1),
            segment(0x1fff, 2),
            segment(0x4000, 0x1001),
            segment(u64::MAX, 2),
            segment(0, u32::MAX),
        ] {
            assert!(
                buffer
                    .fill(&memory, &[bad], 0, u64::MAX, Permissions::Read)
                    .is_err(),
                "{bad:?}"
            );
        }
        let many = vec![segment(0, 1); MAX_PIECES + 1];
        assert!(matches!(
            buffer.fill(&memory, &many, 0, u64::MAX, Permissions::Read),
            Err(Error::TooMany)
        ));
    }

    #[test]
    fn moves_bytes_both_ways_and_advances() {
        let memory = memory();
        let mut buffer = IoVecBuffer::default();
        let segments = [segment(0xffe, 4), segment(0x4000, 4)];
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"abcdefgh").unwrap();
        let mut pieces = buffer
            .fill(&memory, &segments, 0, 8, Permissions::Write)
            .unwrap();
        assert_eq!(pieces.receive(theirs.as_fd()).unwrap(), 8);
        assert_eq!(
            pieces.receive(theirs.as_fd()).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        pieces.advance(3);
        assert_eq!(pieces.len(), 5);
        assert_eq!(pieces.send(theirs.as_fd()).unwrap(), 5);
        let mut back = [0; 5];
        ours.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"defgh");
        pieces.advance(u64::MAX);
        assert!(pieces.is_empty());
    }

    #[test]
    fn what_does_not_fit_in_the_guest_is_spilled() {
        let memory = memory();
        let mut buffer = IoVecBuffer::default();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"abcdefgh").unwrap();
        let mut spill = [0; 4];
        let mut pieces = buffer
            .fill(&memory, &[segment(0xffe, 4)], 0, 3, Permissions::Write)
            .unwrap()
            .with_spill(&mut spill)
            .unwrap();
        assert_eq!((pieces.len(), pieces.read(theirs.as_fd()).unwrap()), (7, 7));
        assert_eq!(&spill, b"defg");
        let mut there = [0; 4];
        memory.read_slice(&mut there, GuestAddress(0xffe)).unwrap();
        assert_eq!(&there, b"abc\0");
        let many = vec![segment(0, 1); MAX_PIECES];
        let full = buffer
            .fill(&memory, &many, 0, u64::MAX, Permissions::Write)
            .unwrap();
        assert!(matches!(full.with_spill(&mut spill), Err(Error::TooMany)));
    }

    #[test]
    fn random_bytes_reach_every_piece() {
        let memory = memory();
        let mut buffer = IoVecBuffer::default();
        let segments = [segment(0, 0x2000), segment(0x4000, 64)];
        let mut pieces = buffer
            .fill(&memory, &segments, 0, u64::MAX, Permissions::Write)
            .unwrap();
        assert_eq!(pieces.fill_random().unwrap(), 0x2040);
        let mut tail = [0; 64];
        memory.read_slice(&mut tail, GuestAddress(0x4000)).unwrap();
        assert_ne!(tail, [0; 64]);
    }
}

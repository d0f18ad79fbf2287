//! The `Async` engine: an io_uring that can do nothing but read, write, sync and deallocate one file.
//!
//! It is made before the thread is sealed, disabled (IORING_SETUP_R_DISABLED), restricted
//! (IORING_REGISTER_RESTRICTIONS), and only then enabled: the kernel refuses every other operation,
//! and every file that is not registered with it. The one thing that may be registered later is another
//! file in the place of the first.
//!
//! Unsafe code lives here because the kernel goes on with addresses of guest memory after the call that
//! handed them over has returned. It is sound because a ring keeps a clone of the [`GuestMemory`] that all of
//! them are in, and the room for their `iovec`s, until it has seen the end of every request.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use log::error;
use nix::errno::Errno;
use vm_memory::{GuestAddress, Permissions};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::discard::{Kind, Range};
use super::request::Request;
use super::work::Work;
use crate::memory::GuestMemory;
use crate::memory::iovec::{self, IoVecBuffer, Segment};

/// Most requests in flight. The completion ring has twice as many places, so it never overflows.
pub const SLOTS: u16 = 128;
/// Threads of the kernel that work on what would block, at most: they count as tasks of this process.
const WORKERS: u32 = 4;
/// The place of the disk's file among the registered ones.
const DISK: Fixed = Fixed(0);
/// IORING_REGISTER_FILES_UPDATE (linux/io_uring.h).
const FILES_UPDATE: u8 = 6;

/// What to tell the driver once a request has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The queue that it came from.
    pub queue: u16,
    /// The head of its chain.
    pub head: u16,
    /// Where its status belongs.
    pub status: GuestAddress,
    /// How many bytes before the status are written if it succeeds.
    pub written: u32,
    /// What it is.
    pub work: Work,
}

/// What the kernel is asked to do.
#[derive(Debug)]
pub enum Job<'a> {
    /// Fill `len` bytes of `segments` behind the first `skip` from the disk at `offset`.
    Read {
        segments: &'a [Segment],
        offset: u64,
        len: u64,
    },
    /// Write `len` bytes of `segments` behind the first `skip` to the disk at `offset`.
    Write {
        segments: &'a [Segment],
        skip: u64,
        offset: u64,
        len: u64,
    },
    /// fdatasync(2).
    Sync,
    /// The ranges, one after another.
    Deallocate { kind: Kind, ranges: Vec<Range> },
}

/// Where a slot's request stands.
#[derive(Debug)]
enum State {
    Free,
    Read {
        offset: u64,
        left: u64,
    },
    Write {
        offset: u64,
        left: u64,
    },
    Sync,
    /// The last of the ranges is being worked on.
    Deallocate {
        kind: Kind,
        ranges: Vec<Range>,
    },
}

struct Slot {
    state: State,
    ticket: Ticket,
    pieces: IoVecBuffer,
}

/// A ring and what is in flight on it.
pub struct Ring {
    ring: IoUring,
    file: Arc<File>,
    completed: EventFd,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    /// Where the addresses of everything in flight point; present while anything is.
    memory: Option<GuestMemory>,
}

impl Ring {
    /// A restricted ring for `file`.
    ///
    /// # Errors
    /// When the host has no io_uring or refuses it.
    pub fn new(file: Arc<File>) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(SLOTS.into())?;
        let completed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_eventfd(completed.as_raw_fd())?;
        // A kernel before 5.15 has no such limit, and starts no more of them than it has processors.
        let _ = submitter.register_iowq_max_workers(&mut [WORKERS, 1]);
        submitter.register_restrictions(&mut [
            Restriction::register_op(FILES_UPDATE),
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_allowed(Flags::FIXED_FILE.bits()),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()?;
        let ticket = Ticket {
            queue: 0,
            head: 0,
            status: GuestAddress(0),
            written: 0,
            work: Work::begin(&Request::Flush),
        };
        let slot = |_| Slot {
            state: State::Free,
            ticket,
            pieces: IoVecBuffer::default(),
        };
        Ok(Self {
            ring,
            file,
            completed,
            slots: (0..SLOTS).map(slot).collect(),
            free: (0..SLOTS).collect(),
            memory: None,
        })
    }

    /// Readable when requests have ended.
    pub fn completed(&self) -> &EventFd {
        &self.completed
    }

    /// Whether a further request has room.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Requests that have not ended yet.
    pub fn in_flight(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// Works on guest memory `memory` from now on. Nothing is in flight.
    pub fn start(&mut self, memory: GuestMemory) {
        debug_assert_eq!(self.in_flight(), 0);
        self.memory = Some(memory);
    }

    /// Puts a request in the ring; [`Ring::submit`] hands it to the kernel.
    ///
    /// # Errors
    /// When a segment is not guest memory. Only called while there is room.
    pub fn push(&mut self, job: Job<'_>, ticket: Ticket) -> Result<(), PushError> {
        let memory = self.memory.as_ref().ok_or(PushError::Full)?;
        let index = self.free.pop().ok_or(PushError::Full)?;
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return Err(PushError::Full);
        };
        slot.ticket = ticket;
        let fill = |pieces: &mut IoVecBuffer, segments, skip, len, access| {
            let filled = pieces.fill(memory, segments, skip, len, access);
            filled.map(|_| ()).map_err(PushError::Memory)
        };
        let state = match job {
            Job::Read {
                segments,
                offset,
                len,
            } => fill(&mut slot.pieces, segments, 0, len, Permissions::Write)
                .map(|()| State::Read { offset, left: len }),
            Job::Write {
                segments,
                skip,
                offset,
                len,
            } => fill(&mut slot.pieces, segments, skip, len, Permissions::Read)
                .map(|()| State::Write { offset, left: len }),
            Job::Sync => Ok(State::Sync),
            Job::Deallocate { kind, ranges } => Ok(State::Deallocate { kind, ranges }),
        };
        match state {
            Ok(state) => {
                slot.state = state;
                self.enqueue(index);
                Ok(())
            }
            Err(error) => {
                self.free.push(index);
                Err(error)
            }
        }
    }

    /// Writes the submission entry for what slot `index` wants next.
    fn enqueue(&mut self, index: u16) {
        let Some(slot) = self.slots.get(usize::from(index)) else {
            return;
        };
        let (pieces, count) = slot.pieces.raw();
        let entry: squeue::Entry = match &slot.state {
            State::Free => return,
            State::Read { offset, .. } => opcode::Readv::new(DISK, pieces, count)
                .offset(*offset)
                .build(),
            State::Write { offset, .. } => opcode::Writev::new(DISK, pieces, count)
                .offset(*offset)
                .build(),
            State::Sync => opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build(),
            State::Deallocate { kind, ranges } => {
                let Some(range) = ranges.last() else { return };
                let (offset, len) = range.place();
                opcode::Fallocate::new(DISK, len)
                    .offset(offset)
                    .mode(range.mode(*kind).bits())
                    .build()
            }
        };
        let entry = entry.user_data(index.into());
        // SAFETY: the pieces point into `self.memory`, which stays until `drain` has seen the end of this
        // request, and the list of them is not touched before its completion is reaped. The other
        // operations have no pointers.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // There are as many places as slots, and a slot has one entry in the ring at a time.
        debug_assert!(pushed.is_ok());
    }

    /// Hands to the kernel what was pushed.
    ///
    /// # Errors
    /// When it takes none for lack of memory; what was pushed stays, for the next call.
    pub fn submit(&self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
    }

    /// Takes what has ended since the last call and hands it to `finish`, with the error of what failed.
    /// Pushes again what ended halfway: true then, and [`Ring::submit`] must follow.
    pub fn reap(&mut self, mut finish: impl FnMut(Ticket, io::Result<()>)) -> bool {
        // Nothing to read is fine: an earlier call may have seen the completions.
        let _ = self.completed.read();
        let mut again = false;
        // No more at once than fit in the ring, so that this ends whatever the kernel adds meanwhile.
        for _ in 0..SLOTS {
            let Some(entry) = self.ring.completion().next() else {
                break;
            };
            let index = entry.user_data() as u16;
            let Some(slot) = self.slots.get_mut(usize::from(index)) else {
                continue;
            };
            match slot.advance(entry.result(), &self.file) {
                Some(result) => {
                    slot.state = State::Free;
                    self.free.push(index);
                    finish(slot.ticket, result);
                }
                None => {
                    self.enqueue(index);
                    again = true;
                }
            }
        }
        again
    }

    /// Waits until nothing is in flight; then lets go of the guest's memory.
    pub fn drain(&mut self, mut finish: impl FnMut(Ticket, io::Result<()>)) {
        while self.in_flight() > 0 {
            match self.ring.submit_and_wait(1).map_err(|e| e.raw_os_error()) {
                // Out of memory, or the kernel wants completions taken first.
                Ok(_) | Err(Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM)) => {}
                Err(code) => {
                    // It cannot be for a ring of ours. The kernel may still write to the memory: keep it mapped
                    // for good rather than wait for ever.
                    error!("block: the host does not finish its requests (errno {code:?})");
                    std::mem::forget(self.memory.take());
                    return;
                }
            }
            self.reap(&mut finish);
        }
        self.memory = None;
    }

    /// Works on `file` from now on. Nothing is in flight.
    ///
    /// # Errors
    /// When the kernel refuses; the old file stays.
    pub fn replace(&mut self, file: Arc<File>) -> io::Result<()> {
        debug_assert_eq!(self.in_flight(), 0);
        self.ring
            .submitter()
            .register_files_update(DISK.0, &[file.as_raw_fd()])?;
        self.file = file;
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.drain(|_, _| {});
    }
}

/// Why a request was not put in the ring.
#[derive(Debug)]
pub enum PushError {
    /// There is no room, or the ring does not run.
    Full,
    /// Its buffers are not guest memory.
    Memory(#[allow(dead_code, reason = "for those who debug")] iovec::Error),
}

impl Slot {
    /// Takes the result of an operation. None when another one must follow.
    fn advance(&mut self, result: i32, file: &File) -> Option<io::Result<()>> {
        let result = match Errno::from_raw(result.saturating_neg()) {
            _ if result >= 0 => Ok(result as u64),
            // The kernel had no thread or no memory for it just now, or a signal came: do it here.
            Errno::EAGAIN | Errno::EINTR | Errno::ECANCELED => self.perform(file),
            errno => Err(errno.into()),
        };
        match (&mut self.state, result) {
            (State::Deallocate { kind, ranges }, result) => {
                let range = ranges.pop()?;
                let result = match result {
                    Err(error) => range.without_help(*kind, file, error),
                    Ok(_) => Ok(()),
                };
                match result {
                    Ok(()) if !ranges.is_empty() => None,
                    result => Some(result),
                }
            }
            (_, Err(error)) => Some(Err(error)),
            (State::Read { offset, left } | State::Write { offset, left }, Ok(count)) => {
                *left = left.saturating_sub(count);
                *offset = offset.saturating_add(count);
                self.pieces.advance(count);
                match count {
                    _ if *left == 0 => Some(Ok(())),
                    // The file became shorter than the disk.
                    0 => Some(Err(io::ErrorKind::UnexpectedEof.into())),
                    _ => None,
                }
            }
            (State::Free | State::Sync, Ok(_)) => Some(Ok(())),
        }
    }

    /// Does what the ring did not.
    fn perform(&self, file: &File) -> io::Result<u64> {
        let (pieces, count) = self.pieces.raw();
        let (fd, count) = (file.as_raw_fd(), count as libc::c_int);
        match &self.state {
            State::Free => Ok(0),
            State::Read { offset, .. } => {
                // SAFETY: the pieces lie in the memory that the ring keeps while this slot is in use; the kernel
                // writes no more than their lengths. An offset in a disk fits an i64.
                iovec::done(unsafe { libc::preadv(fd, pieces, count, *offset as i64) })
            }
            State::Write { offset, .. } => {
                // SAFETY: as above; the kernel only reads the pieces.
                iovec::done(unsafe { libc::pwritev(fd, pieces, count, *offset as i64) })
            }
            State::Sync => file.sync_data().map(|()| 0),
            State::Deallocate { kind, ranges } => match ranges.last() {
                Some(range) => range.apply(*kind, file).map(|()| 0),
                None => Ok(0),
            },
        }
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;

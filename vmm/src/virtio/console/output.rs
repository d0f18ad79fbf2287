//! What the guest says, on its way to standard output.
//!
//! The device thread serves every device and may not wait for a reader; a write to standard output
//! may. So bytes go through a buffer of fixed size, which a thread of its own empties. When nobody
//! has taken anything for [`STALLED`], the device drops what does not fit: a driver waits for its
//! buffers with interrupts off (Linux does), and a reader that went away must not stop the guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most bytes that wait.
pub const CAPACITY: usize = 64 << 10;
/// After this long without a byte taken, nobody reads.
pub const STALLED: Duration = Duration::from_millis(100);
/// How long the end of a machine waits for a reader that is slow.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Bytes written at once.
const PIECE: usize = 4096;

struct State {
    buffer: VecDeque<u8>,
    /// Bytes that the thread is writing: they take up room until they are written.
    in_flight: usize,
    /// When the reader last took something, or the first of what waits now came.
    moved: Instant,
    /// The device waits for room.
    wanted: bool,
}

impl State {
    fn waiting(&self) -> usize {
        self.buffer.len().saturating_add(self.in_flight)
    }
}

/// The buffer, shared by the device and the thread that empties it.
pub struct Output {
    state: Mutex<State>,
    /// There are bytes to write, or all have been written.
    changed: Condvar,
    room: EventFd,
}

impl Output {
    /// An empty buffer.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                buffer: VecDeque::with_capacity(CAPACITY),
                in_flight: 0,
                moved: Instant::now(),
                wanted: false,
            }),
            changed: Condvar::new(),
            room: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when there is room again after [`Output::push`] did not take all.
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    /// Takes the first of `bytes`, as many as there is room for, and says how many. Never waits.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        if state.waiting() == 0 {
            state.moved = Instant::now();
        }
        let room = CAPACITY.saturating_sub(state.waiting());
        let (taken, left) = bytes.split_at_checked(room).unwrap_or((bytes, &[]));
        state.buffer.extend(taken);
        state.wanted |= !left.is_empty();
        drop(state);
        self.changed.notify_all();
        taken.len()
    }

    /// From when on what finds no room is dropped, unless something is taken before.
    pub fn patience(&self) -> Instant {
        let moved = self.lock().moved;
        moved.checked_add(STALLED).unwrap_or(moved)
    }

    /// The body of the thread: gives everything to `write`, which may wait. What it refuses is lost.
    pub fn run(&self, mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> ! {
        let mut piece = [0; PIECE];
        loop {
            let taken = self.take(&mut piece);
            let mut rest = piece.get(..taken).unwrap_or_default();
            while !rest.is_empty() {
                let written = match write(rest) {
                    // Nobody takes it, now or later.
                    Ok(0) | Err(_) => rest.len(),
                    Ok(count) => count,
                };
                rest = rest.get(written..).unwrap_or_default();
                self.moved(written);
            }
        }
    }

    /// Waits for bytes and moves some to `piece`.
    fn take(&self, piece: &mut [u8]) -> usize {
        let mut state = self.lock();
        while state.buffer.is_empty() {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let count = state.buffer.len().min(piece.len());
        for (to, from) in piece.iter_mut().zip(state.buffer.drain(..count)) {
            *to = from;
        }
        state.in_flight = count;
        count
    }

    /// So many of the bytes in flight have been written.
    fn moved(&self, count: usize) {
        let mut state = self.lock();
        state.in_flight = state.in_flight.saturating_sub(count);
        state.moved = Instant::now();
        let wanted = std::mem::take(&mut state.wanted);
        let empty = state.waiting() == 0;
        drop(state);
        if wanted {
            // A full counter wakes the device as well.
            let _ = self.room.write(1);
        }
        if empty {
            self.changed.notify_all();
        }
    }

    /// Waits until all has been written: the machine has ended. Gives up on a reader that takes nothing
    /// for [`STALLED`].
    pub fn finish(&self) {
        let began = Instant::now();
        let mut state = self.lock();
        while state.waiting() > 0 {
            let left = STALLED.saturating_sub(state.moved.max(began).elapsed());
            if left.is_zero() || began.elapsed() > LAST_WORDS {
                return;
            }
            let result = self.changed.wait_timeout(state, left);
            state = result.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Writes to standard output, past the standard library's lock and buffer; waits as long as it takes.
///
/// # Errors
/// When nobody will read it any more.
pub fn to_stdout(bytes: &[u8]) -> io::Result<usize> {
    let stdout = io::stdout();
    loop {
        match nix::unistd::write(stdout.as_fd(), bytes) {
            Err(Errno::EINTR) => {}
            // Whoever passed it may have made it non-blocking.
            Err(Errno::EAGAIN) => {
                let mut ready = [PollFd::new(stdout.as_fd(), PollFlags::POLLOUT)];
                match poll(&mut ready, PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            result => return Ok(result?),
        }
    }
}

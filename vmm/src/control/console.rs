//! From standard input to the guest's console: the virtio one, or the serial port.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::termios::{
    InputFlags, LocalFlags, OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr,
};
use rustix::termios::tcgetwinsize;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::devices::serial::Offer;
use crate::virtio::console::Size;

/// Bytes read at once: as many as the serial port's FIFO holds.
const CHUNK: usize = 64;
/// How often that is done before the rest of the control thread's work gets its turn: a file is always ready, and the
/// guest may take it as fast as it is read.
const BUDGET: usize = 1024;

/// The terminal as it was before it became raw.
static TERMINAL: Mutex<Option<Termios>> = Mutex::new(None);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// Can be waited for, and is being.
    Watched,
    /// Can be waited for, and is not while input waits for the guest.
    Idle,
    /// A regular file, say: always has something, until its end.
    Always,
    /// Has nothing any more.
    Closed,
}

/// What was typed and not yet taken.
pub struct Input {
    source: Source,
    pending: Vec<u8>,
}

impl Input {
    /// Standard input; if it is a terminal, it becomes raw.
    pub fn new() -> Self {
        make_raw();
        Self {
            source: Source::Idle,
            pending: Vec::with_capacity(CHUNK),
        }
    }

    /// Moves what there is to whom `offer` offers it, and waits for more in `epoll` once there is room.
    /// Returns whether this is to be called again soon: the port was in use, or there is very much.
    pub fn pump(&mut self, offer: impl Fn(&[u8]) -> Offer, epoll: &Epoll, data: u64) -> bool {
        let mut reads = 0;
        loop {
            if self.pending.is_empty() {
                match self.source {
                    Source::Always if reads == BUDGET => return true,
                    Source::Always => {
                        reads = reads.saturating_add(1);
                        self.read(epoll);
                    }
                    Source::Idle => {
                        let event = EpollEvent::new(EventSet::IN, data);
                        self.source = match epoll.ctl(ControlOperation::Add, stdin(), event) {
                            Ok(()) => Source::Watched,
                            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                                Source::Always
                            }
                            // Not open at all.
                            Err(_) => Source::Closed,
                        };
                    }
                    Source::Watched | Source::Closed => return false,
                }
                continue;
            }
            match offer(&self.pending) {
                Offer::Taken(count) => {
                    self.pending.drain(..count.min(self.pending.len()));
                }
                Offer::Full => return false,
                Offer::Busy => return true,
            }
        }
    }

    /// Reads what there is, and stops watching: there is no more room before the guest took it.
    pub fn read(&mut self, epoll: &Epoll) {
        let mut chunk = [0; CHUNK];
        let count = match nix::unistd::read(io::stdin(), &mut chunk) {
            Err(Errno::EINTR | Errno::EAGAIN) => return,
            // The terminal hung up, or is another job's.
            Err(_) => 0,
            Ok(count) => count,
        };
        if self.source == Source::Watched {
            let event = EpollEvent::default();
            // It is watched, so this does not fail.
            let _ = epoll.ctl(ControlOperation::Delete, stdin(), event);
            self.source = Source::Idle;
        }
        if count == 0 {
            self.source = Source::Closed;
        }
        self.pending
            .extend_from_slice(chunk.get(..count).unwrap_or_default());
    }
}

/// The size of the terminal on standard output, or else on standard input; zeroes without one.
pub fn terminal_size() -> Size {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin()));
    size.map_or(Size::default(), |size| Size {
        columns: size.ws_col,
        rows: size.ws_row,
    })
}

fn stdin() -> i32 {
    io::stdin().as_raw_fd()
}

/// Every key goes to the guest as it is, except those that make signals: Ctrl-C is for us.
fn make_raw() {
    let Ok(before) = tcgetattr(io::stdin()) else {
        return;
    };
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    raw.local_flags.insert(LocalFlags::ISIG);
    raw.input_flags.insert(InputFlags::BRKINT);
    // The guest's lines may end with a bare newline.
    raw.output_flags.insert(OutputFlags::OPOST);
    if tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).is_ok()
        && let Ok(mut slot) = TERMINAL.lock()
    {
        *slot = Some(before);
    }
}

/// Gives a terminal its settings back.
pub fn restore_terminal() {
    if let Ok(mut slot) = TERMINAL.lock()
        && let Some(before) = slot.take()
    {
        // Nothing can be done about a terminal that has gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &before);
    }
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;

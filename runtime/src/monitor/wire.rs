//! What `run` and its monitor tell each other, over one `SOCK_SEQPACKET` socket pair.
//!
//! The first packet is the [`Setup`], as JSON. All others have five bytes: kind and a number. `run` trusts nothing
//! that the monitor says once the guest runs, so there is nothing in its answers but small numbers.

use std::os::fd::{AsRawFd, BorrowedFd};

use casemate_init::protocol::{Identity, Spec};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use serde::{Deserialize, Serialize};

/// Greatest size of a [`Setup`] packet.
pub const MAX_SETUP: usize = 192 * 1024;

/// How the monitor is to behave.
#[derive(Debug, Serialize, Deserialize)]
pub struct Setup {
    /// User id and group id to become.
    pub uid: u32,
    /// What to send to the guest's init; none with a bare kernel.
    pub spec: Option<Spec>,
    /// Who the guest is from now on: it goes on from a snapshot.
    pub identity: Option<Identity>,
    /// What each line of its output begins with.
    pub prefix: Option<String>,
    /// Show the guest's console.
    pub console: ConsoleMode,
    /// Go on where the kernel has no Landlock.
    pub allow_missing_landlock: bool,
}

/// What becomes of the guest's console.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleMode {
    /// Only its end is kept, to be shown if the guest fails.
    Tail,
    /// It is shown on standard error.
    Stderr,
    /// It is the guest's standard input and output.
    Stdio,
}

/// `run` to monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Answer the guest's [`Event::Ready`]: the command may start.
    Go,
    /// Send the command this signal.
    Signal(u32),
    /// The terminal has a new size.
    Resize {
        /// Rows of text.
        rows: u16,
        /// Columns of text.
        cols: u16,
    },
    /// The VMM ended: pass on what there is and end.
    Finish {
        /// Show the end of the log: something failed.
        show_log: bool,
        /// Show the end of the console: the guest failed.
        show_console: bool,
    },
}

/// Monitor to `run`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Sealed, and waiting for the guest.
    Sealed,
    /// A bare kernel wrote its first byte to the console.
    Output,
    /// The guest's init is ready, and waits for [`Order::Go`].
    Ready,
    /// The command exited with this code.
    Exited(u8),
    /// The command was ended by this signal.
    Signaled(u8),
    /// The command could not be run, with the exit code that says so.
    Failed(u8),
    /// The guest broke the protocol, or off, before the command ended.
    Broken,
}

type Packet = [u8; 5];

fn packet(kind: u8, value: u32) -> Packet {
    let [a, b, c, d] = value.to_le_bytes();
    [kind, a, b, c, d]
}

fn unpack(packet: &[u8]) -> Option<(u8, u32)> {
    let [kind, a, b, c, d] = packet.try_into().ok()?;
    Some((kind, u32::from_le_bytes([a, b, c, d])))
}

impl Order {
    fn encode(self) -> Packet {
        match self {
            Self::Go => packet(0, 0),
            Self::Signal(number) => packet(1, number),
            Self::Resize { rows, cols } => packet(2, u32::from(rows) << 16 | u32::from(cols)),
            Self::Finish {
                show_log,
                show_console,
            } => packet(3, u32::from(show_log) | u32::from(show_console) << 1),
        }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        Some(match unpack(bytes)? {
            (0, _) => Self::Go,
            (1, number) => Self::Signal(number),
            (2, size) => Self::Resize {
                rows: u16::try_from(size >> 16).ok()?,
                cols: u16::try_from(size & 0xffff).ok()?,
            },
            (3, show) => Self::Finish {
                show_log: show & 1 != 0,
                show_console: show & 2 != 0,
            },
            _ => return None,
        })
    }
}

impl Event {
    fn encode(self) -> Packet {
        match self {
            Self::Sealed => packet(1, 0),
            Self::Ready => packet(2, 0),
            Self::Exited(code) => packet(3, code.into()),
            Self::Signaled(signal) => packet(4, signal.into()),
            Self::Failed(code) => packet(5, code.into()),
            Self::Broken => packet(6, 0),
            Self::Output => packet(7, 0),
        }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (kind, value) = unpack(bytes)?;
        let small = u8::try_from(value).ok()?;
        Some(match kind {
            1 => Self::Sealed,
            2 => Self::Ready,
            3 => Self::Exited(small),
            4 => Self::Signaled(small),
            5 => Self::Failed(small),
            6 => Self::Broken,
            7 => Self::Output,
            _ => return None,
        })
    }
}

/// What came over the socket.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<T> {
    /// A packet.
    Packet(T),
    /// Nothing now.
    Nothing,
    /// The other side is gone, or sent what it may not.
    Closed,
}

fn receive<T>(socket: BorrowedFd<'_>, decode: impl FnOnce(&[u8]) -> Option<T>) -> Received<T> {
    // One more than a packet has, so that a longer one is noticed.
    let mut buffer = [0; 6];
    match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
        Ok(length) => buffer
            .get(..length)
            .and_then(decode)
            .map_or(Received::Closed, Received::Packet),
        Err(Errno::EAGAIN | Errno::EINTR) => Received::Nothing,
        Err(_) => Received::Closed,
    }
}

fn transmit(socket: BorrowedFd<'_>, packet: Packet) -> Result<(), Errno> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    send(socket.as_raw_fd(), &packet, flags).map(drop)
}

/// Gives an order. A monitor that takes none (gone, or its queue full) is noticed by its end.
pub fn order(socket: BorrowedFd<'_>, order: Order) {
    let _ = transmit(socket, order.encode());
}

/// Reports an event. There are so few that the queue cannot be full.
pub fn report(socket: BorrowedFd<'_>, event: Event) {
    let _ = transmit(socket, event.encode());
}

/// The next order, for the monitor.
pub fn next_order(socket: BorrowedFd<'_>) -> Received<Order> {
    receive(socket, Order::decode)
}

/// The next event, for `run`.
pub fn next_event(socket: BorrowedFd<'_>) -> Received<Event> {
    receive(socket, Event::decode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_survive() {
        for order in [
            Order::Go,
            Order::Signal(15),
            Order::Resize {
                rows: 50,
                cols: 65535,
            },
            Order::Finish {
                show_log: true,
                show_console: false,
            },
            Order::Finish {
                show_log: false,
                show_console: true,
            },
        ] {
            assert_eq!(Order::decode(&order.encode()), Some(order));
        }
        for event in [
            Event::Sealed,
            Event::Ready,
            Event::Exited(255),
            Event::Signaled(9),
            Event::Failed(127),
            Event::Broken,
            Event::Output,
        ] {
            assert_eq!(Event::decode(&event.encode()), Some(event));
        }
    }

    #[test]
    fn hostile_packets_are_refused() {
        for bad in [
            &[][..],
            &[1],
            &[0, 0, 0, 0, 0],
            &[8, 0, 0, 0, 0],
            &[3, 0, 1, 0, 0],
            &[3, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(Event::decode(bad), None, "{bad:?}");
        }
    }
}

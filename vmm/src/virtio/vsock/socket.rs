//! The host's sockets: never waiting, never raising SIGPIPE, and only by the calls that the sealed
//! device thread may make: recvmsg(2) and sendmsg(2).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg, sendmsg};

/// Sends what the socket takes of `parts`.
///
/// # Errors
/// `EAGAIN` when it takes nothing now, `EPIPE` when the other side is gone.
pub fn send(socket: &impl AsRawFd, parts: [&[u8]; 2]) -> Result<usize, Errno> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let parts = parts.map(IoSlice::new);
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &parts, &[], flags, None) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Receives what there is, at most a whole `buffer`; zero when the other side is gone.
///
/// # Errors
/// `EAGAIN` when there is nothing now.
pub fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    receive_with(socket, buffer, MsgFlags::MSG_DONTWAIT)
}

/// As [`receive`], but leaves in the socket what it gives.
///
/// # Errors
/// `EAGAIN` when there is nothing now.
pub fn peek(socket: &impl AsRawFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    receive_with(socket, buffer, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK)
}

fn receive_with(socket: &impl AsRawFd, buffer: &mut [u8], flags: MsgFlags) -> Result<usize, Errno> {
    loop {
        let mut parts = [IoSliceMut::new(buffer)];
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, None, flags) {
            Err(Errno::EINTR) => {}
            result => return result.map(|message| message.bytes),
        }
    }
}

//! What is at either end of a machine's way: a socket, or one with TLS on it. Nothing here waits.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};

/// One end.
pub trait End: AsFd {
    /// Takes what has come: 0 when it has ended. `WouldBlock` when nothing has.
    fn receive(&mut self, room: &mut [u8]) -> io::Result<usize>;
    /// Gives bytes, and says how many were taken. `WouldBlock` when none are.
    fn send(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Passes on what it keeps, and says whether that is all.
    fn flush(&mut self) -> io::Result<bool>;
    /// Says that nothing more comes.
    fn finish(&mut self);
}

/// A stream socket.
pub struct Socket(OwnedFd);

impl Socket {
    /// Over a connection.
    pub fn new(connection: impl Into<OwnedFd>) -> Self {
        Self(connection.into())
    }

    /// Ends one direction, or both.
    pub fn shut(&self, how: Shutdown) {
        // It has gone already, or else this succeeds.
        let _ = shutdown(self.0.as_raw_fd(), how);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn again(mut call: impl FnMut() -> nix::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return Ok(result?),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        again(|| recv(self.0.as_raw_fd(), room, MsgFlags::MSG_DONTWAIT))
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        again(|| send(self.0.as_raw_fd(), bytes, flags))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl End for Socket {
    fn receive(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.read(room)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.write(bytes)? {
            0 => Err(ErrorKind::WriteZero.into()),
            count => Ok(count),
        }
    }

    fn flush(&mut self) -> io::Result<bool> {
        Ok(true)
    }

    fn finish(&mut self) {
        // What it was given stays to be read. What it gives from now on is refused, or it would never look.
        self.shut(Shutdown::Both);
    }
}

//! gdb's connection: bytes in both directions, some at a time.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use gdbstub::conn::Connection;

/// What is read at a time.
const CHUNK: usize = 4096;

/// A connection. It blocks: its thread has nothing to do for a debugger that does not read.
pub struct Client {
    /// The socket, which reads and writes as a file does: the thread has no other calls.
    socket: File,
    input: Vec<u8>,
    taken: usize,
    output: Vec<u8>,
}

impl Client {
    /// Of a socket that blocks.
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket: OwnedFd::from(socket).into(),
            input: Vec::new(),
            taken: 0,
            output: Vec::new(),
        }
    }

    /// Whether there is a byte that needs no waiting for.
    pub fn has_input(&self) -> bool {
        self.taken < self.input.len()
    }

    /// The next byte.
    ///
    /// # Errors
    /// When the socket fails, or there is none any more.
    pub fn next(&mut self) -> io::Result<u8> {
        if !self.has_input() {
            self.input.resize(CHUNK, 0);
            let count = self.socket.read(&mut self.input)?;
            self.input.truncate(count);
            self.taken = 0;
        }
        let byte = self.input.get(self.taken).copied();
        self.taken = self.taken.saturating_add(1);
        byte.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection for Client {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.output.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let sent = self.socket.write_all(&self.output);
        self.output.clear();
        sent
    }
}

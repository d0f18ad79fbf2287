//! A standard stream that is written to without ever waiting.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::unistd::write;

/// Bytes waiting to be written above which no more should be taken from the guest.
pub const HIGH_WATER: usize = 256 * 1024;
/// A pipe that is ready takes so many bytes without waiting (`PIPE_BUF`).
const CHUNK: usize = 4096;

/// One direction out.
#[derive(Debug)]
pub struct Sink<F> {
    fd: F,
    pending: Vec<u8>,
    start: usize,
    broken: bool,
}

/// What came of writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flushed {
    /// All right, even if not all was written.
    Fine,
    /// Nobody reads any more; reported once.
    Broke,
}

impl<F: AsFd> Sink<F> {
    /// Writes to this descriptor.
    pub fn new(fd: F) -> Self {
        Self {
            fd,
            pending: Vec::new(),
            start: 0,
            broken: false,
        }
    }

    /// Queues bytes; they are dropped when nobody reads any more.
    pub fn push(&mut self, bytes: &[u8]) {
        if !self.broken {
            self.pending.extend_from_slice(bytes);
        }
    }

    /// True when there is something to write.
    pub fn is_waiting(&self) -> bool {
        !self.pending.is_empty()
    }

    /// True when no more should be queued for now.
    pub fn is_full(&self) -> bool {
        self.pending.len() >= HIGH_WATER
    }

    /// Writes one chunk; to be called when the descriptor is ready.
    pub fn flush(&mut self) -> Flushed {
        let rest = self.pending.get(self.start..).unwrap_or_default();
        let chunk = rest.get(..CHUNK).unwrap_or(rest);
        match write(self.fd.as_fd(), chunk) {
            Ok(written) => {
                self.start = self.start.saturating_add(written);
                if self.start >= self.pending.len() {
                    self.pending.clear();
                    self.start = 0;
                } else if self.start >= HIGH_WATER {
                    self.pending.drain(..self.start);
                    self.start = 0;
                }
                Flushed::Fine
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Flushed::Fine,
            Err(_) => {
                self.broken = true;
                self.pending = Vec::new();
                self.start = 0;
                Flushed::Broke
            }
        }
    }

    /// What to wait on.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn all_bytes_arrive_in_order() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut sink = Sink::new(writer);
        let data: Vec<u8> = (0..20_000u32).flat_map(u32::to_le_bytes).collect();
        sink.push(&data);
        let mut got = Vec::new();
        while sink.is_waiting() {
            assert_eq!(sink.flush(), Flushed::Fine);
            let mut buffer = [0; CHUNK];
            let count = reader.read(&mut buffer).unwrap();
            got.extend_from_slice(&buffer[..count]);
        }
        drop(sink);
        reader.read_to_end(&mut got).unwrap();
        assert_eq!(got, data);
    }

    #[test]
    fn a_closed_reader_is_reported_and_costs_nothing() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut sink = Sink::new(writer);
        sink.push(b"x");
        assert_eq!(sink.flush(), Flushed::Broke);
        sink.push(b"y");
        assert!(!sink.is_waiting());
    }
}

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
    lines: Option<Lines>,
}

/// Makes whole lines of a stream, each with a prefix: several machines may write to one descriptor.
#[derive(Debug)]
struct Lines {
    prefix: Vec<u8>,
    /// What of a line has come.
    begun: Vec<u8>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        // One that is longer is cut, so that a line is written at once.
        let room = CHUNK.saturating_sub(self.prefix.len()).saturating_sub(1);
        for byte in bytes {
            if *byte == b'\n' || self.begun.len() >= room {
                self.end(out);
            }
            if *byte != b'\n' {
                self.begun.push(*byte);
            }
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.prefix);
        out.append(&mut self.begun);
        out.push(b'\n');
    }
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
            lines: None,
        }
    }

    /// Writes whole lines alone, at once each, that begin with `prefix` and a tab, if there is one.
    #[must_use]
    pub fn with_prefix(mut self, prefix: Option<&str>) -> Self {
        self.lines = prefix.map(|prefix| Lines {
            // A machine's id, or none that would be seen.
            prefix: format!("{prefix:.64}\t").into_bytes(),
            begun: Vec::new(),
        });
        self
    }

    /// The stream has ended: what of a line has come is one.
    pub fn end_line(&mut self) {
        if let Some(lines) = &mut self.lines
            && !lines.begun.is_empty()
            && !self.broken
        {
            lines.end(&mut self.pending);
        }
    }

    /// Queues bytes; they are dropped when nobody reads any more.
    pub fn push(&mut self, bytes: &[u8]) {
        match &mut self.lines {
            _ if self.broken => {}
            Some(lines) => lines.push(bytes, &mut self.pending),
            None => self.pending.extend_from_slice(bytes),
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
        let mut chunk = rest.get(..CHUNK).unwrap_or(rest);
        if self.lines.is_some() {
            let last = chunk.iter().rposition(|byte| *byte == b'\n');
            let whole = last.map_or(chunk.len(), |last| last.saturating_add(1));
            chunk = chunk.get(..whole).unwrap_or(chunk);
        }
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
    fn lines_have_a_prefix_and_are_written_at_once() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut sink = Sink::new(writer).with_prefix(Some("m1"));
        sink.push(b"one\ntw");
        sink.push(b"o\n\n");
        sink.push(&vec![b'x'; 2 * CHUNK]);
        sink.push(b"\nlast");
        sink.end_line();
        sink.end_line();
        let mut all = String::new();
        while sink.is_waiting() {
            assert_eq!(sink.flush(), Flushed::Fine);
            let mut buffer = [0; CHUNK];
            let count = reader.read(&mut buffer).unwrap();
            let text = str::from_utf8(&buffer[..count]).unwrap();
            assert!(text.starts_with("m1\t") && text.ends_with('\n'), "{text}");
            all.push_str(text);
        }
        let lines: Vec<_> = all.lines().collect();
        assert!(
            lines.iter().all(|line| line.starts_with("m1\t")),
            "{lines:?}"
        );
        assert_eq!(&lines[..3], ["m1\tone", "m1\ttwo", "m1\t"]);
        assert_eq!(lines.last(), Some(&"m1\tlast"));
        assert_eq!(all.matches('x').count(), 2 * CHUNK);
        assert_eq!(lines.len(), 7);
    }

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

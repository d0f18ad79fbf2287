//! A program on the host that says which of the guest's ports it wants: `CONNECT <port>\n`.

use std::os::unix::net::UnixStream;

use nix::errno::Errno;

use super::socket;

/// Longer lines are not read to their end; the longest valid one has 19 bytes.
const MAX_LINE: usize = 32;

/// A connection whose line is not complete yet.
pub struct Handshake {
    stream: UnixStream,
    line: [u8; MAX_LINE],
    len: usize,
}

/// How far it came.
pub enum Progress {
    /// The rest of the line is missing.
    Waiting(Handshake),
    /// It wants this port. What follows the line is still in the socket.
    Port(UnixStream, u32),
    /// The line is none, or the program is gone.
    Failed(UnixStream),
}

impl Handshake {
    /// One that nothing was read from.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: [0; MAX_LINE],
            len: 0,
        }
    }

    /// Reads up to the end of the line, and not a byte further: what follows is for the guest.
    pub fn proceed(mut self) -> Progress {
        loop {
            let room = self.line.get_mut(self.len..).unwrap_or_default();
            if room.is_empty() {
                return Progress::Failed(self.stream);
            }
            let seen = match socket::peek(&self.stream, room) {
                Err(Errno::EAGAIN) => return Progress::Waiting(self),
                Ok(0) | Err(_) => return Progress::Failed(self.stream),
                Ok(seen) => room.get_mut(..seen).unwrap_or_default(),
            };
            let end = seen.iter().position(|&byte| byte == b'\n');
            let count = end.map_or(seen.len(), |end| end.saturating_add(1));
            // It reads what was just seen, so it reads all of it.
            let part = seen.get_mut(..count).unwrap_or_default();
            if socket::receive(&self.stream, part) != Ok(count) {
                return Progress::Failed(self.stream);
            }
            self.len = self.len.saturating_add(count);
            if end.is_some() {
                let line = self.line.get(..self.len).unwrap_or_default();
                return match parse(line) {
                    Some(port) => Progress::Port(self.stream, port),
                    None => Progress::Failed(self.stream),
                };
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (word, port) = (words.next()?, words.next()?);
    if !word.eq_ignore_ascii_case("connect") || words.next().is_some() {
        return None;
    }
    // `parse` alone would take a plus sign. All ones is no port but a wildcard.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    port.parse().ok().filter(|&port| port != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    #[test]
    fn understands_one_line_and_nothing_else() {
        assert_eq!(parse(b"CONNECT 52\n"), Some(52));
        assert_eq!(parse(b"connect 4294967294\r\n"), Some(4_294_967_294));
        for bad in [
            &b"\n"[..],
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT +5\n",
            b"CONNECT -1\n",
            b"CONNECT 4294967295\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 5 6\n",
            b"CONNECT 0x10\n",
            b"CONNECTED 5\n",
            b"\xff\xfe 5\n",
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_line_may_come_byte_by_byte_and_the_rest_stays() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut handshake = Handshake::new(theirs);
        for byte in b"CONNECT 77" {
            ours.write_all(&[*byte]).unwrap();
            handshake = match handshake.proceed() {
                Progress::Waiting(handshake) => handshake,
                _ => panic!("the line has not ended"),
            };
        }
        ours.write_all(b"\nhello").unwrap();
        let Progress::Port(mut stream, 77) = handshake.proceed() else {
            panic!("the line has ended");
        };
        drop(ours);
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn no_line_fails() {
        for bytes in [&[b'x'; MAX_LINE][..], b"CONNECT ", b""] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(bytes).unwrap();
            drop(ours);
            assert!(matches!(
                Handshake::new(theirs).proceed(),
                Progress::Failed(_)
            ));
        }
    }
}

//! Has the guest's init hold everything else in the guest, before it is saved: in a machine that goes on from the snapshot
//! nothing runs then before that machine has become another one.
//!
//! Asked over the socket device. What a guest answers is a few bytes, compared with those that they should be.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use casemate_init::protocol::FREEZE_PORT;

/// How long it may take. The guest gives up sooner.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes of what the VMM says first: `OK` and a number.
const MAX_LINE: usize = 32;

/// A guest that is held, for as long as this is there. Should this process be killed, it is let go.
#[derive(Debug)]
pub struct Held(#[expect(dead_code, reason = "it is open")] UnixStream);

/// Holds the guest behind the socket device's `socket`. None when it cannot be.
///
/// # Errors
/// When nobody answers: the guest has no such init, or that is not ready, and nothing runs.
pub fn hold(socket: &Path) -> io::Result<Option<Held>> {
    let end = Instant::now() + PATIENCE;
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(format!("CONNECT {FREEZE_PORT}\n").as_bytes())?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        line.push(byte(&mut stream, end)?);
        if line.len() > MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    if !line.starts_with(b"OK ") {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    match byte(&mut stream, end)? {
        b'F' => Ok(Some(Held(stream))),
        _ => Ok(None),
    }
}

fn byte(stream: &mut UnixStream, end: Instant) -> io::Result<u8> {
    let left = end.saturating_duration_since(Instant::now());
    // Zero would be no limit.
    stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    let [byte] = byte;
    Ok(byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// What comes of a guest that says `words`.
    fn held(words: &'static [u8]) -> io::Result<Option<Held>> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 13];
            stream.read_exact(&mut asked).unwrap();
            assert_eq!(&asked, b"CONNECT 1025\n");
            let _ = stream.write_all(words);
        });
        let held = hold(&path);
        guest.join().unwrap();
        held
    }

    #[test]
    fn a_guest_is_held_or_says_that_it_is_not() {
        assert!(held(b"OK 1073741824\nF").unwrap().is_some());
        assert!(held(b"OK 1073741824\nN").unwrap().is_none());
        assert!(held(b"OK 1073741824\n\x1b").unwrap().is_none());
    }

    #[test]
    fn what_a_guest_says_is_bounded() {
        for bad in [&b""[..], b"OK 1", b"OK 1\n", b"NO\nF", &[b'O'; 4096]] {
            assert!(held(bad).is_err(), "{bad:?}");
        }
        assert!(hold(Path::new("/nonexistent")).is_err());
    }
}

//! Carries bytes between two sockets, as whoever moves a machine does.

use std::io::{Cursor, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use anyhow::Result;

/// A link that lives until both ends have ended, or it breaks.
pub struct Relay {
    threads: Vec<JoinHandle<u64>>,
}

impl Relay {
    /// Joins `from`, whose machine goes and of which some may have come already, and `to`. After `most` bytes, there or back,
    /// the link breaks.
    pub fn join(
        (from, early): (UnixStream, Vec<u8>),
        to: UnixStream,
        most: [Option<u64>; 2],
    ) -> Result<Self> {
        let (back_from, back_to) = (to.try_clone()?, from.try_clone()?);
        let [there, back] = most.map(|most| most.unwrap_or(u64::MAX));
        let going =
            std::thread::spawn(move || pump(Cursor::new(early).chain(&from), &from, &to, there));
        let coming = std::thread::spawn(move || pump(&back_from, &back_from, &back_to, back));
        Ok(Self {
            threads: vec![going, coming],
        })
    }

    /// Waits for its end, and says how many bytes it has carried there.
    pub fn wait(self) -> u64 {
        let mut carried = self
            .threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or(0));
        let there = carried.next().unwrap_or(0);
        carried.for_each(drop);
        there
    }
}

/// Carries what `bytes` has, and then both ends end.
fn pump(mut bytes: impl Read, from: &UnixStream, mut to: &UnixStream, most: u64) -> u64 {
    let mut carried = 0_u64;
    let mut chunk = vec![0; 64 << 10];
    while carried < most {
        let room = chunk
            .len()
            .min(usize::try_from(most - carried).unwrap_or(usize::MAX));
        match bytes.read(&mut chunk[..room]) {
            Ok(count @ 1..) if to.write_all(&chunk[..count]).is_ok() => carried += count as u64,
            _ => break,
        }
    }
    for socket in [from, to] {
        let _ = socket.shutdown(Shutdown::Both);
    }
    carried
}

//! What a move to another VMM costs: how long the guest is not heard, while it writes to 100 MB of pages a second.

use std::io::{Cursor, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::machine::{Kind, Machine};
use super::row::Row;
use super::{Bench, Subject, milliseconds};
use crate::bench::contestant::{MEMORY_MIB, Task};

/// How long the guest is heard before it moves, to see how much it writes.
const BEFORE: Duration = Duration::from_millis(300);
/// Bytes of pages for each of the guest's dots.
const BYTES_A_DOT: f64 = 25.0 * 4096.0;
/// Dots that are to be heard of it afterwards.
const AFTER: usize = 20;

/// Between two VMMs on this host, over sockets.
pub struct Moving {
    standstill: Row,
    all: Row,
    rate: Row,
}

impl Moving {
    /// Nothing is prepared.
    pub fn new() -> Self {
        Self {
            standstill: Row::new("move, guest dirtying memory: not heard for", "ms").at_most(30.0),
            all: Row::new("the same, from the request to the end of the old VMM", "ms"),
            rate: Row::new("what the guest dirtied before", "MB/s"),
        }
    }
}

impl Subject for Moving {
    fn round(&mut self, bench: &Bench) -> Result<()> {
        let dir = bench.dir.path();
        let mut source = Machine::boot(&Kind::Vmm, &bench.artifacts, dir, Task::Dirty, MEMORY_MIB)?;
        let mut target = Machine::empty(&bench.artifacts, dir, "target")?;
        let start = std::time::Instant::now();
        let mut before = 0;
        while start.elapsed() < BEFORE {
            before += source
                .listen(1)
                .iter()
                .map(|(_, count)| count)
                .sum::<usize>();
        }
        let elapsed = start.elapsed();
        let to = target.another_client()?;
        let (to, _) = to.upgrade("/migration/receive", &json!({}))?;
        let from = source.another_client()?;
        let request = std::time::Instant::now();
        let (from, early) = from.upgrade("/migration/send", &json!({ "downtime_ms": 30 }))?;
        let relay = relay(from, early, to)?;
        let last = source.listen(usize::MAX).last().copied();
        let end = std::time::Instant::now();
        let first = target.listen(AFTER).first().copied();
        let (last, first) = last.zip(first).context("the guest is not heard any more")?;
        self.standstill.push(
            milliseconds(first.0.saturating_duration_since(last.0)),
            None,
        );
        self.all.push(milliseconds(end - request), None);
        #[allow(clippy::cast_precision_loss, reason = "some hundred")]
        let dirtied = before as f64 * BYTES_A_DOT / elapsed.as_secs_f64();
        self.rate.push(dirtied / 1e6, None);
        drop((source, target));
        for thread in relay {
            let _ = thread.join();
        }
        Ok(())
    }

    fn rows(&mut self) -> Vec<&mut Row> {
        vec![&mut self.standstill, &mut self.all, &mut self.rate]
    }
}

/// Carries what two sockets say to each other.
fn relay(from: UnixStream, early: Vec<u8>, to: UnixStream) -> Result<[thread::JoinHandle<()>; 2]> {
    let (back_from, back_to) = (to.try_clone()?, from.try_clone()?);
    Ok([
        thread::spawn(move || carry(Cursor::new(early).chain(&from), &from, &to)),
        thread::spawn(move || carry(&back_from, &back_from, &back_to)),
    ])
}

fn carry(mut bytes: impl Read, from: &UnixStream, mut to: &UnixStream) {
    let mut chunk = vec![0; 256 << 10];
    while let Ok(count @ 1..) = bytes.read(&mut chunk) {
        if to
            .write_all(chunk.get(..count).unwrap_or_default())
            .is_err()
        {
            break;
        }
    }
    for socket in [from, to] {
        // It may have ended already.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

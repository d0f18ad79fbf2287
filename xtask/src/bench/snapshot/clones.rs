//! What each of many machines from one snapshot takes of the host's memory.

use std::thread;

use anyhow::Result;

use super::machine::{SETTLED, Snapshot};
use super::row::Row;
use super::{Bench, Contestant, Subject, mib};
use crate::bench::contestant::{MEMORY_MIB, Task};
use crate::bench::measure;

/// What the host has left is looked at this often: somebody else's use of it between two looks spoils only one of them.
const BATCHES: u32 = 10;

/// Idle ones, all there at once.
pub struct Clones {
    count: u32,
    dirty: Row,
    available: Row,
    ours: Snapshot,
    peer: Option<Snapshot>,
}

impl Clones {
    /// Makes what will be restored.
    ///
    /// # Errors
    /// When a machine cannot be saved.
    pub fn new(bench: &Bench, count: u32) -> Result<Self> {
        let save = |who| bench.save(who, Task::Idle, MEMORY_MIB);
        let row = |name: &str| Row::new(format!("each of {count} idle clones: {name}"), "MiB");
        Ok(Self {
            count,
            dirty: row("private dirty of all its processes").at_most(1.5),
            available: row("what the host has less").at_most(1.5),
            ours: save(Contestant::Ours)?,
            peer: bench.with_peer(|| save(Contestant::Peer))?,
        })
    }

    fn measure(&mut self, bench: &Bench, who: Contestant) -> Result<()> {
        let snapshot = match who {
            Contestant::Peer => self.peer.as_ref(),
            Contestant::Ours | Contestant::Jailed => Some(&self.ours),
        };
        let Some(snapshot) = snapshot else {
            return Ok(());
        };
        let batch = self.count.div_ceil(BATCHES);
        let mut clones = Vec::new();
        let mut before = available()?;
        for number in 1..=self.count {
            let mut clone = bench.waiting(who, &format!("clone{number}"), snapshot)?;
            clone.load(snapshot)?;
            clones.push(clone);
            if number % batch == 0 {
                thread::sleep(SETTLED);
                let now = available()?;
                who.series(&mut self.available)
                    .push((before - now) / f64::from(batch));
                before = now;
            }
        }
        for clone in &clones {
            let mut dirty = 0.0;
            for pid in clone.processes() {
                let path = format!("/proc/{pid}/smaps_rollup");
                dirty += in_mib(measure::field(&path, "Private_Dirty")?);
            }
            who.series(&mut self.dirty).push(dirty);
        }
        Ok(())
    }
}

impl Subject for Clones {
    fn finish(&mut self, bench: &Bench) -> Result<()> {
        for who in [Contestant::Jailed, Contestant::Peer] {
            self.measure(bench, who)?;
        }
        Ok(())
    }

    fn rows(&mut self) -> Vec<&mut Row> {
        vec![&mut self.dirty, &mut self.available]
    }
}

fn available() -> Result<f64> {
    measure::field("/proc/meminfo", "MemAvailable").map(in_mib)
}

fn in_mib(kib: u64) -> f64 {
    mib(kib * 1024)
}

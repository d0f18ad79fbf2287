//! How soon a saved guest is heard again.

use std::thread;
use std::time::Duration;

use anyhow::Result;

use super::machine::{SETTLED, Snapshot};
use super::row::Row;
use super::{Bench, Contestant, Subject, milliseconds};
use crate::bench::contestant::{MEMORY_MIB, Task};

/// From the request, and from the process's start, of a machine with the usual memory.
pub struct Restore {
    load: Row,
    start: Row,
    jailed: Row,
    ready: Row,
    ours: Snapshot,
    peer: Option<Snapshot>,
}

impl Restore {
    /// Makes what will be restored.
    ///
    /// # Errors
    /// When a machine cannot be saved.
    pub fn new(bench: &Bench) -> Result<Self> {
        let save = |who| bench.save(who, Task::Chatter, MEMORY_MIB);
        Ok(Self {
            load: Row::new("load request to first output, 128 MiB", "ms")
                .at_most(2.5)
                .at_most_of_peer(0.3),
            start: Row::new("process start to first output of a restored guest", "ms")
                .at_most(4.5)
                .at_most_of_peer(0.4),
            jailed: Row::new("the same with the jailer", "ms").at_most(8.0),
            ready: Row::new("loaded in a jail, and waiting: from its resumption", "ms")
                .at_most(1.5),
            ours: save(Contestant::Ours)?,
            peer: bench.with_peer(|| save(Contestant::Peer))?,
        })
    }

    /// From the request of a VMM that waits for one, and from the start of one that is asked at once.
    fn both(&self, bench: &Bench, who: Contestant, snapshot: &Snapshot) -> Result<[f64; 2]> {
        let (load, _) = loaded(bench, who, snapshot, true)?;
        let (_, start) = loaded(bench, who, snapshot, false)?;
        Ok([load, start].map(milliseconds))
    }
}

impl Subject for Restore {
    fn round(&mut self, bench: &Bench) -> Result<()> {
        let [load, start] = self.both(bench, Contestant::Ours, &self.ours)?;
        let peer = self.peer.as_ref();
        let peer = peer.map(|snapshot| self.both(bench, Contestant::Peer, snapshot));
        let peer = peer.transpose()?;
        let (_, jailed) = loaded(bench, Contestant::Jailed, &self.ours, false)?;
        self.load.push(load, peer.map(|[load, _]| load));
        self.start.push(start, peer.map(|[_, start]| start));
        self.jailed.push(milliseconds(jailed), None);
        let mut waits = bench.waiting(Contestant::Jailed, "load", &self.ours)?;
        let ready = waits.resume_and_hear(&self.ours)?;
        self.ready.push(milliseconds(ready), None);
        Ok(())
    }

    fn rows(&mut self) -> Vec<&mut Row> {
        vec![
            &mut self.load,
            &mut self.start,
            &mut self.jailed,
            &mut self.ready,
        ]
    }
}

/// From the request and from the process's start to the guest's first output; `waiting`: the VMM is up for a while then.
pub fn loaded(
    bench: &Bench,
    who: Contestant,
    snapshot: &Snapshot,
    waiting: bool,
) -> Result<(Duration, Duration)> {
    let mut machine = bench.waiting(who, "load", snapshot)?;
    if waiting {
        thread::sleep(SETTLED);
    }
    machine.load_and_hear(snapshot)
}

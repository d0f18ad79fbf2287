//! What a full snapshot costs: time, and room on the disk.

use anyhow::Result;

use super::row::Row;
use super::{Bench, Contestant, Subject, mib, milliseconds};
use crate::bench::contestant::{MEMORY_MIB, Task};

/// Of a machine whose memory is nearly all zero.
pub struct Create {
    time: Row,
    disk: Row,
}

impl Create {
    /// Nothing is prepared.
    pub fn new() -> Self {
        Self {
            time: Row::new("full snapshot, 128 MiB nearly all zero", "ms").at_most(25.0),
            disk: Row::new("the same on the disk", "MiB").at_most(4.0),
        }
    }
}

impl Subject for Create {
    fn round(&mut self, bench: &Bench) -> Result<()> {
        let measure = |who| {
            let snapshot = bench.save(who, Task::Chatter, MEMORY_MIB)?;
            let figures = [milliseconds(snapshot.took), mib(snapshot.on_disk()?)];
            snapshot.remove()?;
            anyhow::Ok(figures)
        };
        let [time, disk] = measure(Contestant::Ours)?;
        let peer = bench.with_peer(|| measure(Contestant::Peer))?;
        self.time.push(time, peer.map(|[time, _]| time));
        self.disk.push(disk, peer.map(|[_, disk]| disk));
        Ok(())
    }

    fn rows(&mut self) -> Vec<&mut Row> {
        vec![&mut self.time, &mut self.disk]
    }
}

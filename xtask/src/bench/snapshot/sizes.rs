//! Whether a restore takes longer when the guest has more memory.

use anyhow::Result;

use super::machine::Snapshot;
use super::plot::{Curve, Point};
use super::restore::loaded;
use super::row::{Row, Series};
use super::{Bench, Contestant, Subject, milliseconds};
use crate::bench::contestant::Task;

const SIZES_MIB: [u32; 7] = [128, 256, 512, 1024, 2048, 4096, 8192];

/// The peer writes all of a guest's memory to the disk: no more of it than this.
const PEER_UP_TO_MIB: u32 = 1024;

struct Size {
    mib: u32,
    row: Row,
    ours: Snapshot,
    peer: Option<Snapshot>,
}

/// From the request to the first output.
pub struct Sizes {
    sizes: Vec<Size>,
    growth: Row,
}

impl Sizes {
    /// Makes what will be restored.
    ///
    /// # Errors
    /// When a machine cannot be saved.
    pub fn new(bench: &Bench) -> Result<Self> {
        let size = |mib| {
            let save = |who| bench.save(who, Task::Chatter, mib);
            let peer = bench.with_peer(|| {
                let fits = mib <= PEER_UP_TO_MIB;
                fits.then(|| save(Contestant::Peer)).transpose()
            })?;
            anyhow::Ok(Size {
                mib,
                row: Row::new(
                    format!("a guest with {mib} MiB: load request to first output"),
                    "ms",
                ),
                ours: save(Contestant::Ours)?,
                peer: peer.flatten(),
            })
        };
        let sizes = SIZES_MIB.into_iter().map(size);
        Ok(Self {
            sizes: sizes.collect::<Result<_>>()?,
            growth: Row::new("the slowest of these to the first one", "×").at_most(1.5),
        })
    }

    /// Time against size, ours and the peer's.
    pub fn curves(&self) -> Vec<Curve> {
        let curve = |name, series: fn(&Row) -> &Series| {
            let points = self.sizes.iter().filter_map(|size| {
                let series = series(&size.row);
                Some(Point {
                    mib: size.mib,
                    median: series.median()?,
                    min: series.min()?,
                    max: series.max()?,
                })
            });
            Curve {
                name,
                points: points.collect(),
            }
        };
        let mut curves = vec![
            curve("Casemate", |row| &row.ours),
            curve("Firecracker", |row| &row.peer),
        ];
        curves.retain(|curve| !curve.points.is_empty());
        curves
    }
}

impl Subject for Sizes {
    fn round(&mut self, bench: &Bench) -> Result<()> {
        for size in &mut self.sizes {
            let measure = |who, snapshot| {
                let (load, _) = loaded(bench, who, snapshot, true)?;
                anyhow::Ok(milliseconds(load))
            };
            let ours = measure(Contestant::Ours, &size.ours)?;
            let peer = size.peer.as_ref();
            let peer = peer.map(|snapshot| measure(Contestant::Peer, snapshot));
            size.row.push(ours, peer.transpose()?);
        }
        Ok(())
    }

    fn finish(&mut self, _: &Bench) -> Result<()> {
        let medians: Vec<f64> = self
            .sizes
            .iter()
            .filter_map(|size| size.row.ours.median())
            .collect();
        let slowest = medians.iter().copied().max_by(f64::total_cmp);
        if let (Some(first), Some(slowest)) = (medians.first(), slowest) {
            self.growth.push(slowest / first, None);
        }
        Ok(())
    }

    fn rows(&mut self) -> Vec<&mut Row> {
        let sizes = self.sizes.iter_mut().map(|size| &mut size.row);
        sizes.chain([&mut self.growth]).collect()
    }
}

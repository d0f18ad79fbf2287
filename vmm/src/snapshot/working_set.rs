//! The working set: which pages of a snapshot's memory a machine that went on from it has used first. The next one finds
//! them there.
//!
//! A file of sections as the state is, with another number for what it is (3), and one section of kind 1, whose payload has
//! 16 bytes for each run of pages: the number in the memory file of the first (8), how many they are (4), and 1 if they
//! were written, else 0 (4). Runs are in ascending order and do not overlap.
//!
//! What a file says costs time and at most a quarter of the memory: it is advice, and changes no page's contents.

use std::fs::File;

use thiserror::Error;

use super::format::{self, Role, encode_as, read_as, u32_at, u64_at};
use super::{Section, SnapshotId};

const KIND: u32 = 1;
const VERSION: u32 = 1;
const RUN: usize = 16;
/// Most runs of a file.
const MAX_RUNS: usize = 1 << 20;

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The number of the first in the memory file.
    pub first: u64,
    /// How many they are.
    pub count: u32,
    /// Whether they were written.
    pub written: bool,
}

impl Run {
    fn end(self) -> u64 {
        self.first.saturating_add(self.count.into())
    }
}

/// Runs that come in ascending order, page by page.
#[derive(Debug, Default)]
pub struct Runs(Vec<Run>);

impl Runs {
    /// Adds a page behind all others. Beyond what a file holds it is left out.
    pub fn add(&mut self, number: u64, written: bool) {
        if let Some(last) = self.0.last_mut()
            && last.end() == number
            && last.written == written
            && last.count < u32::MAX
        {
            last.count = last.count.saturating_add(1);
        } else if self.0.len() < MAX_RUNS {
            self.0.push(Run {
                first: number,
                count: 1,
                written,
            });
        }
    }

    /// How many pages they are.
    pub fn pages(&self) -> u64 {
        pages(&self.0)
    }

    /// The file of snapshot `id`'s working set.
    ///
    /// # Errors
    /// When it is larger than any.
    pub fn encode(&self, id: SnapshotId) -> Result<Vec<u8>, format::Error> {
        let mut payload = Vec::with_capacity(self.0.len().saturating_mul(RUN));
        for run in &self.0 {
            payload.extend_from_slice(&run.first.to_le_bytes());
            payload.extend_from_slice(&run.count.to_le_bytes());
            payload.extend_from_slice(&u32::from(run.written).to_le_bytes());
        }
        let section = Section {
            kind: KIND,
            index: 0,
            version: VERSION,
            payload,
        };
        encode_as(Role::WorkingSet, id, &[section])
    }
}

/// How many pages `runs` are.
pub fn pages(runs: &[Run]) -> u64 {
    let counts = runs.iter().map(|run| u64::from(run.count));
    counts.fold(0, u64::saturating_add)
}

/// Why a file is not used.
#[derive(Debug, Error)]
pub enum Error {
    /// It is not whole, or another file.
    #[error(transparent)]
    Format(#[from] format::Error),
    /// Of another snapshot.
    #[error("it is that of snapshot {0}")]
    OtherSnapshot(SnapshotId),
    /// Written by another program.
    #[error("it has no pages in it that this program knows")]
    Unknown,
    /// Pages that are not there.
    #[error("its pages make no sense")]
    Nonsense,
}

/// The working set of snapshot `id`, whose memory has `total` pages.
///
/// # Errors
/// When the file is not that.
pub fn read(file: &File, id: SnapshotId, total: u64) -> Result<Vec<Run>, Error> {
    let (_, found, sections) = read_as(Role::WorkingSet, file)?;
    if found != id {
        return Err(Error::OtherSnapshot(found));
    }
    let mut sections = sections.into_iter();
    let section = sections.find(|it| it.kind == KIND && it.version == VERSION);
    let payload = section.ok_or(Error::Unknown)?.payload;
    let (entries, rest) = payload.as_chunks::<RUN>();
    if !rest.is_empty() || entries.len() > MAX_RUNS {
        return Err(Error::Nonsense);
    }
    let mut runs = Vec::with_capacity(entries.len());
    let mut behind = 0;
    let mut owned = 0_u64;
    for entry in entries {
        let run = run(entry).filter(|run| run.first >= behind && run.count > 0);
        let mut run = run.ok_or(Error::Nonsense)?;
        if run.written {
            owned = owned.saturating_add(run.count.into());
            // A guest that writes everywhere does not make the next ones take all of their memory.
            run.written = owned <= total / 4;
        }
        behind = run.end();
        if behind > total {
            return Err(Error::Nonsense);
        }
        runs.push(run);
    }
    Ok(runs)
}

fn run(entry: &[u8; RUN]) -> Option<Run> {
    Some(Run {
        first: u64_at(entry, 0)?,
        count: u32_at(entry, 8)?,
        written: match u32_at(entry, 12)? {
            0 => false,
            1 => true,
            _ => return None,
        },
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const ID: SnapshotId = SnapshotId::from_bytes([7; 16]);

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn run(first: u64, count: u32, written: bool) -> Run {
        Run {
            first,
            count,
            written,
        }
    }

    #[test]
    fn pages_become_runs_and_come_back() {
        let mut runs = Runs::default();
        for (page, written) in [(3, false), (4, false), (5, true), (6, true), (9, true)] {
            runs.add(page, written);
        }
        assert_eq!(runs.pages(), 5);
        let bytes = runs.encode(ID).unwrap();
        let expected = [run(3, 2, false), run(5, 2, true), run(9, 1, true)];
        assert_eq!(read(&file(&bytes), ID, 12).unwrap(), expected);
        assert_eq!(pages(&expected), 5);
        // Of ten pages no more than two are made the machine's own ahead.
        let fewer = [run(3, 2, false), run(5, 2, true), run(9, 1, false)];
        assert_eq!(read(&file(&bytes), ID, 10).unwrap(), fewer);
        let empty = Runs::default().encode(ID).unwrap();
        assert_eq!(read(&file(&empty), ID, 0).unwrap(), []);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let other = SnapshotId::from_bytes([8; 16]);
        let of = |runs: &[Run]| Runs(runs.to_vec()).encode(ID).unwrap();
        let good = of(&[run(1, 2, true)]);
        let refused = read(&file(&good), other, 10).unwrap_err();
        assert!(matches!(refused, Error::OtherSnapshot(ID)));
        for runs in [
            &[run(1, 0, false)][..],
            &[run(1, 10, false)],
            &[run(u64::MAX, 1, false)],
            &[run(u64::MAX, u32::MAX, true)],
            &[run(1, 2, false), run(2, 1, false)],
            &[run(5, 1, false), run(1, 1, false)],
        ] {
            let refused = read(&file(&of(runs)), ID, 10).unwrap_err();
            assert!(matches!(refused, Error::Nonsense), "{runs:?}");
        }
        for length in 0..good.len() {
            let cut = read(&file(&good[..length]), ID, 10).unwrap_err();
            assert!(matches!(cut, Error::Format(_)), "{length}: {cut}");
        }
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x40;
            assert!(read(&file(&bytes), ID, 10).is_err(), "{at}");
        }
        // Neither is taken for the other.
        let state = format::encode(ID, &[]).unwrap();
        assert!(read(&file(&state), ID, 10).is_err());
        assert!(format::decode(&good).is_err());
    }
}

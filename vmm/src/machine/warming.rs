//! Has the pages of a snapshot there before the guest asks for them: [`record`] writes down which ones a machine that went on
//! from it has used, and [`Warming`] brings those to the next one, by the helper's thread and while its guest runs.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::vec::IntoIter;

use log::debug;
use thiserror::Error;
use vm_memory::{
    Bytes as _, GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::memory::used::{Access, populate, used};
use crate::memory::{DirtyPages, GuestMemory};
use crate::snapshot::memory::{PAGE, Written};
use crate::snapshot::working_set::{Run, Runs};
use crate::snapshot::{SnapshotId, format};

/// Pages that are brought at once: a snapshot that is asked for does not wait long.
const STEP: u64 = 512;
/// Pages that are asked for at once.
const WINDOW: u64 = 8192;

/// Why a working set was not recorded.
#[derive(Debug, Error)]
pub enum Error {
    /// It is not mapped from a snapshot's file.
    #[error("the memory is not mapped from a snapshot's memory file")]
    NotMapped,
    /// The host does not say which pages are used.
    #[error("the host does not say which pages are used (move_pages): {0}")]
    Used(#[source] std::io::Error),
    /// It cannot be read.
    #[error("cannot read memory: {0}")]
    Read(#[source] std::io::Error),
    /// It cannot be written down.
    #[error(transparent)]
    Format(#[from] format::Error),
    /// The file.
    #[error("cannot write the file: {0}")]
    Write(#[source] std::io::Error),
}

/// Whether `memory` comes page by page from a file.
pub(super) fn is_mapped(memory: &GuestMemory) -> bool {
    memory
        .iter()
        .all(|region| region.file_offset().is_some() && region.flags() & libc::MAP_PRIVATE != 0)
}

/// Writes to `file` which pages of `memory`, that of snapshot `id`, this process has used so far.
///
/// The guest may go on meanwhile: what it does to a page just then counts as one or the other.
pub(super) fn record(memory: &GuestMemory, id: SnapshotId, file: &File) -> Result<Written, Error> {
    if !is_mapped(memory) {
        return Err(Error::NotMapped);
    }
    let mut runs = Runs::default();
    let mut ram = 0_u64;
    for region in memory.iter() {
        add_region(region, ram / PAGE, &mut runs)?;
        ram = ram.saturating_add(region.len());
    }
    let bytes = runs.encode(id)?;
    file.write_all_at(&bytes, 0).map_err(Error::Write)?;
    Ok(Written {
        ram,
        pages: runs.pages(),
    })
}

/// Adds the pages of a region whose first has the number `before` in the file.
fn add_region(
    region: &GuestRegionMmap<DirtyPages>,
    before: u64,
    runs: &mut Runs,
) -> Result<(), Error> {
    let place = region.file_offset().ok_or(Error::NotMapped)?;
    let all = region.len() / PAGE;
    let mut first = 0_u64;
    while first < all {
        let count = WINDOW.min(all.saturating_sub(first));
        let mut pages = vec![false; count as usize];
        used(region, first, &mut pages).map_err(Error::Used)?;
        for (number, _) in (first..).zip(pages).filter(|(_, used)| *used) {
            let mut ours = [0; PAGE as usize];
            let at = number.saturating_mul(PAGE);
            let read = region.read_slice(&mut ours, MemoryRegionAddress(at));
            read.map_err(|error| Error::Read(std::io::Error::other(error)))?;
            let mut theirs = [0; PAGE as usize];
            let read = place
                .file()
                .read_exact_at(&mut theirs, place.start().saturating_add(at));
            read.map_err(Error::Read)?;
            runs.add(before.saturating_add(number), ours != theirs);
        }
        first = first.saturating_add(count);
    }
    Ok(())
}

/// Pages that are being brought.
pub(super) struct Warming {
    memory: GuestMemory,
    runs: IntoIter<Run>,
    /// What is left of the run that is being brought.
    rest: Option<Run>,
}

impl Warming {
    pub(super) fn new(memory: &GuestMemory, runs: Vec<Run>) -> Self {
        let mut runs = runs.into_iter();
        Self {
            memory: memory.clone(),
            rest: runs.next(),
            runs,
        }
    }

    /// Brings some. Whether there are more.
    pub(super) fn step(&mut self) -> bool {
        let Some(run) = self.rest.take() else {
            return false;
        };
        let count = STEP.min(run.count.into());
        bring(&self.memory, run.first, count, run.written);
        let left = u64::from(run.count).saturating_sub(count);
        self.rest = match u32::try_from(left) {
            Ok(count @ 1..) => Some(Run {
                first: run.first.saturating_add(STEP),
                count,
                ..run
            }),
            _ => self.runs.next(),
        };
        self.rest.is_some()
    }
}

/// Brings pages by their numbers in the file, whichever regions those are of.
fn bring(memory: &GuestMemory, first: u64, count: u64, written: bool) {
    let access = match written {
        true => Access::Write,
        false => Access::Read,
    };
    let end = first.saturating_add(count);
    let mut before = 0_u64;
    for region in memory.iter() {
        let behind = before.saturating_add(region.len() / PAGE);
        let (from, to) = (first.max(before), end.min(behind));
        if from < to {
            let brought = populate(
                region,
                from.saturating_sub(before),
                to.saturating_sub(from),
                access,
            );
            if let Err(error) = brought {
                // They come when they are used.
                debug!("cannot bring {count} pages from {first} on: {error}");
            }
        }
        before = behind;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::{Options, map_file};
    use crate::snapshot::working_set::read;

    const ID: SnapshotId = SnapshotId::from_bytes([3; 16]);
    const HIGH: u64 = 4 << 30;
    const REGIONS: [(u64, u64); 2] = [(0, 256 * PAGE), (HIGH, 1024 * PAGE)];

    fn memory() -> GuestMemory {
        let file = tempfile::tempfile().unwrap();
        for page in 0..1280 {
            file.write_all_at(&[7; PAGE as usize], page * PAGE).unwrap();
        }
        map_file(&Arc::new(file), &REGIONS, Options::default()).unwrap()
    }

    fn recorded(memory: &GuestMemory) -> Vec<Run> {
        let file = tempfile::tempfile().unwrap();
        record(memory, ID, &file).unwrap();
        read(&file, ID, 1280).unwrap()
    }

    fn has(runs: &[Run], page: u64, written: bool) -> bool {
        let in_it = |run: &&Run| (run.first..run.first + u64::from(run.count)).contains(&page);
        runs.iter().find(in_it).map(|run| run.written) == Some(written)
    }

    #[test]
    fn what_one_has_used_the_next_one_has() {
        let first = memory();
        assert_eq!(recorded(&first), []);
        let address = |page: u64| match page {
            0..256 => GuestAddress(page * PAGE),
            _ => GuestAddress(HIGH + (page - 256) * PAGE),
        };
        for page in [5, 900] {
            first.write_obj(8_u8, address(page)).unwrap();
        }
        first.read_obj::<u8>(address(600)).unwrap();
        let runs = recorded(&first);
        assert!(has(&runs, 5, true) && has(&runs, 900, true) && has(&runs, 600, false));
        assert!(!runs.iter().any(|run| run.first <= 100 && run.first > 50));
        let second = memory();
        let mut warming = Warming::new(&second, runs);
        let mut steps = 0;
        while warming.step() {
            steps += 1;
        }
        assert!(steps > 0);
        // Written by nobody, but there.
        let again = recorded(&second);
        for page in [5, 600, 900] {
            assert!(has(&again, page, false), "{page}");
        }
    }

    /// More than a step, over the end of a region and of all.
    #[test]
    fn a_run_is_brought_in_steps() {
        let memory = memory();
        let run = Run {
            first: 100,
            count: 100_000,
            written: false,
        };
        let mut warming = Warming::new(&memory, vec![run]);
        let mut steps = 1;
        while warming.step() {
            steps += 1;
        }
        assert_eq!(steps, 100_000_u64.div_ceil(STEP));
        let pages = crate::snapshot::working_set::pages(&recorded(&memory));
        assert!(pages >= 1180, "{pages}");
        assert!(!Warming::new(&memory, Vec::new()).step());
    }
}

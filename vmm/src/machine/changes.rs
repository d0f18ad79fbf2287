//! Which pages of a machine's memory have changed since its last snapshot: what [`Differences`](super::saving::Kind) are
//! made of.
//!
//! KVM and this process each keep a log of what they write, and forget it once it is asked for. What was taken from them is
//! kept here until a snapshot that has it has its name: one that fails loses nothing for the next.

use vm_memory::GuestMemoryBackend as _;

use super::sending::{self, Bitmaps};
use crate::kvm::{Error, StateReader};
use crate::memory::{GuestMemory, dirty};
use crate::snapshot::SnapshotId;

/// See above.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// The last snapshot, made or loaded.
    base: Option<SnapshotId>,
    /// A bit for each page that was written since, for each region.
    pages: Bitmaps,
    /// Whether the logs are kept for snapshots.
    tracked: bool,
    /// The snapshot that was written last, and has no name yet.
    unnamed: Option<SnapshotId>,
}

impl Changes {
    /// Of a machine that was just made, from snapshot `base` if it goes on from one, and with `memory`, which is tracked or
    /// not.
    pub(super) fn since(base: Option<SnapshotId>, memory: &GuestMemory) -> Self {
        Self {
            base,
            tracked: memory.iter().all(|region| dirty::of(region).is_tracking()),
            ..Self::default()
        }
    }

    /// Against which snapshot [`Changes::pages`] are; none before the first.
    pub(super) fn base(&self) -> Option<SnapshotId> {
        self.base
    }

    /// The pages: a bitmap for each region.
    pub(super) fn pages(&self) -> &[Vec<u64>] {
        &self.pages
    }

    /// Takes what both logs have, if the memory is tracked. Nobody writes to it meanwhile.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(super) fn take(&mut self, reader: &StateReader, memory: &GuestMemory) -> Result<(), Error> {
        if self.tracked {
            self.add(&dirty::take_all(memory));
            self.add(&reader.dirty_log(memory)?);
        }
        Ok(())
    }

    /// Somebody else has taken these from the logs.
    pub(super) fn add(&mut self, pages: &[Vec<u64>]) {
        if self.tracked {
            sending::add(&mut self.pages, pages);
        }
    }

    /// All of it is in snapshot `id`, which has no name yet.
    pub(super) fn written(&mut self, id: SnapshotId) {
        self.unnamed = Some(id);
    }

    /// Now it has: what changes from here on is against it.
    pub(super) fn named(&mut self) {
        if let Some(id) = self.unnamed.take() {
            self.base = Some(id);
            self.pages.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: [SnapshotId; 2] = [
        SnapshotId::from_bytes([1; 16]),
        SnapshotId::from_bytes([2; 16]),
    ];

    #[test]
    fn what_has_no_name_is_kept_for_the_next() {
        let memory = crate::memory::allocate(8192).unwrap();
        let mut changes = Changes::since(Some(IDS[0]), &memory);
        changes.add(&[vec![7]]);
        assert!(changes.pages().is_empty(), "not tracked");
        changes.tracked = true;
        changes.add(&[vec![1, 0], vec![8]]);
        changes.add(&[vec![4, 2], vec![0]]);
        assert_eq!(changes.pages(), [vec![5, 2], vec![8]]);
        changes.written(IDS[1]);
        changes.add(&[vec![0, 1], vec![0]]);
        assert_eq!(changes.base(), Some(IDS[0]));
        assert_eq!(changes.pages(), [vec![5, 3], vec![8]]);
        changes.written(IDS[1]);
        changes.named();
        assert_eq!((changes.base(), changes.pages().len()), (Some(IDS[1]), 0));
        // Once is enough.
        changes.named();
        changes.add(&[vec![1]]);
        assert_eq!(
            (changes.base(), changes.pages()),
            (Some(IDS[1]), &[vec![1]][..])
        );
    }
}

//! Which pages of guest memory this process has written itself. KVM keeps the same of what the guest
//! writes ([`crate::kvm::StateReader::dirty_log`]); what has changed is in one of the two.
//!
//! While nothing is tracked, a write costs one look more.

use std::num::NonZeroUsize;
use std::sync::OnceLock;

use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestMemoryBackend as _, GuestRegionMmap, MmapRegion};

use super::GuestMemory;

/// What a bit stands for.
pub const PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// The pages of one region that were written; nothing is tracked by default.
///
/// A device marks what it lets the kernel fill before the kernel does. So whoever takes the pages
/// does that while the devices rest: between a mark and its write nothing may be taken.
#[derive(Debug, Default)]
pub struct DirtyPages(OnceLock<AtomicBitmap>);

impl DirtyPages {
    /// Tracks a region of `size` bytes; none of it is written yet.
    pub fn tracking(size: usize) -> Self {
        let pages = Self::default();
        pages.start(size);
        pages
    }

    /// Tracks a region of `size` bytes from now on, for good. While devices rest: what they are about to write was not marked.
    pub fn start(&self, size: usize) {
        self.0.get_or_init(|| AtomicBitmap::new(size, PAGE_SIZE));
    }

    /// Whether anything is tracked.
    pub fn is_tracking(&self) -> bool {
        self.0.get().is_some()
    }

    /// The pages written since the last call: one bit each, the first page is bit 0 of the first
    /// word, as in KVM's log. Empty while nothing is tracked.
    pub fn take(&self) -> Vec<u64> {
        self.0
            .get()
            .map(AtomicBitmap::get_and_reset)
            .unwrap_or_default()
    }
}

/// The pages of all regions of `memory`, as [`DirtyPages::take`] has them.
pub fn take_all(memory: &GuestMemory) -> Vec<Vec<u64>> {
    memory.iter().map(|region| of(region).take()).collect()
}

/// The numbers of the pages whose bit is set in `word`, the first of which stands for the page `first`.
pub fn numbers(first: u64, word: u64) -> impl Iterator<Item = u64> {
    let bits = (0..u64::BITS).filter(move |bit| word.wrapping_shr(*bit) & 1 == 1);
    bits.map(move |bit| first.saturating_add(bit.into()))
}

/// The pages of `region`.
pub fn of(region: &GuestRegionMmap<DirtyPages>) -> &DirtyPages {
    let mapping: &MmapRegion<DirtyPages> = region;
    mapping.bitmap()
}

impl<'a> WithBitmapSlice<'a> for DirtyPages {
    type S = Option<RefSlice<'a, AtomicBitmap>>;
}

impl Bitmap for DirtyPages {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(bitmap) = self.0.get() {
            bitmap.mark_dirty(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.get().is_some_and(|bitmap| bitmap.dirty_at(offset))
    }

    fn slice_at(&self, offset: usize) -> Option<RefSlice<'_, AtomicBitmap>> {
        self.0.get().map(|bitmap| bitmap.slice_at(offset))
    }
}

impl NewBitmap for DirtyPages {
    fn with_len(_: usize) -> Self {
        Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_pages() {
        assert_eq!(numbers(64, 5).collect::<Vec<_>>(), [64, 66]);
        assert_eq!(numbers(0, 1 << 63).collect::<Vec<_>>(), [63]);
        assert_eq!(numbers(9, 0).count(), 0);
    }
}

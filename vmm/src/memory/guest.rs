//! The guest's memory as devices see it.

use std::ops::Deref;
use std::sync::Arc;

use vm_memory::bitmap::WithBitmapSlice;
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, Permissions,
};

use super::DirtyPages;
use super::hotplug::HotplugRegion;

/// The guest's memory: what it has from its start, and what may be plugged in. Cloning it is cheap:
/// the mappings are shared.
///
/// Through [`vm_memory::GuestMemory`] and `Bytes`, unplugged memory is none. Through `Deref` there are
/// all mappings, plugged in or not: for those who set them up.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    mappings: GuestMemoryMmap<DirtyPages>,
    hotplug: Option<Arc<HotplugRegion>>,
}

impl GuestMemory {
    /// Memory of zeroes at these places, for tests too.
    ///
    /// # Errors
    /// When they overlap, or the host refuses the mappings.
    pub fn from_ranges(
        ranges: &[(GuestAddress, usize)],
    ) -> std::result::Result<Self, FromRangesError> {
        GuestMemoryMmap::from_ranges(ranges).map(Self::from)
    }

    /// The same with a region that memory may be plugged into.
    ///
    /// # Errors
    /// When it overlaps with what there is.
    pub fn with_hotplug(
        &self,
        region: HotplugRegion,
    ) -> std::result::Result<Self, vm_memory::GuestRegionCollectionError> {
        Ok(Self {
            mappings: self.mappings.insert_region(region.mapping())?,
            hotplug: Some(Arc::new(region)),
        })
    }

    /// The region that memory may be plugged into.
    pub fn hotplug(&self) -> Option<&Arc<HotplugRegion>> {
        self.hotplug.as_ref()
    }

    /// What the guest has from its start, in the order of addresses.
    pub fn ram(&self) -> impl Iterator<Item = &GuestRegionMmap<DirtyPages>> {
        let hotplug = self.hotplug.as_ref().map(|region| region.start());
        self.mappings
            .iter()
            .filter(move |region| Some(region.start_addr().0) != hotplug)
    }

    fn is_plugged(&self, address: GuestAddress, count: usize) -> bool {
        let hotplug = self.hotplug.as_ref();
        hotplug.is_none_or(|region| region.allows(address.0, count as u64))
    }
}

impl From<GuestMemoryMmap<DirtyPages>> for GuestMemory {
    fn from(mappings: GuestMemoryMmap<DirtyPages>) -> Self {
        Self {
            mappings,
            hotplug: None,
        }
    }
}

impl Deref for GuestMemory {
    type Target = GuestMemoryMmap<DirtyPages>;

    fn deref(&self) -> &Self::Target {
        &self.mappings
    }
}

impl vm_memory::GuestMemory for GuestMemory {
    type PhysicalMemory = GuestMemoryMmap<DirtyPages>;
    type Bitmap = DirtyPages;

    fn check_range(&self, address: GuestAddress, count: usize, _: Permissions) -> bool {
        GuestMemoryBackend::check_range(&self.mappings, address, count)
            && self.is_plugged(address, count)
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        _: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, <DirtyPages as WithBitmapSlice<'a>>::S>> {
        if !self.is_plugged(address, count) {
            return Err(GuestMemoryError::InvalidGuestAddress(address));
        }
        Ok(GuestMemoryBackend::get_slices(
            &self.mappings,
            address,
            count,
        ))
    }
}

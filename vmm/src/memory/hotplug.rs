//! Memory that the guest gets and gives back while it runs, in blocks.
//!
//! The whole region is mapped, and known to KVM, from the start. Blocks that are not plugged in can
//! only be read, here and by the guest, and read as the one page of zeroes that all share: a guest
//! that looks at them finds nothing and costs nothing, as the device's specification asks for, and
//! one that writes to them ends: KVM finds no memory for it. So plugging is a matter of mprotect(2), and
//! nobody needs to talk to KVM, which sealed threads cannot.
//!
//! Unsafe code lives here because mprotect(2) and madvise(2) are given raw addresses. It is sound
//! because they are those of whole blocks in one mapping, and because nothing in this process makes
//! a Rust reference to those bytes. A copy to a block that lost its write access would be a SIGSEGV:
//! [`GuestMemory`](super::GuestMemory) hands no unplugged memory out, and blocks are unplugged by the
//! thread that runs the devices, between two of their turns.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::bitmap::Bitmap as _;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryRegion as _, GuestRegionMmap};

use super::{DirtyPages, dirty};

/// Most blocks of a region. In the worst pattern each is a mapping of its own, and the kernel gives
/// a process 65530 (`vm.max_map_count`).
pub const MAX_BLOCKS: u64 = 32768;

/// Whether blocks are plugged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// All are.
    Plugged,
    /// None is.
    Unplugged,
    /// Some are.
    Mixed,
}

/// A region of the guest's address space that memory may be plugged into.
#[derive(Debug)]
pub struct HotplugRegion {
    mapping: Arc<GuestRegionMmap<DirtyPages>>,
    block_size: u64,
    blocks: Vec<AtomicBool>,
    plugged: AtomicU64,
}

impl HotplugRegion {
    /// `len` bytes at `start` with nothing plugged in. Both are multiples of `block_size`, which is a
    /// power of two and no less than a page; there are [`MAX_BLOCKS`] at most. `pages` is what is kept of
    /// their writes.
    ///
    /// # Errors
    /// When that is not so, or the host refuses the mapping.
    pub fn new(start: u64, len: u64, block_size: u64, pages: DirtyPages) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let aligned = start.is_multiple_of(block_size) && len.is_multiple_of(block_size);
        if !block_size.is_power_of_two() || block_size < super::release::PAGE || !aligned {
            return Err(invalid());
        }
        let count = len / block_size;
        if count == 0 || count > MAX_BLOCKS {
            return Err(invalid());
        }
        let size = usize::try_from(len).map_err(|_| invalid())?;
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let mapping = MmapRegionBuilder::new_with_bitmap(size, pages)
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(flags)
            .build();
        let mapping = mapping.map_err(|error| match error {
            MmapRegionError::Mmap(source) => source,
            other => io::Error::other(other),
        })?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or_else(invalid)?;
        Ok(Self {
            mapping: Arc::new(region),
            block_size,
            blocks: (0..count).map(|_| AtomicBool::new(false)).collect(),
            plugged: AtomicU64::new(0),
        })
    }

    pub(super) fn mapping(&self) -> Arc<GuestRegionMmap<DirtyPages>> {
        Arc::clone(&self.mapping)
    }

    /// Guest-physical address of the region.
    pub fn start(&self) -> u64 {
        self.mapping.start_addr().0
    }

    /// Length of the region in bytes.
    pub fn len(&self) -> u64 {
        self.mapping.len()
    }

    /// Whether it has no bytes, which it never has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size of a block in bytes.
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// How many bytes are plugged in.
    pub fn plugged_size(&self) -> u64 {
        // No more blocks than the region has.
        self.plugged.load(Ordering::SeqCst) * self.block_size
    }

    /// The numbers of the `count` blocks at guest-physical `address`; `None` if that is not where a
    /// block begins, there are not so many, or none are asked for.
    pub fn blocks(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.start())?;
        if count == 0 || !offset.is_multiple_of(self.block_size) {
            return None;
        }
        let first = usize::try_from(offset / self.block_size).ok()?;
        let end = first.checked_add(count.into())?;
        (end <= self.blocks.len()).then_some(first..end)
    }

    /// All blocks.
    pub fn all(&self) -> Range<usize> {
        0..self.blocks.len()
    }

    /// Whether the blocks are plugged in.
    pub fn state(&self, blocks: Range<usize>) -> State {
        let mut plugged = self.plugged_in(blocks);
        let first = plugged.next().unwrap_or(false);
        match (first, plugged.all(|other| other == first)) {
            (true, true) => State::Plugged,
            (false, true) => State::Unplugged,
            (_, false) => State::Mixed,
        }
    }

    /// Whether all bytes of a range that lie in the region are plugged in.
    pub fn allows(&self, address: u64, count: u64) -> bool {
        let end = address.saturating_add(count);
        let from = address.max(self.start());
        let to = end.min(self.start().saturating_add(self.len()));
        if from >= to {
            return true;
        }
        let first = from.saturating_sub(self.start()) / self.block_size;
        let last = to.saturating_sub(self.start()).div_ceil(self.block_size);
        // Both are at most MAX_BLOCKS.
        self.state(first as usize..last as usize) == State::Plugged
    }

    /// Gives the guest memory of zeroes in these blocks.
    ///
    /// # Errors
    /// When the host has none to give, with nothing changed.
    pub fn plug(&self, blocks: Range<usize>) -> io::Result<()> {
        let protected = self.protect(blocks.clone(), libc::PROT_READ | libc::PROT_WRITE);
        if protected.is_ok() {
            self.mark(blocks, true);
        } else {
            // It may have got half way. Back is the way that needs no new mappings.
            let _ = self.protect(blocks, libc::PROT_READ);
        }
        protected
    }

    /// Takes the memory in these blocks away and gives it to the host.
    ///
    /// # Errors
    /// When the host refuses, with nothing changed.
    pub fn unplug(&self, blocks: Range<usize>) -> io::Result<()> {
        // In this order: nobody writes to what cannot be written to, and no vCPU puts anything into what
        // has been given to the host already.
        let before: Vec<bool> = self.plugged_in(blocks.clone()).collect();
        self.mark(blocks.clone(), false);
        let result = self
            .protect(blocks.clone(), libc::PROT_READ)
            .and_then(|()| self.discard(blocks.clone()));
        if result.is_err() {
            for (block, _) in blocks.zip(before).filter(|(_, plugged)| *plugged) {
                // What does not come back is not plugged in: the driver is told less than it has.
                let _ = self.plug(block..block.saturating_add(1));
            }
        }
        result
    }

    fn plugged_in(&self, blocks: Range<usize>) -> impl Iterator<Item = bool> {
        let blocks = self.blocks.get(blocks).unwrap_or_default();
        blocks.iter().map(|block| block.load(Ordering::SeqCst))
    }

    fn discard(&self, blocks: Range<usize>) -> io::Result<()> {
        // What is given back reads as something else than before.
        let size = usize::try_from(self.block_size).map_err(io::Error::other)?;
        let offset = blocks.start.saturating_mul(size);
        let (address, len) = self.host_range(blocks)?;
        dirty::of(&self.mapping).mark_dirty(offset, len);
        // SAFETY: a range of the mapping, which lives as long as `self`; see the module's words.
        done(unsafe { libc::madvise(address, len, libc::MADV_DONTNEED) })
    }

    fn mark(&self, blocks: Range<usize>, plugged: bool) {
        let mut changed = 0;
        for block in self.blocks.get(blocks).unwrap_or_default() {
            changed += u64::from(block.swap(plugged, Ordering::SeqCst) != plugged);
        }
        // No more than were counted before, or than there are.
        if plugged {
            self.plugged.fetch_add(changed, Ordering::SeqCst);
        } else {
            self.plugged.fetch_sub(changed, Ordering::SeqCst);
        }
    }

    fn protect(&self, blocks: Range<usize>, access: libc::c_int) -> io::Result<()> {
        let (address, len) = self.host_range(blocks)?;
        // SAFETY: a range of the mapping, which lives as long as `self`; see the module's words.
        done(unsafe { libc::mprotect(address, len, access) })
    }

    /// Where the blocks are mapped.
    fn host_range(&self, blocks: Range<usize>) -> io::Result<(*mut libc::c_void, usize)> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let count = self.blocks.get(blocks.clone()).ok_or_else(invalid)?.len();
        // They lie in the region, so both are less than its length, which is a usize.
        let size = usize::try_from(self.block_size).map_err(|_| invalid())?;
        let offset = blocks.start.checked_mul(size).ok_or_else(invalid)?;
        let len = count.checked_mul(size).ok_or_else(invalid)?;
        // SAFETY: `offset` is at most the mapping's length.
        let address = unsafe { self.mapping.as_ptr().add(offset) };
        Ok((address.cast(), len))
    }
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
#[path = "hotplug_tests.rs"]
mod tests;

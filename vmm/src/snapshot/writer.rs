//! Writes memory files ([`memory`](super::memory)).
//!
//! The system calls: mincore(2), sysinfo(2) and lseek(2) to find the pages, madvise(2) with MADV_POPULATE_READ to
//! read all of them ([`touched`](crate::memory::touched)); ftruncate(2) and pwrite64(2). No fsync(2): that is for
//! whoever also gives the file its name.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use vm_memory::{
    Bytes as _, GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::memory::{CHUNK, Error, PAGE, ZEROES, check_regions, page_checksum};
use super::trailer::{Region, Trailer, total, words};
use super::{SnapshotId, format};
use crate::memory::touched::{Untouched, may_hold_data};
use crate::memory::used::{Access, populate};
use crate::memory::{DirtyPages, GuestMemory};

/// Pages that are looked at at once: 64 MiB, with a byte each.
const WINDOW: u64 = 16384;
/// From so many pages on that follow each other and may not be there, they are brought at once.
const MANY: u64 = 16;

/// What is in a file that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes of guest memory that the file stands for.
    pub ram: u64,
    /// Pages that are in it; all others are zero, or, of differences, as before.
    pub pages: u64,
}

/// Where the memory lies: what a file of it has, and what the state has to say. Memory that can be plugged in is
/// among it, whether or not it is.
pub fn regions(memory: &GuestMemory) -> Vec<Region> {
    let regions = memory.iter();
    regions
        .map(|region| (region.start_addr().0, region.len()))
        .collect()
}

/// Writes all of the memory, while nobody writes to it: the machine is paused and its devices rest. What was in the
/// file before is gone.
///
/// # Errors
/// When the host refuses. What is in the file then is not a memory file: the trailer comes last.
pub fn write(
    memory: &GuestMemory,
    untouched: Untouched,
    file: &File,
    id: SnapshotId,
) -> Result<Written, Error> {
    write_pages(memory, untouched, file, id, None)
}

/// Writes the pages that have changed since snapshot `base`: those whose bit is set. There is a bitmap for each of
/// the [`regions`], as [`DirtyPages::take`] and KVM's log have them: bit 0 of the first word is the first page.
/// Otherwise as [`write`].
///
/// # Errors
/// See [`write`]; and when a bitmap is not as long as its region.
pub fn write_diff(
    memory: &GuestMemory,
    untouched: Untouched,
    file: &File,
    id: SnapshotId,
    base: SnapshotId,
    dirty: &[Vec<u64>],
) -> Result<Written, Error> {
    write_pages(memory, untouched, file, id, Some((base, dirty)))
}

fn write_pages(
    memory: &GuestMemory,
    untouched: Untouched,
    file: &File,
    id: SnapshotId,
    diff: Option<(SnapshotId, &[Vec<u64>])>,
) -> Result<Written, Error> {
    let regions = regions(memory);
    check_regions(&regions)?;
    let mut trailer = Trailer {
        version: format::VERSION,
        id,
        base: diff.map(|(base, _)| base),
        regions,
        pages: 0,
        contents: 0,
        bitmap: 0,
    };
    let bitmap = match diff {
        Some((_, dirty)) => encode_bitmap(&trailer, dirty)?,
        None => Vec::new(),
    };
    trailer.bitmap = format::checksum(&bitmap);
    set_length(file, 0)?;
    set_length(file, trailer.file_size())?;
    let mut pages = Pages::new(file);
    for (index, region) in memory.iter().enumerate() {
        let dirty = diff.map(|(_, dirty)| dirty.get(index).map_or(&[][..], Vec::as_slice));
        pages.add_region(region, untouched, dirty)?;
    }
    (trailer.pages, trailer.contents) = (pages.count, pages.sum);
    let behind = trailer.ram();
    write_at(file, &bitmap, behind)?;
    let offset = behind.saturating_add(trailer.bitmap_size());
    write_at(file, &trailer.encode(), offset)?;
    Ok(Written {
        ram: total(&trailer.regions),
        pages: trailer.pages,
    })
}

/// Cuts a file off, or adds zeroes to it.
pub(super) fn set_length(file: &File, length: u64) -> Result<(), Error> {
    file.set_len(length)
        .map_err(|source| Error::SetLength { length, source })
}

fn write_at(file: &File, bytes: &[u8], offset: u64) -> Result<(), Error> {
    file.write_all_at(bytes, offset)
        .map_err(|source| Error::Write { offset, source })
}

/// The bitmaps as the file has them.
fn encode_bitmap(trailer: &Trailer, dirty: &[Vec<u64>]) -> Result<Vec<u8>, Error> {
    if dirty.len() != trailer.regions.len() {
        return Err(Error::Count(dirty.len()));
    }
    // A bit for each page of memory that is mapped.
    let size = usize::try_from(trailer.bitmap_size()).unwrap_or(0);
    let mut bytes = Vec::with_capacity(size);
    for (&(start, length), bitmap) in trailer.regions.iter().zip(dirty) {
        let needed = words(length);
        if bitmap.len() as u64 != needed {
            return Err(Error::Bitmap {
                start,
                found: bitmap.len(),
                needed,
            });
        }
        let mut left = length / PAGE;
        for word in bitmap {
            // Bits of no page are none.
            let used = u32::try_from(left).map_or(u64::MAX, low_bits);
            bytes.extend_from_slice(&(word & used).to_le_bytes());
            left = left.saturating_sub(u64::BITS.into());
        }
    }
    bytes.resize(size, 0);
    Ok(bytes)
}

/// The lowest `count` bits, all of them if there are no more.
fn low_bits(count: u32) -> u64 {
    1_u64
        .checked_shl(count)
        .map_or(u64::MAX, |bit| bit.wrapping_sub(1))
}

fn is_set(bitmap: &[u64], page: u64) -> bool {
    let bits = u64::from(u64::BITS);
    let word = usize::try_from(page / bits).ok();
    let word = word.and_then(|word| bitmap.get(word));
    word.is_some_and(|word| word >> (page % bits) & 1 == 1)
}

/// Pages on their way to the file.
struct Pages<'a> {
    file: &'a File,
    /// Room for a copy of some pages: what is compared, counted and written is the same.
    buffer: Vec<u8>,
    /// Where the next region begins.
    region: u64,
    /// Pages that are not zero.
    count: u64,
    /// Their checksums.
    sum: u64,
}

impl<'a> Pages<'a> {
    fn new(file: &'a File) -> Self {
        Self {
            file,
            buffer: vec![0; CHUNK],
            region: 0,
            count: 0,
            sum: 0,
        }
    }

    /// The region's pages that are not zero and, where there is a bitmap, have their bit set.
    fn add_region(
        &mut self,
        region: &GuestRegionMmap<DirtyPages>,
        untouched: Untouched,
        dirty: Option<&[u64]>,
    ) -> Result<(), Error> {
        let mut marks = vec![0; WINDOW as usize];
        let all = region.len() / PAGE;
        let mut first = 0;
        while first < all {
            let count = all.saturating_sub(first).min(WINDOW);
            // No more than it has.
            let marks = marks.get_mut(..count as usize).unwrap_or_default();
            let known = may_hold_data(region, first, marks, untouched);
            let known = known.map_err(|source| Error::Touched {
                start: region.start_addr().0,
                source,
            })?;
            if let Some(bitmap) = dirty {
                for (page, mark) in (first..).zip(&mut *marks) {
                    *mark &= u8::from(is_set(bitmap, page));
                }
            }
            // Of pages that were touched, most are there already.
            let absent = !known || region.file_offset().is_some();
            for run in marks.chunk_by(|one, next| one == next) {
                let count = run.len() as u64;
                if run.first().is_some_and(|mark| *mark != 0) {
                    if absent && count >= MANY {
                        // Where that fails, reading them says why.
                        let _ = populate(region, first, count, Access::Read);
                    }
                    self.add(region, first, count)?;
                }
                first = first.saturating_add(count);
            }
        }
        self.region = self.region.saturating_add(region.len());
        Ok(())
    }

    /// So many pages of the region, from that number on, but those that are zero.
    fn add(
        &mut self,
        region: &GuestRegionMmap<DirtyPages>,
        first: u64,
        count: u64,
    ) -> Result<(), Error> {
        let end = first.saturating_add(count).saturating_mul(PAGE);
        let mut at = first.saturating_mul(PAGE);
        while at < end {
            let len = end.saturating_sub(at).min(CHUNK as u64);
            // No more than it has.
            let copy = self.buffer.get_mut(..len as usize).unwrap_or_default();
            region
                .read_slice(copy, MemoryRegionAddress(at))
                .map_err(|source| Error::Guest {
                    address: region.start_addr().0.saturating_add(at),
                    source,
                })?;
            let offset = self.region.saturating_add(at);
            // Those that follow each other are written at once.
            let mut run = 0..0_usize;
            for page in copy.chunks_exact(PAGE as usize) {
                let behind = run.end.saturating_add(page.len());
                if page == ZEROES {
                    write_run(self.file, copy, run, offset)?;
                    run = behind..behind;
                } else {
                    let number = offset.saturating_add(run.end as u64) / PAGE;
                    self.sum = self.sum.wrapping_add(page_checksum(number, page));
                    self.count = self.count.saturating_add(1);
                    run.end = behind;
                }
            }
            write_run(self.file, copy, run, offset)?;
            at = at.saturating_add(len);
        }
        Ok(())
    }
}

/// Writes a part of `bytes`, which belong at `offset`.
fn write_run(file: &File, bytes: &[u8], run: Range<usize>, offset: u64) -> Result<(), Error> {
    let offset = offset.saturating_add(run.start as u64);
    write_at(file, bytes.get(run).unwrap_or_default(), offset)
}

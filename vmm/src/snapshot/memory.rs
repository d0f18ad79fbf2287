//! The memory file: the guest's memory as it was, region behind region, and a page that says whose it is.
//!
//! | offset | what |
//! |---|---|
//! | 0 | the regions' bytes, one region behind the other in the order of their addresses, without a gap |
//! | then, of differences | a bitmap for each region, one behind the other: bit 0 of the first 64-bit word is the region's first page; zero up to a whole page |
//! | the last page | the [trailer](super::trailer): magic, version, the snapshot's id, the regions, checksums |
//!
//! A page (4 KiB) that is zero is never written: the file has a hole there. Differences hold the pages whose
//! bit is set, and no other; one whose bit is set and which is a hole has become zero. So a hole alone never
//! has to be told from zeroes, and a copy that fills holes, or makes some, is as good as the file.
//!
//! The regions are at the offsets where they would be in a file without a trailer: programs that read guest
//! memory from files of Firecracker's find it where they look.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use thiserror::Error;
use twox_hash::XxHash64;
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryError, GuestMemoryRegion as _,
};

use super::trailer::{MAX_REGIONS, Region, SIZE as TRAILER};
use super::{SnapshotId, format};
use crate::memory::touched::next_data;
use crate::memory::used::map_zeroes;
use crate::memory::{GuestMemory, HugePages, Options, allocate_regions, dirty, map_file};

pub use super::merge::merge;
pub use super::trailer::{PAGE, Trailer, check_regions};
pub use super::writer::{Written, regions, write, write_diff};

/// Most bytes that are copied at once.
pub(super) const CHUNK: usize = 256 << 10;
/// Smallest hole in the file that is mapped as such; each is a mapping more.
const MIN_HOLE: u64 = 1 << 20;
/// Most of them.
const MAX_HOLES: usize = 512;
/// Most pieces of the file that are looked at for them.
const MAX_LOOKS: usize = 8192;
/// A page of zeroes, to compare others with.
pub(super) static ZEROES: [u8; PAGE as usize] = [0; PAGE as usize];

/// Why there is no memory file, or no memory of one.
#[derive(Debug, Error)]
pub enum Error {
    /// Not a file with a length of its own.
    #[error("the memory file is not a regular file")]
    NotAFile,
    /// It ends in something else.
    #[error(
        "the memory file does not end as one of Casemate's: it is another file, or its end is missing"
    )]
    NoTrailer,
    /// Of another version or machine.
    #[error("the memory file: {0}")]
    Format(#[source] format::Error),
    /// The last page is not what was written.
    #[error("the last page of the memory file is damaged")]
    Trailer,
    /// It is too short or too long.
    #[error(
        "the memory file has {has} bytes and needs {needs}: it is {}",
        if .has < .needs { "cut off" } else { "another one, or something was appended" }
    )]
    Length {
        /// Bytes that there are.
        has: u64,
        /// Bytes that there should be.
        needs: u64,
    },
    /// The memory of another moment.
    #[error("the memory file is that of snapshot {found}, and the state file that of {expected}")]
    OtherSnapshot {
        /// Whose state it is.
        expected: SnapshotId,
        /// Whose memory it is.
        found: SnapshotId,
    },
    /// The memory of another machine.
    #[error(
        "the memory file has {}, and the state file says {}",
        show(found),
        show(expected)
    )]
    OtherRegions {
        /// What the state says.
        expected: Vec<Region>,
        /// What there is.
        found: Vec<Region>,
    },
    /// Only a part.
    #[error(
        "the memory file holds only what has changed since snapshot {0}: merge it into that one's memory file first"
    )]
    Differences(SnapshotId),
    /// Not a part.
    #[error("the memory file of snapshot {0} holds all of the memory, not what has changed in it")]
    NoDifferences(SnapshotId),
    /// The differences are against something else.
    #[error(
        "the memory file is that of snapshot {found}, and what has changed is against that of snapshot {expected}"
    )]
    OtherBase {
        /// Against what the differences are.
        expected: SnapshotId,
        /// What there is.
        found: SnapshotId,
    },
    /// The pages or the bitmap are not what was written.
    #[error("the memory file is damaged: {0}")]
    Contents(&'static str),
    /// A number of regions that no file has.
    #[error("a memory file has 1 to {MAX_REGIONS} regions, not {0}")]
    Count(usize),
    /// Regions that no file has.
    #[error("no memory file has {}: regions are whole pages, one above the other", show(.0))]
    Unfit(Vec<Region>),
    /// There is no such region.
    #[error("the memory file has no region at {0:#x}")]
    NoRegion(u64),
    /// Bitmaps that do not fit to the memory.
    #[error(
        "the bitmap of changed pages at {start:#x} has {found} words of 64 pages, and needs {needed}"
    )]
    Bitmap {
        /// Where the region begins.
        start: u64,
        /// How long the bitmap is.
        found: usize,
        /// How long it has to be.
        needed: u64,
    },
    /// The host does not say which pages are there.
    #[error("cannot find out which pages of guest memory at {start:#x} are used: {source}")]
    Touched {
        /// Where the region begins.
        start: u64,
        /// What the host said.
        source: io::Error,
    },
    /// Guest memory cannot be reached.
    #[error("guest memory at {address:#x}: {source}")]
    Guest {
        /// Guest-physical address.
        address: u64,
        /// Why.
        source: GuestMemoryError,
    },
    /// The file cannot be made so long.
    #[error(
        "cannot make the memory file {length} bytes long: {source}{}",
        hint(source)
    )]
    SetLength {
        /// How long.
        length: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error(
        "cannot write the memory file at byte {offset}: {source}{}",
        hint(source)
    )]
    Write {
        /// Where.
        offset: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("cannot read the memory file at byte {offset}: {source}")]
    Read {
        /// Where.
        offset: u64,
        /// What the host said.
        source: io::Error,
    },
    /// Nothing to take its holes' place.
    #[error("cannot map zeroes where the memory file has holes: {source}")]
    Zeroes {
        /// What the host said.
        source: io::Error,
    },
    /// No memory to put it in.
    #[error(transparent)]
    Memory(#[from] crate::memory::Error),
}

/// What to do about it.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOSPC) => "; free space where it is written, and try again",
        Some(libc::EFBIG) => "; allow it (`--resource-limit fsize=BYTES`)",
        _ => "",
    }
}

fn show(regions: &[Region]) -> String {
    const MOST: usize = 4;
    let show = |(start, length): &Region| format!("{length:#x} bytes at {start:#x}");
    let shown: Vec<_> = regions.iter().take(MOST).map(show).collect();
    let more = regions.len().saturating_sub(MOST);
    let more = (more > 0).then(|| format!(" and {more} more regions"));
    shown.join(", ") + &more.unwrap_or_default()
}

/// The checksum of a page that is not zero, `number` being its place in the file.
pub(super) fn page_checksum(number: u64, page: &[u8]) -> u64 {
    XxHash64::oneshot(number, page)
}

/// What the file says of itself.
///
/// # Errors
/// When it is no whole memory file.
pub fn trailer(file: &File) -> Result<Trailer, Error> {
    let (trailer, has) = last_page(file)?;
    let needs = trailer.file_size();
    if has != needs {
        return Err(Error::Length { has, needs });
    }
    Ok(trailer)
}

/// The trailer and the file's length.
fn last_page(file: &File) -> Result<(Trailer, u64), Error> {
    let has = length(file)?;
    let offset = has.checked_sub(PAGE).ok_or(Error::NoTrailer)?;
    let mut page = [0; TRAILER];
    file.read_exact_at(&mut page, offset)
        .map_err(|source| Error::Read { offset, source })?;
    Ok((Trailer::decode(&page)?, has))
}

fn length(file: &File) -> Result<u64, Error> {
    let metadata = file.metadata();
    let metadata = metadata.map_err(|source| Error::Read { offset: 0, source })?;
    if !metadata.is_file() {
        return Err(Error::NotAFile);
    }
    Ok(metadata.len())
}

/// Whether the file is all of the memory of snapshot `id`, which has these regions; to be asked before it is
/// mapped. It reads one page: [`verify`] looks at all.
///
/// # Errors
/// When it is not, and why.
pub fn check(file: &File, id: SnapshotId, regions: &[Region]) -> Result<(), Error> {
    check_regions(regions)?;
    let (trailer, has) = match last_page(file) {
        Err(Error::NoTrailer) => {
            // Its length may say more.
            let (has, needs) = (length(file)?, whole_size(regions));
            return Err(match has == needs {
                true => Error::NoTrailer,
                false => Error::Length { has, needs },
            });
        }
        other => other?,
    };
    if trailer.id != id {
        return Err(Error::OtherSnapshot {
            expected: id,
            found: trailer.id,
        });
    }
    if let Some(base) = trailer.base {
        return Err(Error::Differences(base));
    }
    if trailer.regions != regions {
        return Err(Error::OtherRegions {
            expected: regions.to_vec(),
            found: trailer.regions,
        });
    }
    let needs = whole_size(regions);
    if has != needs {
        return Err(Error::Length { has, needs });
    }
    Ok(())
}

/// Bytes of a file of all of the memory.
fn whole_size(regions: &[Region]) -> u64 {
    super::trailer::total(regions).saturating_add(PAGE)
}

/// The memory of a file that [`check`] has passed: the first of its regions, as many as `regions` has.
///
/// Pages are mapped from the file (MAP_PRIVATE and MAP_NORESERVE, to be read and written): they are read when they
/// are touched, and what the guest writes never reaches the file. So this takes the same time for any size. Huge
/// pages, and memory that a vhost-user back-end shares, cannot be had so: there all that is not zero is read now.
///
/// # Errors
/// When the file is too short, or the host refuses.
pub fn map(file: &Arc<File>, regions: &[Region], options: Options) -> Result<GuestMemory, Error> {
    check_regions(regions)?;
    let (has, needs) = (length(file)?, whole_size(regions));
    if has < needs {
        return Err(Error::Length { has, needs });
    }
    if options.huge_pages == HugePages::None && !options.shared {
        let memory = map_file(file, regions, options)?;
        map_holes(file, &memory)?;
        return Ok(memory);
    }
    let memory = allocate_regions(regions, options)?;
    for &(start, _) in regions {
        read_region(file, regions, start, &memory)?;
    }
    Ok(memory)
}

/// Has large holes of the file be zeroes of nobody's: touched, they would be pages of the host's page cache, and then
/// copies of those.
fn map_holes(file: &File, memory: &GuestMemory) -> Result<(), Error> {
    let mut offset = 0_u64;
    let (mut looks, mut holes) = (0..MAX_LOOKS, 0..MAX_HOLES);
    for region in memory.iter() {
        let end = offset.saturating_add(region.len());
        let mut at = offset;
        while at < end && looks.next().is_some() {
            let failed = |source| Error::Read { offset: at, source };
            let (data, behind) = next_data(file, at, end)
                .map_err(failed)?
                .unwrap_or((end, end));
            // Whole pages: a file system may know of smaller pieces.
            let (from, to) = (at.next_multiple_of(PAGE), data / PAGE * PAGE);
            let length = to.saturating_sub(from);
            if length >= MIN_HOLE && holes.next().is_some() {
                let mapped = map_zeroes(region, from.saturating_sub(offset), length);
                mapped.map_err(|source| Error::Zeroes { source })?;
            }
            at = behind;
        }
        offset = end;
    }
    Ok(())
}

/// Reads what is not zero of the region at `start` into memory of zeroes at the same place. `regions` are those of
/// the file. Memory that can be plugged in comes so, once what was plugged in is again.
///
/// The pages do not count as written.
///
/// # Errors
/// When the file cannot be read, or has something for a page that is not there.
pub fn read_region(
    file: &File,
    regions: &[Region],
    start: u64,
    memory: &GuestMemory,
) -> Result<(), Error> {
    check_regions(regions)?;
    let none = || Error::NoRegion(start);
    let index = regions.iter().position(|(at, _)| *at == start);
    let (before, rest) = regions
        .split_at_checked(index.ok_or_else(none)?)
        .ok_or_else(none)?;
    let (_, length) = *rest.first().ok_or_else(none)?;
    let offset = super::trailer::total(before);
    pages(file, offset, length, |number, page| {
        // Within the region.
        let address = number
            .saturating_mul(PAGE)
            .saturating_sub(offset)
            .saturating_add(start);
        memory
            .write_slice(page, GuestAddress(address))
            .map_err(|source| Error::Guest { address, source })
    })?;
    if let Some(region) = memory.find_region(GuestAddress(start)) {
        dirty::of(region).take();
    }
    Ok(())
}

/// Calls `each` with the number in the file and the bytes of every page that is not zero.
pub(super) fn pages(
    file: &File,
    offset: u64,
    length: u64,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let end = offset.saturating_add(length);
    let mut buffer = vec![0; CHUNK];
    let mut at = offset;
    let failed = |offset| move |source| Error::Read { offset, source };
    while let Some((from, to)) = next_data(file, at, end).map_err(failed(at))? {
        // Whole pages: a file system may know of smaller pieces.
        let from = from / PAGE * PAGE;
        // Less than a chunk, so it fits.
        let count = to
            .saturating_sub(from)
            .next_multiple_of(PAGE)
            .min(CHUNK as u64);
        let bytes = buffer.get_mut(..count as usize);
        let bytes = bytes.ok_or(Error::Contents("a length"))?;
        file.read_exact_at(bytes, from).map_err(failed(from))?;
        let numbers = from / PAGE..;
        for (number, page) in numbers.zip(bytes.chunks_exact(PAGE as usize)) {
            if page != ZEROES {
                each(number, page)?;
            }
        }
        at = from.saturating_add(count);
    }
    Ok(())
}

/// Reads all of the file and compares it with its checksums. Of one that was not changed since, nothing else can be
/// read later, so far as the disk keeps it.
///
/// # Errors
/// When it is damaged, or cannot be read.
pub fn verify(file: &File) -> Result<Trailer, Error> {
    let trailer = trailer(file)?;
    let (mut count, mut sum) = (0_u64, 0_u64);
    pages(file, 0, trailer.ram(), |number, page| {
        count = count.saturating_add(1);
        sum = sum.wrapping_add(page_checksum(number, page));
        Ok(())
    })?;
    if (count, sum) != (trailer.pages, trailer.contents) {
        return Err(Error::Contents("its pages are not those that were written"));
    }
    bitmap(file, &trailer)?;
    Ok(trailer)
}

/// The bitmaps of differences: one for each region, as [`write_diff`] was given them; none of a file of all of the
/// memory.
///
/// # Errors
/// When they are damaged, or cannot be read.
pub fn bitmap(file: &File, trailer: &Trailer) -> Result<Vec<Vec<u64>>, Error> {
    let damaged = || Error::Contents("its bitmap is not the one that was written");
    // What `trailer` says of its size is what the file has: one bit for each page before it.
    let size = usize::try_from(trailer.bitmap_size()).map_err(|_| damaged())?;
    let offset = trailer.ram();
    let mut bytes = vec![0; size];
    file.read_exact_at(&mut bytes, offset)
        .map_err(|source| Error::Read { offset, source })?;
    if format::checksum(&bytes) != trailer.bitmap {
        return Err(damaged());
    }
    if trailer.base.is_none() {
        return Ok(Vec::new());
    }
    let (words, _) = bytes.as_chunks::<8>();
    let mut words = words.iter().copied().map(u64::from_le_bytes);
    let lengths = trailer.regions.iter().map(|(_, length)| *length);
    Ok(lengths
        .map(|length| {
            let count = usize::try_from(super::trailer::words(length)).unwrap_or(0);
            words.by_ref().take(count).collect()
        })
        .collect())
}

#[cfg(test)]
#[path = "differences_tests.rs"]
mod differences_tests;
#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;

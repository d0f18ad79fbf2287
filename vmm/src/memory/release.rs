//! Guest memory that the guest gives back to the host.
//!
//! Unsafe code lives here because madvise(2) is given raw addresses. It is sound because they are
//! those of mapped guest memory, and because nothing in this process makes a Rust reference to
//! those bytes: to all who look, zeroes in them are one more thing that a guest may write there.
#![allow(unsafe_code)]

use std::io;

use nix::fcntl::{FallocateFlags, fallocate};
use thiserror::Error;
use vm_memory::{
    GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _, MemoryRegionAddress, Permissions,
};

use super::{DirtyPages, GuestMemory, dirty};
use vm_memory::bitmap::Bitmap as _;

/// What the host gives and takes memory in.
pub const PAGE: u64 = 4096;

/// Why memory was not given back.
#[derive(Debug, Error)]
pub enum Error {
    /// It is none.
    #[error("{start:#x}+{len:#x} is not guest memory")]
    NotMemory {
        /// Guest-physical address of the range.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The host refuses.
    #[error("the host does not take {start:#x}+{len:#x} back: {source}")]
    Refused {
        /// Guest-physical address of the range.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// What the host said.
        source: io::Error,
    },
}

/// Gives the whole pages of a range of guest memory back to the host, and says how many bytes that
/// were. They read as zeroes, or, where they are a private mapping of a file, as the file.
///
/// # Errors
/// When a byte of the range is not guest memory, with nothing done, or the host refuses.
pub fn release(memory: &GuestMemory, start: u64, len: u64) -> Result<u64, Error> {
    let not_memory = || Error::NotMemory { start, len };
    let count = usize::try_from(len).map_err(|_| not_memory())?;
    let address = GuestAddress(start);
    if !vm_memory::GuestMemory::check_range(memory, address, count, Permissions::Write) {
        return Err(not_memory());
    }
    let end = start.checked_add(len).ok_or_else(not_memory)? & !(PAGE - 1);
    let first = start.checked_next_multiple_of(PAGE);
    let mut at = first.ok_or_else(not_memory)?;
    let mut released = 0u64;
    while at < end {
        let region = memory
            .find_region(GuestAddress(at))
            .ok_or_else(not_memory)?;
        let offset = at.saturating_sub(region.start_addr().0);
        let part = region
            .len()
            .saturating_sub(offset)
            .min(end.saturating_sub(at));
        release_part(region, offset, part).map_err(|source| Error::Refused {
            start: at,
            len: part,
            source,
        })?;
        released = released.saturating_add(part);
        at = at.saturating_add(part);
    }
    Ok(released)
}

/// Gives `len` bytes at `offset` of a region back; they lie in it.
fn release_part(
    region: &vm_memory::GuestRegionMmap<DirtyPages>,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    // What is given back reads as something else than before.
    let bytes = |value: u64| usize::try_from(value).map_err(io::Error::other);
    dirty::of(region).mark_dirty(bytes(offset)?, bytes(len)?);
    // Dropping a shared mapping's pages would leave them in the file behind it.
    if let Some(file) = region.file_offset()
        && region.flags() & libc::MAP_SHARED != 0
    {
        let at = file.start().checked_add(offset);
        let at = at.and_then(|at| i64::try_from(at).ok());
        let at = at.ok_or(io::ErrorKind::InvalidInput)?;
        let len = i64::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        return Ok(fallocate(file.file(), hole, at, len)?);
    }
    let address = region
        .get_host_address(MemoryRegionAddress(offset))
        .map_err(io::Error::other)?;
    let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `address` is that of guest memory, mapped for `len` bytes as long as `region` is
    // borrowed; see the module's words for its content.
    if unsafe { libc::madvise(address.cast(), len, libc::MADV_DONTNEED) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::MetadataExt as _;
    use vm_memory::{Bytes as _, FileOffset, GuestMemoryMmap};

    fn filled(ranges: &[(GuestAddress, usize)]) -> GuestMemory {
        let memory = GuestMemory::from_ranges(ranges).unwrap();
        for &(start, len) in ranges {
            memory.write_slice(&vec![7; len], start).unwrap();
        }
        memory
    }

    fn byte(memory: &GuestMemory, address: u64) -> u8 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// Private pages of the mapping that holds `address` of the guest, in KiB.
    fn resident(memory: &GuestMemory, address: u64) -> u64 {
        let host = memory.get_host_address(GuestAddress(address)).unwrap() as u64;
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in maps.lines() {
            let range = line
                .split_once(' ')
                .and_then(|(range, _)| range.split_once('-'));
            if let Some((from, to)) = range
                && let Ok(from) = u64::from_str_radix(from, 16)
                && let Ok(to) = u64::from_str_radix(to, 16)
            {
                inside = (from..to).contains(&host);
            }
            if inside && let Some(kib) = line.strip_prefix("Rss:") {
                return kib.trim().trim_end_matches(" kB").parse().unwrap();
            }
        }
        panic!("{host:#x} is not mapped");
    }

    #[test]
    fn whole_pages_go_and_their_neighbours_stay() {
        let memory = filled(&[(GuestAddress(0), 0x10_0000)]);
        let before = resident(&memory, 0);
        assert_eq!(release(&memory, 0x1001, 0x8_0000).unwrap(), 0x7_f000);
        assert!(resident(&memory, 0) + 0x7_f000 / 1024 <= before);
        for (address, expected) in [(0x1fff, 7), (0x2000, 0), (0x8_0fff, 0), (0x8_1000, 7)] {
            assert_eq!(byte(&memory, address), expected, "{address:#x}");
        }
        assert_eq!(release(&memory, 0x9_0001, 0x1000).unwrap(), 0);
        assert_eq!(byte(&memory, 0x9_0fff), 7);
    }

    #[test]
    fn a_range_may_cross_regions_but_not_leave_memory() {
        let regions = [(0, 0x4000), (0x4000, 0x4000), (0x10_0000, 0x4000)];
        let memory = filled(&regions.map(|(at, len)| (GuestAddress(at), len)));
        assert_eq!(release(&memory, 0x2000, 0x4000).unwrap(), 0x4000);
        assert_eq!((byte(&memory, 0x3000), byte(&memory, 0x5000)), (0, 0));
        assert_eq!((byte(&memory, 0x1000), byte(&memory, 0x6000)), (7, 7));
        for (start, len) in [
            (0x6000, 0x2001),
            (0x8000, 0x1000),
            (0xf_f000, 0x2000),
            (u64::MAX, 1),
            (u64::MAX - 0xfff, 0x1000),
            (0, u64::MAX),
            (0x10_0000, u64::MAX),
        ] {
            let error = release(&memory, start, len).unwrap_err();
            assert!(matches!(error, Error::NotMemory { .. }), "{error}");
        }
        assert_eq!(byte(&memory, 0x7000), 7);
        // No bytes are no harm, wherever they are.
        for start in [0, 0x9000, u64::MAX] {
            assert_eq!(release(&memory, start, 0).unwrap_or(0), 0);
        }
    }

    #[test]
    fn pages_of_a_shared_file_leave_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x10_0000).unwrap();
        let offset = |file: &File| FileOffset::new(file.try_clone().unwrap(), 0);
        let range = (GuestAddress(0), 0x10_0000, Some(offset(&file)));
        let memory: GuestMemory = GuestMemoryMmap::from_ranges_with_files([range])
            .unwrap()
            .into();
        memory
            .write_slice(&[7; 0x10_0000], GuestAddress(0))
            .unwrap();
        let before = file.metadata().unwrap().blocks();
        assert_eq!(release(&memory, 0x1000, 0x8_0000).unwrap(), 0x8_0000);
        assert!(file.metadata().unwrap().blocks() + 0x8_0000 / 512 <= before);
        for (address, expected) in [(0xfff, 7), (0x1000, 0), (0x8_1000, 7)] {
            assert_eq!(byte(&memory, address), expected, "{address:#x}");
        }
    }
}

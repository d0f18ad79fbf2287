//! Which pages of guest memory may hold something else than zeroes, found without reading them: reading a
//! page that nobody has touched gives it a place in the page tables, which costs more than all else in saving
//! a guest's memory that is nearly all zero.
//!
//! - Private, anonymous memory: mincore(2) says 0 of a page that was never touched, but also of one that is
//!   in swap. sysinfo(2) says whether the host has any swap: its total includes what is still in a swap file
//!   that is being turned off (`si_swapinfo` in Linux's mm/swapfile.c). Only where there is none, before
//!   and after, is a 0 believed.
//! - Shared memory, a memfd: lseek(2) with SEEK_DATA says what the file has, in swap or not.
//! - A private mapping of a file: mincore(2) says 1 of a page of our own, and of one in the page cache. Of the
//!   others the file's are the contents, and again SEEK_DATA knows which of them it has.
//!
//! Memory that comes from a userfaultfd handler looks untouched until it has come: see [`Untouched`].
//!
//! Where all pages have to be read, [`populate`](super::used::populate) lets that be a fifth of the work.
//!
//! Unsafe code lives here because mincore(2) is given raw addresses. It is sound because
//! those are of a range in one mapping, because the kernel writes to our vector alone, and because no page's
//! contents change by being there.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::sys::sysinfo::sysinfo;
use nix::unistd::{Whence, lseek};
use vm_memory::{FileOffset, GuestMemoryRegion as _, GuestRegionMmap, MemoryRegionAddress};

use super::DirtyPages;

/// What mincore(2) counts in.
pub const PAGE: u64 = 4096;

/// What a page holds that nobody has touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untouched {
    /// What is mapped there: zeroes, or the file's bytes.
    Mapped,
    /// What a userfaultfd handler would bring: all pages have to be read.
    Elsewhere,
}

/// Says of each page of `region` from number `first` on, as many as `pages` is long and the region has at least,
/// whether it may hold something else than zeroes: 1, or 0 when it holds none. And whether it knows: if not,
/// that is 1 for all.
///
/// While nobody writes to the memory.
///
/// # Errors
/// When the range is not the region's, or the host refuses.
pub fn may_hold_data(
    region: &GuestRegionMmap<DirtyPages>,
    first: u64,
    pages: &mut [u8],
    untouched: Untouched,
) -> io::Result<bool> {
    if untouched == Untouched::Elsewhere {
        pages.fill(1);
        return Ok(false);
    }
    match region.file_offset() {
        Some(place) if region.flags() & libc::MAP_SHARED != 0 => {
            pages.fill(0);
            mark_data(place, first, pages)?;
            Ok(true)
        }
        None => resident(region, first, pages, has_swap),
        Some(place) => {
            let known = resident(region, first, pages, has_swap)?;
            if known {
                mark_data(place, first, pages)?;
            }
            Ok(known)
        }
    }
}

/// What mincore(2) says, where that can be believed.
fn resident(
    region: &GuestRegionMmap<DirtyPages>,
    first: u64,
    pages: &mut [u8],
    mut has_swap: impl FnMut() -> io::Result<bool>,
) -> io::Result<bool> {
    let (address, len) = host_range(region, first, pages.len() as u64)?;
    if has_swap()? {
        pages.fill(1);
        return Ok(false);
    }
    // SAFETY: `len` bytes from `address` on are mapped, as long as `region` is borrowed, and `pages` has a byte
    // for each of their pages.
    if unsafe { libc::mincore(address, len, pages.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if has_swap()? {
        pages.fill(1);
        return Ok(false);
    }
    // The other bits are for the future (mincore(2)).
    pages.iter_mut().for_each(|page| *page &= 1);
    Ok(true)
}

/// Where `count` pages, one at least, of `region` from number `first` on are in this process, and their length in bytes.
pub(super) fn host_range(
    region: &GuestRegionMmap<DirtyPages>,
    first: u64,
    count: u64,
) -> io::Result<(*mut libc::c_void, usize)> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let offset = first.checked_mul(PAGE).ok_or_else(invalid)?;
    let len = count.checked_mul(PAGE).ok_or_else(invalid)?;
    let end = offset.checked_add(len).ok_or_else(invalid)?;
    if end > region.len() || len == 0 {
        return Err(invalid());
    }
    let address = region.get_host_address(MemoryRegionAddress(offset));
    let address = address.map_err(io::Error::other)?;
    let len = usize::try_from(len).map_err(|_| invalid())?;
    Ok((address.cast(), len))
}

/// Whether the host has, or is just losing, swap.
fn has_swap() -> io::Result<bool> {
    Ok(sysinfo()?.swap_total() > 0)
}

/// Marks the pages that a file has data for.
fn mark_data(place: &FileOffset, first: u64, pages: &mut [u8]) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let offset = first.checked_mul(PAGE).ok_or_else(invalid)?;
    let start = place.start().checked_add(offset).ok_or_else(invalid)?;
    let len = (pages.len() as u64).checked_mul(PAGE).ok_or_else(invalid)?;
    let end = start.checked_add(len).ok_or_else(invalid)?;
    let mut at = start;
    while let Some((from, to)) = next_data(place.file(), at, end)? {
        // Both lie between `start` and `end`.
        let first = from.saturating_sub(start) / PAGE;
        let last = to.saturating_sub(start).div_ceil(PAGE);
        let marked = pages.get_mut(first as usize..last as usize);
        marked.ok_or_else(invalid)?.fill(1);
        at = to;
    }
    Ok(())
}

/// The next range between `at` and `end` that `file` has data for, by lseek(2): elsewhere it has only zeroes. On
/// a file system that does not know, that is all of it.
///
/// # Errors
/// What the host says.
pub fn next_data(file: &File, at: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= end {
        return Ok(None);
    }
    let seek = |at: u64, whence| {
        let at = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
        lseek(file, at, whence).map(|found| u64::try_from(found).unwrap_or(end))
    };
    let from = match seek(at, Whence::SeekData) {
        Ok(from) if from < end => from.max(at),
        // No data behind it, or the file has become shorter.
        Ok(_) | Err(Errno::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let to = match seek(from, Whence::SeekHole) {
        Ok(to) => to.min(end),
        Err(Errno::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // Data that has gone in between is none.
    Ok((to > from).then_some((from, to)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestMemory, Options, allocate_with, map_file};
    use std::os::unix::fs::FileExt as _;
    use std::sync::Arc;
    use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

    const SIZE: u64 = 4 << 20;

    fn found(memory: &GuestMemory, first: u64, count: usize, untouched: Untouched) -> Vec<u64> {
        let mut pages = vec![0xfe; count];
        let region = memory.iter().next().unwrap();
        may_hold_data(region, first, &mut pages, untouched).unwrap();
        assert!(pages.iter().all(|page| *page <= 1));
        let marked = (first..).zip(pages).filter(|(_, page)| *page == 1);
        marked.map(|(page, _)| page).collect()
    }

    fn write(memory: &GuestMemory, page: u64) {
        memory.write_obj(7_u8, GuestAddress(page * PAGE)).unwrap();
    }

    fn options(shared: bool) -> Options {
        Options {
            shared,
            ..Options::default()
        }
    }

    /// On a host with swap all pages are read: then this says less.
    fn exactly(found: &[u64], expected: &[u64]) {
        let all_of = |all: &[u64]| expected.iter().all(|page| all.contains(page));
        assert!(all_of(found), "{expected:?} in {found:?}");
        if !has_swap().unwrap() {
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn what_was_written_is_found() {
        for shared in [false, true] {
            let memory = allocate_with(SIZE, options(shared)).unwrap();
            exactly(&found(&memory, 0, 1024, Untouched::Mapped), &[]);
            for page in [0, 5, 600, 1023] {
                write(&memory, page);
            }
            exactly(
                &found(&memory, 0, 1024, Untouched::Mapped),
                &[0, 5, 600, 1023],
            );
            exactly(&found(&memory, 5, 596, Untouched::Mapped), &[5, 600]);
            exactly(&found(&memory, 6, 594, Untouched::Mapped), &[]);
            assert_eq!(found(&memory, 7, 3, Untouched::Elsewhere), [7, 8, 9]);
        }
    }

    #[test]
    fn a_page_that_may_be_in_swap_has_to_be_read() {
        let memory = allocate_with(SIZE, options(false)).unwrap();
        let region = memory.iter().next().unwrap();
        // There before, or after, or gone in between.
        for swap in [[true, true], [false, true], [true, false]] {
            let mut swap = swap.into_iter();
            let mut pages = [0; 8];
            let known = resident(region, 0, &mut pages, || Ok(swap.next().unwrap())).unwrap();
            assert_eq!((known, pages), (false, [1; 8]));
        }
        let mut pages = [9; 8];
        assert!(resident(region, 0, &mut pages, || Ok(false)).unwrap());
        assert_eq!(pages, [0; 8]);
    }

    #[test]
    fn what_the_file_has_is_found() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(SIZE).unwrap();
        file.write_all_at(&[1], 3 * PAGE + 8).unwrap();
        file.write_all_at(&[1; 8192], 700 * PAGE + 8).unwrap();
        let memory = map_file(&file, &[(0, SIZE)], Options::default()).unwrap();
        write(&memory, 9);
        let pages = found(&memory, 0, 1024, Untouched::Mapped);
        for page in [3, 9, 700, 701, 702] {
            assert!(pages.contains(&page), "{page} in {pages:?}");
        }
    }

    #[test]
    fn no_page_behind_the_region_is_asked_for() {
        let memory = allocate_with(SIZE, options(false)).unwrap();
        let region = memory.iter().next().unwrap();
        for (first, count) in [
            (0, 0),
            (0, 1025),
            (1024, 1),
            (u64::MAX, 1),
            (u64::MAX / PAGE, 2),
        ] {
            let mut pages = vec![0; count];
            let result = may_hold_data(region, first, &mut pages, Untouched::Mapped);
            assert!(result.is_err(), "{first}+{count}");
        }
    }

    #[test]
    fn data_ends_where_it_is_asked_to() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        assert_eq!(next_data(&file, 0, SIZE).unwrap(), None);
        file.write_all_at(&[1; 8192], 700 * PAGE).unwrap();
        let (from, to) = next_data(&file, 0, SIZE).unwrap().unwrap();
        // A file system may have larger blocks.
        assert!(from <= 700 * PAGE && to >= 702 * PAGE, "{from} {to}");
        let part = next_data(&file, 701 * PAGE, 701 * PAGE + 5).unwrap();
        assert_eq!(part, Some((701 * PAGE, 701 * PAGE + 5)));
        for (at, end) in [(0, 100), (SIZE, u64::MAX), (5, 5), (u64::MAX - 1, u64::MAX)] {
            assert!(next_data(&file, at, end).ok().flatten().is_none(), "{at}");
        }
    }
}

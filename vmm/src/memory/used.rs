//! Which pages of guest memory this process has had a use for, and having them there before the guest asks.
//!
//! mincore(2) tells nothing of a page of a private mapping that is in the host's page cache: another machine may have brought
//! it. move_pages(2) does when it is to move nothing (no nodes): it says on which node each page lies that is in this
//! process's page tables, and an error for others. The kernel puts neighbours into them that it has at hand
//! (`fault_around_bytes`), so there are some more than were asked for.
//!
//! Unsafe code lives here because these calls are given raw addresses. It is sound because those are of a range in one
//! mapping, because the kernel writes to our vector alone, and because no page's contents change.
#![allow(unsafe_code)]

use std::io;
use std::ptr;

use vm_memory::{GuestMemoryRegion as _, GuestRegionMmap};

use super::DirtyPages;
use super::touched::{PAGE, host_range};

/// Whether pages are brought for reading, or for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Such as they are.
    Read,
    /// Of our own, with the same contents.
    Write,
}

/// Brings pages that are about to be used: at once, instead of by a fault for each (madvise(2), MADV_POPULATE_READ and
/// MADV_POPULATE_WRITE; Linux 5.14).
///
/// # Errors
/// When the range is not the region's, or the host refuses: each page comes when it is used, then.
pub fn populate(
    region: &GuestRegionMmap<DirtyPages>,
    first: u64,
    count: u64,
    access: Access,
) -> io::Result<()> {
    let (address, len) = host_range(region, first, count)?;
    let advice = match access {
        Access::Read => libc::MADV_POPULATE_READ,
        Access::Write => libc::MADV_POPULATE_WRITE,
    };
    // SAFETY: the range is of one mapping, as long as `region` is borrowed; the advice changes no contents.
    match unsafe { libc::madvise(address, len, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Says of each page of `region` from number `first` on, as many as `pages` is long, whether it is in this process's page
/// tables. The kernel's own page of zeroes does not count.
///
/// # Errors
/// When the range is not the region's, or the kernel cannot tell (one without NUMA).
pub fn used(
    region: &GuestRegionMmap<DirtyPages>,
    first: u64,
    pages: &mut [bool],
) -> io::Result<()> {
    let (address, len) = host_range(region, first, pages.len() as u64)?;
    let address = address.cast::<u8>();
    let step = PAGE as usize;
    // Never followed; addresses alone.
    let addresses: Vec<_> = (0..len)
        .step_by(step)
        .map(|at| address.wrapping_add(at))
        .collect();
    let mut nodes = vec![-libc::ENOENT; addresses.len()];
    // SAFETY: there are as many addresses as places for nodes; without nodes to move to, nothing is moved.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            addresses.len(),
            addresses.as_ptr(),
            ptr::null::<libc::c_int>(),
            nodes.as_mut_ptr(),
            0,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    for (page, node) in pages.iter_mut().zip(nodes) {
        *page = node >= 0;
    }
    Ok(())
}

/// Puts zeroes of the process's own where `len` bytes of `region` from `offset` on are mapped from a file that has nothing
/// there: a page then is the kernel's zeroes, and not one of the host's page cache.
///
/// # Errors
/// When the range is not the region's whole pages, or the host refuses.
pub fn map_zeroes(region: &GuestRegionMmap<DirtyPages>, offset: u64, len: u64) -> io::Result<()> {
    if !offset.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || region.file_offset().is_none() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let (address, len) = host_range(region, offset / PAGE, len / PAGE)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range is within a mapping that is the region's alone and stays so as long as it lives, which then unmaps
    // all of it, whatever it consists of. What was there were zeroes, too.
    match unsafe { libc::mmap(address, len, access, flags, -1, 0) } {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;
    use std::sync::Arc;

    use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

    use super::*;
    use crate::memory::touched::{Untouched, may_hold_data};
    use crate::memory::{GuestMemory, Options, map_file};

    /// Far apart, so that no neighbour of one is brought with it.
    const FAR: u64 = 64;
    const PAGES: u64 = 16 * FAR;

    /// Memory from a file with data in its first half.
    fn from_file() -> (Arc<File>, GuestMemory) {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(PAGES * PAGE).unwrap();
        for page in 0..PAGES / 2 {
            file.write_all_at(&[7; PAGE as usize], page * PAGE).unwrap();
        }
        let memory = map_file(&file, &[(0, PAGES * PAGE)], Options::default()).unwrap();
        (file, memory)
    }

    fn which(memory: &GuestMemory) -> Vec<u64> {
        let mut pages = vec![false; PAGES as usize];
        used(memory.iter().next().unwrap(), 0, &mut pages).unwrap();
        (0..PAGES).filter(|page| pages[*page as usize]).collect()
    }

    fn byte(memory: &GuestMemory, page: u64) -> u8 {
        memory.read_obj(GuestAddress(page * PAGE)).unwrap()
    }

    #[test]
    fn what_is_in_the_page_cache_is_not_used_yet() {
        let (_file, memory) = from_file();
        assert!(which(&memory).is_empty());
        assert_eq!(byte(&memory, FAR), 7);
        memory
            .write_obj(1_u8, GuestAddress(4 * FAR * PAGE))
            .unwrap();
        let found = which(&memory);
        assert!(
            found.contains(&FAR) && found.contains(&(4 * FAR)),
            "{found:?}"
        );
        assert!(
            !found.contains(&0) && !found.contains(&(7 * FAR)),
            "{found:?}"
        );
    }

    #[test]
    fn what_is_brought_is_there_and_the_same() {
        let (file, memory) = from_file();
        let region = memory.iter().next().unwrap();
        for (first, access) in [(FAR, Access::Read), (4 * FAR, Access::Write)] {
            populate(region, first, 3, access).unwrap();
            let found = which(&memory);
            assert!((first..first + 3).all(|page| found.contains(&page)));
            assert_eq!(byte(&memory, first), 7);
        }
        // One of them is our own now.
        file.write_all_at(&[9], 4 * FAR * PAGE).unwrap();
        assert_eq!(byte(&memory, 4 * FAR), 7);
        for (first, count) in [(PAGES, 1), (PAGES - 1, 2), (0, 0), (u64::MAX, 2)] {
            assert!(populate(region, first, count, Access::Read).is_err());
        }
    }

    #[test]
    fn zeroes_are_nobodys_and_can_be_written() {
        let (_file, memory) = from_file();
        let region = memory.iter().next().unwrap();
        let (start, len) = (PAGES / 2 * PAGE, PAGES / 2 * PAGE);
        map_zeroes(region, start, len).unwrap();
        assert_eq!(byte(&memory, PAGES - 1), 0);
        assert!(which(&memory).is_empty()); // the kernel's page
        memory
            .write_obj(5_u8, GuestAddress((PAGES - 2) * PAGE))
            .unwrap();
        assert_eq!(which(&memory), [PAGES - 2]);
        assert_eq!((byte(&memory, PAGES - 2), byte(&memory, 0)), (5, 7));
        // What a snapshot has to have.
        let mut pages = vec![0; PAGES as usize];
        may_hold_data(region, 0, &mut pages, Untouched::Mapped).unwrap();
        assert_eq!((pages[PAGES as usize - 2], pages[0]), (1, 1));
        for (offset, len) in [(1, PAGE), (0, PAGE + 1), (start, len + PAGE), (0, 0)] {
            assert!(map_zeroes(region, offset, len).is_err(), "{offset} {len}");
        }
        let anonymous = crate::memory::allocate(1 << 20).unwrap();
        assert!(map_zeroes(anonymous.iter().next().unwrap(), 0, PAGE).is_err());
    }
}

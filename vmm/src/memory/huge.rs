//! Guest memory in pages of 2 MiB: from the host's pool (hugetlbfs), or such as the kernel makes of
//! ordinary ones (transparent huge pages).
#![allow(unsafe_code)] // madvise has no safe form.

use std::io;

use vm_memory::GuestMemoryRegion as _;

use super::GuestMemory;

/// Bytes of a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;
/// How many pages of the pool nobody has.
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// How many huge pages the host has left; `None` where that cannot be read, as in a jail.
pub fn free_pages() -> Option<u64> {
    std::fs::read_to_string(FREE).ok()?.trim().parse().ok()
}

/// Asks the kernel for huge pages where it can make some (madvise(2), MADV_HUGEPAGE).
///
/// # Errors
/// When the kernel has no transparent huge pages.
pub fn advise(region: &vm_memory::GuestRegionMmap<super::DirtyPages>) -> io::Result<()> {
    let length = usize::try_from(region.len()).map_err(io::Error::other)?;
    // SAFETY: the range is exactly one mapping of ours; the advice changes no content.
    let result = unsafe { libc::madvise(region.as_ptr().cast(), length, libc::MADV_HUGEPAGE) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Asks for it for all of `memory`.
///
/// # Errors
/// See [`advise`].
pub fn advise_all(memory: &GuestMemory) -> io::Result<()> {
    use vm_memory::GuestMemoryBackend as _;
    memory.iter().try_for_each(advise)
}

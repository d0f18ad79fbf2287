//! Guest memory: where it lies in the guest and what backs it on the host.

pub mod file_mapping;
pub mod heap;
pub mod iovec;
pub mod layout;
pub mod numa;
pub mod release;
mod shared;

use std::sync::Arc;

use thiserror::Error;
use vm_memory::{FileOffset, GuestAddress};

/// The guest's memory. Cloning it is cheap: the mappings are shared.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Why there is no memory.
#[derive(Debug, Error)]
pub enum Error {
    /// The host maps no such amount.
    #[error("the host cannot map {mib} MiB of guest memory: {source}; use less (`mem_size_mib`)")]
    Map {
        /// How much was wanted.
        mib: u64,
        /// What the host said.
        source: vm_memory::mmap::FromRangesError,
    },
    /// The host gives no memory that another process could map, too.
    #[error(
        "the host gives no {mib} MiB of memory to share with a vhost-user back-end: {source}{hint}"
    )]
    Share {
        /// How much was wanted.
        mib: u64,
        /// What the host said.
        source: nix::errno::Errno,
        /// What to do, where that is known.
        hint: &'static str,
    },
    /// Beyond what this program can address.
    #[error("{0} MiB of guest memory are more than can be addressed; use less (`mem_size_mib`)")]
    TooLarge(u64),
}

/// Maps `size` bytes of zeroes for a guest: from 0 up to the MMIO hole, the rest above 4 GiB.
///
/// The pages are anonymous, private, and take no host memory until they are touched (MAP_NORESERVE).
///
/// # Errors
/// When the host refuses the mapping.
pub fn allocate(size: u64) -> Result<GuestMemory, Error> {
    let mib = size >> 20;
    GuestMemory::from_ranges(&regions(size)?).map_err(|source| Error::Map { mib, source })
}

/// As [`allocate`], but in a memfd that other processes can map, and that nobody can shorten.
///
/// # Errors
/// When the host refuses the memfd, its size or the mapping.
pub fn allocate_shared(size: u64) -> Result<GuestMemory, Error> {
    let mib = size >> 20;
    let file = shared::memfd(size).map_err(|source| Error::Share {
        mib,
        source,
        hint: match source {
            nix::errno::Errno::EFBIG => "; allow it (`--resource-limit fsize=BYTES`)",
            _ => "",
        },
    })?;
    let mut offset = 0;
    let files = regions(size)?.into_iter().map(|(start, len)| {
        let place = FileOffset::from_arc(Arc::clone(&file), offset);
        offset = offset.saturating_add(len as u64);
        (start, len, Some(place))
    });
    let files: Vec<_> = files.collect();
    GuestMemory::from_ranges_with_files(files).map_err(|source| Error::Map { mib, source })
}

/// Where memory of `size` bytes lies in the guest.
fn regions(size: u64) -> Result<Vec<(GuestAddress, usize)>, Error> {
    let mib = size >> 20;
    let low = size.min(layout::MMIO_HOLE_START);
    let high = size.saturating_sub(low);
    [(0, low), (layout::MMIO_HOLE_END, high)]
        .into_iter()
        .filter(|(_, size)| *size > 0)
        .map(|(start, size)| Ok((GuestAddress(start), usize::try_from(size)?)))
        .collect::<Result<Vec<_>, std::num::TryFromIntError>>()
        .map_err(|_| Error::TooLarge(mib))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

    fn regions(mib: u64) -> Vec<(u64, u64)> {
        let memory = allocate(mib << 20).unwrap();
        memory
            .iter()
            .map(|region| (region.start_addr().0, region.len() >> 20))
            .collect()
    }

    #[test]
    fn leaves_the_hole_free() {
        assert_eq!(regions(1), [(0, 1)]);
        assert_eq!(regions(3072), [(0, 3072)]);
        assert_eq!(regions(3073), [(0, 3072), (1 << 32, 1)]);
    }

    #[test]
    fn says_how_much_was_too_much() {
        // More than the address space of any x86-64 process with four-level paging.
        let error = allocate(1 << 48).unwrap_err().to_string();
        assert!(error.contains("268435456 MiB"), "{error}");
    }
}

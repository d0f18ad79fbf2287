//! Guest memory: where it lies in the guest and what backs it on the host.

pub mod cut_off;
pub mod dirty;
pub mod file_mapping;
mod guest;
pub mod heap;
pub mod hotplug;
pub mod huge;
pub mod iovec;
pub mod layout;
pub mod numa;
pub mod release;
mod shared;
pub mod touched;
pub mod used;
pub mod userfault;

use std::fs::File;
use std::sync::Arc;

use log::warn;
use thiserror::Error;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestRegionCollectionError,
    GuestRegionMmap,
};

pub use self::dirty::DirtyPages;
pub use self::guest::GuestMemory;
use self::hotplug::HotplugRegion;
use self::huge::HUGE_PAGE;
pub use crate::config::HugePages;

/// What the memory is made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Its pages.
    pub huge_pages: HugePages,
    /// Whether to keep which pages are written.
    pub track_dirty_pages: bool,
    /// How many huge pages the host has free, where that is known: for the error.
    pub free_huge_pages: Option<u64>,
    /// Whether it is in a memfd that other processes can map, and that nobody can shorten.
    pub shared: bool,
}

/// Why there is no memory.
#[derive(Debug, Error)]
pub enum Error {
    /// The host maps no such amount.
    #[error("the host cannot map {mib} MiB of guest memory: {source}; use less (`mem_size_mib`)")]
    Map {
        /// How much was wanted.
        mib: u64,
        /// What the host said.
        source: MmapRegionError,
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
    /// Pages of the pool are not shared.
    #[error(
        "`huge_pages` \"2M\" and a vhost-user back-end do not go together yet: use other `huge_pages`, or no back-end"
    )]
    SharedHugePages,
    /// The host's pool of huge pages is too small.
    #[error(
        "the guest's memory needs {needed} huge pages of 2 MiB, and {}: reserve them (sysctl vm.nr_hugepages), or use less memory or other `huge_pages`: {source}",
        .free.map_or("the host has too few free".to_owned(), |free| format!("the host has {free} free"))
    )]
    HugePages {
        /// How many are needed.
        needed: u64,
        /// How many there are, where that is known.
        free: Option<u64>,
        /// What the host said.
        source: MmapRegionError,
    },
    /// Regions that do not fit together.
    #[error("cannot put {mib} MiB of guest memory together: {source}")]
    Regions {
        /// How much was wanted.
        mib: u64,
        /// Why.
        source: GuestRegionCollectionError,
    },
    /// Beyond what this program can address.
    #[error("{0} MiB of guest memory are more than can be addressed; use less (`mem_size_mib`)")]
    TooLarge(u64),
    /// There is no room for memory that comes later.
    #[error(
        "the host cannot map {mib} MiB for memory that comes later: {source}; use less (`memory-hotplug.total_size_mib`)"
    )]
    Hotplug {
        /// How much was wanted.
        mib: u64,
        /// What the host said.
        source: std::io::Error,
    },
}

/// Maps `size` bytes of zeroes for a guest: from 0 up to the MMIO hole, the rest above 4 GiB.
///
/// The pages are anonymous, private, and take no host memory until they are touched (MAP_NORESERVE).
///
/// # Errors
/// When the host refuses the mapping.
pub fn allocate(size: u64) -> Result<GuestMemory, Error> {
    allocate_with(size, Options::default())
}

/// The same, with other pages. Those of the host's pool are reserved at once, so that a guest which
/// touches them finds them.
///
/// # Errors
/// When the host refuses the mapping.
pub fn allocate_with(size: u64, options: Options) -> Result<GuestMemory, Error> {
    allocate_regions(&ram_regions(size), options)
}

/// Where `size` bytes of memory lie that a guest has from its start: address and length in bytes.
pub fn ram_regions(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(layout::MMIO_HOLE_START);
    let high = size.saturating_sub(low);
    let regions = [(0, low), (layout::MMIO_HOLE_END, high)];
    regions.into_iter().filter(|(_, size)| *size > 0).collect()
}

/// Maps memory of zeroes in these regions, address and length in bytes, which are whole pages in the order of
/// addresses.
///
/// # Errors
/// When they are not, or the host refuses the mapping.
pub fn allocate_regions(regions: &[(u64, u64)], options: Options) -> Result<GuestMemory, Error> {
    let size = total(regions);
    let mib = size >> 20;
    if options.shared && options.huge_pages == HugePages::TwoMegabytes {
        return Err(Error::SharedHugePages);
    }
    let file = options.shared.then(|| shared::memfd(size)).transpose();
    let file = file.map_err(|source| Error::Share {
        mib,
        source,
        hint: match source {
            nix::errno::Errno::EFBIG => "; allow it (`--resource-limit fsize=BYTES`)",
            _ => "",
        },
    })?;
    let memory = put_together(regions, options, |offset| match &file {
        Some(file) => Backing::Shared(FileOffset::from_arc(Arc::clone(file), offset)),
        None => Backing::Anonymous,
    })?;
    if options.huge_pages == HugePages::Transparent
        && let Err(error) = huge::advise_all(&memory)
    {
        warn!("the host has no transparent huge pages: {error}");
    }
    Ok(memory)
}

/// Maps regions of `file`, which lie there one behind the other: what the guest has not written is the file's, and
/// what it writes never gets there (MAP_PRIVATE). The file is as long; were it to become shorter, an access to
/// what is gone would be a SIGBUS. Of `options`, only whether writes are tracked means anything.
///
/// # Errors
/// When the host refuses the mapping.
pub fn map_file(
    file: &Arc<File>,
    regions: &[(u64, u64)],
    options: Options,
) -> Result<GuestMemory, Error> {
    let options = Options {
        track_dirty_pages: options.track_dirty_pages,
        ..Options::default()
    };
    put_together(regions, options, |offset| {
        Backing::Private(FileOffset::from_arc(Arc::clone(file), offset))
    })
}

/// What pages come from.
enum Backing {
    /// Nowhere: they are zero.
    Anonymous,
    /// A file that others map, too.
    Shared(FileOffset),
    /// A file that is only read.
    Private(FileOffset),
}

/// Mappings for regions that lie in their backing one behind the other.
fn put_together(
    regions: &[(u64, u64)],
    options: Options,
    backing: impl Fn(u64) -> Backing,
) -> Result<GuestMemory, Error> {
    let size = total(regions);
    let mut offset = 0_u64;
    let map = |&(start, length): &(u64, u64)| {
        let place = backing(offset);
        offset = offset.saturating_add(length);
        region(GuestAddress(start), length, place, size, options)
    };
    let regions = regions.iter().map(map).collect::<Result<Vec<_>, _>>()?;
    let memory = GuestMemoryMmap::from_regions(regions);
    let memory = memory.map_err(|source| Error::Regions {
        mib: size >> 20,
        source,
    })?;
    Ok(memory.into())
}

fn total(regions: &[(u64, u64)]) -> u64 {
    let lengths = regions.iter().map(|(_, length)| *length);
    lengths.fold(0, u64::saturating_add)
}

/// One mapping, of the `all` bytes of a guest.
fn region(
    start: GuestAddress,
    length: u64,
    backing: Backing,
    all: u64,
    options: Options,
) -> Result<GuestRegionMmap<DirtyPages>, Error> {
    let mib = all >> 20;
    let length = usize::try_from(length).map_err(|_| Error::TooLarge(mib))?;
    let pool = options.huge_pages == HugePages::TwoMegabytes;
    let flags = match (&backing, pool) {
        (Backing::Shared(_), _) => libc::MAP_SHARED | libc::MAP_NORESERVE,
        (Backing::Private(_), _) => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        (Backing::Anonymous, false) => {
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE
        }
        (Backing::Anonymous, true) => {
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB
        }
    };
    let pages = if options.track_dirty_pages {
        DirtyPages::tracking(length)
    } else {
        DirtyPages::default()
    };
    let mut mapping = MmapRegionBuilder::new_with_bitmap(length, pages)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags);
    if let Backing::Shared(place) | Backing::Private(place) = backing {
        mapping = mapping.with_file_offset(place);
    }
    let mapping = mapping.build();
    let mapping = mapping.map_err(|source| {
        if pool {
            let (needed, free) = (all.div_ceil(HUGE_PAGE), options.free_huge_pages);
            Error::HugePages {
                needed,
                free,
                source,
            }
        } else {
            Error::Map { mib, source }
        }
    })?;
    GuestRegionMmap::new(mapping, start).ok_or(Error::TooLarge(mib))
}

/// Adds room for `len` bytes that come and go in blocks, above all memory there is. Of ordinary pages
/// always: where a page of the host's pool is read, one is taken.
///
/// # Errors
/// When the host refuses the mapping.
pub fn add_hotplug(memory: &GuestMemory, len: u64, block_size: u64) -> Result<GuestMemory, Error> {
    let tracking = memory.iter().any(|region| dirty::of(region).is_tracking());
    let pages = match usize::try_from(len) {
        Ok(len) if tracking => DirtyPages::tracking(len),
        _ => DirtyPages::default(),
    };
    let failed = |source| Error::Hotplug {
        mib: len >> 20,
        source,
    };
    let end = memory.last_addr().0.max(layout::MMIO_HOLE_END);
    let start = end.checked_next_multiple_of(layout::HOTPLUG_ALIGN.max(block_size));
    let start = start.ok_or_else(|| failed(std::io::ErrorKind::InvalidInput.into()))?;
    let region = HotplugRegion::new(start, len, block_size, pages).map_err(failed)?;
    let grown = memory.with_hotplug(region);
    grown.map_err(|source| failed(std::io::Error::other(source)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryRegion as _;

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
    fn room_for_more_lies_above() {
        for (ram, start) in [(128, 4 << 30), (3072, 4 << 30), (3073, 6 << 30)] {
            let memory = allocate(ram << 20).unwrap();
            let memory = add_hotplug(&memory, 256 << 20, 2 << 20).unwrap();
            assert_eq!(memory.hotplug().unwrap().start(), start);
            let size: u64 = memory.ram().map(|region| region.len()).sum();
            assert_eq!(size, ram << 20);
        }
    }

    #[test]
    fn says_how_much_was_too_much() {
        // More than the address space of any x86-64 process with four-level paging.
        let error = allocate(1 << 48).unwrap_err().to_string();
        assert!(error.contains("268435456 MiB"), "{error}");
    }

    /// The lines of /proc/self/smaps for the mapping that holds `address`.
    fn smaps(address: usize) -> String {
        let all = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut found = String::new();
        let mut inside = false;
        for line in all.lines() {
            let range = line.split(' ').next().and_then(|word| word.split_once('-'));
            let hex = |text: &str| usize::from_str_radix(text, 16).ok();
            if let Some((Some(start), Some(end))) = range.map(|(a, b)| (hex(a), hex(b))) {
                inside = (start..end).contains(&address);
            }
            if inside {
                found.push_str(line);
                found.push('\n');
            }
        }
        found
    }

    #[test]
    fn transparent_huge_pages_are_asked_for() {
        use vm_memory::Bytes as _;
        let flags = |huge_pages| {
            let options = Options {
                huge_pages,
                ..Options::default()
            };
            let memory = allocate_with(16 << 20, options).unwrap();
            memory
                .write_slice(&vec![1; 16 << 20], GuestAddress(0))
                .unwrap();
            let address = memory.iter().next().unwrap().as_ptr() as usize;
            smaps(address + (8 << 20))
        };
        let (plain, huge) = (flags(HugePages::None), flags(HugePages::Transparent));
        let advised = |text: &str| {
            let line = text.lines().find(|line| line.starts_with("VmFlags:"));
            line.unwrap().split_whitespace().any(|flag| flag == "hg")
        };
        assert!(!advised(&plain), "{plain}");
        assert!(advised(&huge), "{huge}");
    }

    #[test]
    fn a_pool_that_is_too_small_is_named() {
        let options = Options {
            huge_pages: HugePages::TwoMegabytes,
            free_huge_pages: Some(3),
            ..Options::default()
        };
        // 1 TiB: no host of this test has reserved so much.
        let error = allocate_with(1 << 40, options).unwrap_err().to_string();
        assert!(error.contains("needs 524288 huge pages"), "{error}");
        assert!(
            error.contains("has 3 free") && error.contains("vm.nr_hugepages"),
            "{error}"
        );
    }

    #[test]
    fn writes_are_tracked_where_that_is_asked_for() {
        use vm_memory::Bytes as _;
        let write = |track_dirty_pages| {
            let options = Options {
                track_dirty_pages,
                ..Options::default()
            };
            let memory = allocate_with(1 << 20, options).unwrap();
            memory.write_slice(&[1; 10], GuestAddress(0x5ffb)).unwrap();
            memory.write_obj(1_u64, GuestAddress(0x4_0000)).unwrap();
            let region = memory.iter().next().unwrap();
            (dirty::of(region).take(), dirty::of(region).take())
        };
        let (first, second) = write(true);
        assert_eq!(first, [1 << 5 | 1 << 6, 1, 0, 0]);
        assert_eq!(second, [0; 4], "taken");
        assert_eq!(write(false), (vec![], vec![]));
    }
}

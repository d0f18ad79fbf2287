//! The initial RAM disk.

use std::fs::File;

use casemate_kernel_image::{FileRange, ReadAt};

use super::Error;
use super::image::{CopyError, copy_file};
use crate::memory::{GuestMemory, layout};

const PAGE_SIZE: u64 = 4096;

/// Where the initrd lies in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initrd {
    /// First physical address; at the start of a page.
    pub(super) start: u64,
    /// Size in bytes.
    pub(super) size: u64,
}

/// Loads the initrd as high as it may be, to leave the rest to the kernel. `limit` is the first
/// address that it may not reach.
pub(super) fn load(memory: &GuestMemory, file: &File, limit: u64) -> Result<Initrd, Error> {
    let size = ReadAt::size(file).map_err(Error::InitrdRead)?;
    if size == 0 {
        return Err(Error::InitrdEmpty);
    }
    let too_large = Error::InitrdTooLarge { size, limit };
    let start = match limit.checked_sub(size) {
        Some(start) => start & !(PAGE_SIZE - 1),
        None => return Err(too_large),
    };
    if start < layout::HIGH_MEMORY_START {
        return Err(too_large);
    }
    let range = FileRange {
        offset: 0,
        length: size,
    };
    copy_file(memory, start, file, range).map_err(|error| match error {
        CopyError::Seek(error) => Error::InitrdRead(error),
        CopyError::Copy(source) => Error::memory("the initrd", start)(source),
    })?;
    Ok(Initrd { start, size })
}

//! A file in the guest's address space: what a guest reads and writes there is the host's page cache,
//! shared with every other machine that maps the same file.
//!
//! Nothing in this process reads or writes the mapping: the bytes are the guest's alone, by KVM. So a
//! file that becomes shorter under it cannot end this process by SIGBUS; the guest's next access to
//! what is gone ends its KVM_RUN with EFAULT.

use std::fs::File;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion};

/// Addresses and sizes are multiples of this (2 MiB): what Linux maps persistent memory by.
pub const ALIGNMENT: u64 = 2 << 20;
/// What KVM maps memory by.
const PAGE: u64 = 4096;

/// Why a file is not mapped.
#[derive(Debug, Error)]
pub enum Error {
    /// There is nothing in it.
    #[error("it is empty")]
    Empty,
    /// It is larger than any address space.
    #[error("{0} bytes are more than can be mapped")]
    TooLarge(u64),
    /// The host does not map it.
    #[error("cannot map it: {0}")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
}

/// A piece of the mapping: whole pages, behind each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins in the mapping.
    pub offset: u64,
    /// Where it is in this process.
    pub host_address: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// A mapped file, and after it zeroes up to a multiple of [`ALIGNMENT`], which are this machine's alone and
/// never reach the file.
#[derive(Debug)]
pub struct FileMapping {
    file: MmapRegion,
    file_len: u64,
    padding: Option<MmapRegion>,
    size: u64,
    read_only: bool,
}

impl FileMapping {
    /// Maps the first `len` bytes of `file`, which has as many, with MAP_SHARED.
    ///
    /// # Errors
    /// When there is nothing to map, or the host refuses.
    pub fn new(file: &Arc<File>, len: u64, read_only: bool) -> Result<Self, Error> {
        if len == 0 {
            return Err(Error::Empty);
        }
        let too_large = || Error::TooLarge(len);
        let whole = len.checked_next_multiple_of(PAGE).ok_or_else(too_large)?;
        let size = len
            .checked_next_multiple_of(ALIGNMENT)
            .ok_or_else(too_large)?;
        let write = if read_only { 0 } else { libc::PROT_WRITE };
        let map = |file: Option<FileOffset>, len: u64, flags| {
            let len = usize::try_from(len).map_err(|_| too_large())?;
            let (access, flags) = (libc::PROT_READ | write, flags | libc::MAP_NORESERVE);
            MmapRegion::build(file, len, access, flags).map_err(Error::Map)
        };
        let own = FileOffset::from_arc(Arc::clone(file), 0);
        let padding = size.saturating_sub(whole);
        Ok(Self {
            // The rest of the last page is mapped with it, and zero.
            file: map(Some(own), len, libc::MAP_SHARED)?,
            file_len: whole,
            padding: (padding > 0)
                .then(|| map(None, padding, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS))
                .transpose()?,
            size,
            read_only,
        })
    }

    /// Its size in bytes, a multiple of [`ALIGNMENT`].
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the guest may only read it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Its pieces, without a gap.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> {
        let padding = self.padding.as_ref().map(|padding| Piece {
            offset: self.file_len,
            host_address: padding.as_ptr() as u64,
            len: self.size.saturating_sub(self.file_len),
        });
        let file = Piece {
            offset: 0,
            host_address: self.file.as_ptr() as u64,
            len: self.file_len,
        };
        std::iter::once(file).chain(padding)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64) -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        Arc::new(file)
    }

    #[test]
    fn is_padded_to_whole_large_pages() {
        for (len, pieces) in [
            (1, vec![(0, 4096), (4096, ALIGNMENT - 4096)]),
            (4096, vec![(0, 4096), (4096, ALIGNMENT - 4096)]),
            (ALIGNMENT - 1, vec![(0, ALIGNMENT)]),
            (ALIGNMENT, vec![(0, ALIGNMENT)]),
            (
                ALIGNMENT + 4097,
                vec![(0, ALIGNMENT + 8192), (ALIGNMENT + 8192, ALIGNMENT - 8192)],
            ),
        ] {
            let mapping = FileMapping::new(&file(len), len, false).unwrap();
            let found = mapping.pieces().map(|piece| (piece.offset, piece.len));
            assert_eq!(found.collect::<Vec<_>>(), pieces, "{len}");
            let total: u64 = mapping.pieces().map(|piece| piece.len).sum();
            assert_eq!((mapping.size(), mapping.size() % ALIGNMENT), (total, 0));
        }
    }

    #[test]
    fn refuses_what_cannot_be_mapped() {
        assert!(matches!(
            FileMapping::new(&file(0), 0, true),
            Err(Error::Empty)
        ));
        assert!(matches!(
            FileMapping::new(&file(1), u64::MAX, true),
            Err(Error::TooLarge(_))
        ));
        assert!(FileMapping::new(&file(1), 1 << 60, true).is_err());
        // A file that is open for reading alone cannot be one that a guest writes.
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(4096).unwrap();
        let readable = Arc::new(File::open(path.path()).unwrap());
        assert!(
            FileMapping::new(&readable, 4096, true)
                .unwrap()
                .is_read_only()
        );
        assert!(matches!(
            FileMapping::new(&readable, 4096, false),
            Err(Error::Map(_))
        ));
    }
}

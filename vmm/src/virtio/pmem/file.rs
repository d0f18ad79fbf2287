//! The file behind persistent memory: what it must be, and whether it still is.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::FileTypeExt as _;
use std::sync::Arc;

use log::{debug, warn};

use super::Error;
use crate::memory::cut_off::shorter;
use crate::virtio::block::lock::{self, Lock};

/// A file that was found fit, and is locked.
#[derive(Debug)]
pub struct PmemFile {
    id: String,
    file: Arc<File>,
    len: u64,
}

impl PmemFile {
    /// Takes `file` for the device `id`: as large as it is now.
    ///
    /// # Errors
    /// When the file is of the wrong kind, its size cannot be found out, or another machine has it.
    pub fn take(id: String, mut file: File, read_only: bool) -> Result<Self, Error> {
        let size = |source| Error::Size {
            id: id.clone(),
            source,
        };
        let kind = file.metadata().map_err(size)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::WrongKind { id });
        }
        match lock::take(&file, read_only) {
            Ok(Lock::Taken) => {}
            Ok(Lock::InUse) => return Err(Error::InUse { id, read_only }),
            Ok(Lock::Unsupported) => {
                warn!(
                    "pmem {id}: its file system has no locks, nothing keeps a second machine out"
                );
            }
            Err(source) => return Err(Error::Lock { id, source }),
        }
        // Unlike the metadata, the end of a block device is its size.
        let len = file.seek(SeekFrom::End(0)).map_err(size)?;
        let file = Arc::new(file);
        Ok(Self { id, file, len })
    }

    /// The device's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its length when the machine was built.
    #[allow(clippy::len_without_is_empty, reason = "an empty one is not mapped")]
    pub fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Gives up its lock. Only the device thread and a machine that is not sealed may.
    pub fn release(&self) {
        if let Err(error) = lock::release(&self.file) {
            debug!("pmem {}: its lock stays: {error}", self.id);
        }
    }

    /// Brings what was written to the disk, also what was written by the mapping (fdatasync(2)).
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// If it has become shorter than its mapping, so that a guest's access to the rest fails: in words.
    pub fn truncated(&self) -> Option<String> {
        let now = shorter(&self.file, self.len)?;
        Some(format!(
            "the file of pmem {} was cut to {now} bytes while the guest had {} of it mapped: \
             leave such files alone while a machine runs",
            self.id, self.len
        ))
    }
}

#[cfg(test)]
impl PmemFile {
    /// Any descriptor, whatever it is.
    pub(super) fn for_tests(file: File) -> Self {
        Self {
            id: "test".to_owned(),
            file: Arc::new(file),
            len: 1,
        }
    }
}

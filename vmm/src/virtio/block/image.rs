//! The file behind a disk: what it must be, and how large it is.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

use log::{debug, warn};

use super::lock::{self, Lock};
use super::{Error, SECTOR, discard};

/// A file that was found fit to be a disk, and is locked.
#[derive(Debug)]
pub struct Image {
    pub file: File,
    /// Its whole sectors.
    pub sectors: u64,
    /// Whether parts of it can be given back to the host.
    pub can_discard: bool,
}

impl Image {
    /// Takes `file` for the drive `id`. It is a disk as large as the file is now; a last piece of less than a
    /// sector is left out.
    ///
    /// # Errors
    /// When the file is of a kind that is no disk, its size cannot be found out, or another machine has it.
    pub fn take(id: &str, mut file: File, read_only: bool) -> Result<Self, Error> {
        let id = || id.to_owned();
        let size = |source| Error::Size { id: id(), source };
        let kind = file.metadata().map_err(size)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::WrongKind { id: id() });
        }
        match lock::take(&file, read_only) {
            Ok(Lock::Taken) => {}
            Ok(Lock::InUse) => {
                return Err(Error::InUse {
                    id: id(),
                    read_only,
                });
            }
            Ok(Lock::Unsupported) => {
                warn!(
                    "drive {}: its file system has no locks, nothing keeps a second machine out",
                    id()
                );
            }
            Err(source) => return Err(Error::Lock { id: id(), source }),
        }
        // Unlike the metadata, the end of a block device is its size.
        let len = file.seek(SeekFrom::End(0)).map_err(size)?;
        if i64::try_from(len).is_err() {
            return Err(size(io::ErrorKind::FileTooLarge.into()));
        }
        if !len.is_multiple_of(SECTOR) {
            warn!(
                "drive {}: {len} bytes are no whole sectors, the guest does not see the last {}",
                id(),
                len % SECTOR
            );
        }
        Ok(Self {
            sectors: len / SECTOR,
            can_discard: !read_only && discard::is_possible(&file, len),
            file,
        })
    }

    /// As [`Image::take`], for a drive that has `old` until then. Both may be one file that was opened twice, for
    /// it has grown: a lock that this machine has itself does not keep it out.
    ///
    /// # Errors
    /// As for [`Image::take`]; `old` is locked as before then.
    pub fn take_instead(id: &str, old: &File, new: File, read_only: bool) -> Result<Self, Error> {
        let inode = |file: &File| {
            let metadata = file.metadata();
            let metadata = metadata.map_err(|source| Error::Size {
                id: id.to_owned(),
                source,
            })?;
            Ok((metadata.dev(), metadata.ino()))
        };
        if inode(old)? != inode(&new)? {
            return Self::take(id, new, read_only);
        }
        let again = |source| Error::Lock {
            id: id.to_owned(),
            source,
        };
        lock::release(old).map_err(again)?;
        let taken = Self::take(id, new, read_only);
        if taken.is_err() {
            lock::take(old, read_only).map_err(again)?;
        }
        taken
    }
}

/// Ends the lock of `gone`, and sees to that of `kept`: they may be one open file. Closing it would not do: the
/// jailer's broker has the same open file.
pub fn give_back(id: &str, gone: &File, kept: &File, read_only: bool) {
    let done = lock::release(gone).and_then(|()| lock::take(kept, read_only).map(drop));
    if let Err(error) = done {
        debug!("drive {id}: the lock of an image that it has no more stays: {error}");
    }
}

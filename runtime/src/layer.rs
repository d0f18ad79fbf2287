//! The disk that takes what a machine writes to its root (`--root-size`): an empty ext4 in a sparse file. It is the
//! machine's own, and goes when the machine does.
//!
//! The guest mounts it as the upper side of its overlay, so that it sees a full disk as one (ENOSPC). Nothing that
//! the guest wrote is ever read on the host.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::rootfs::find_program;

/// Its file system.
pub const FS_TYPE: &str = "ext4";
/// Its name in the machine config.
pub const NAME: &str = "layer";
/// Smallest size in MiB: ext4's own structures need some room.
pub const MIN_MIB: u64 = 4;

/// Why there is no such disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path.
    #[error("--root-size: {what} {}: {source}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Too small.
    #[error("--root-size {0}M: less than {MIN_MIB}M")]
    TooSmall(u64),
    /// The tool is missing.
    #[error("mkfs.ext4 not found, which --root-size needs: apt install e2fsprogs")]
    NoMkfs,
    /// The tool failed.
    #[error("mkfs.ext4 failed on {}: {message}", path.display())]
    Mkfs {
        /// The file.
        path: PathBuf,
        /// Its words.
        message: String,
    },
}

/// Makes the disk at `path`, in the place of what a killed machine of the same name may have left there. Half of one is
/// left when it fails: the machine that it is for removes it, as any.
///
/// # Errors
/// See [`Error`].
pub fn make(path: &Path, size_mib: u64) -> Result<(), Error> {
    let failed = |what| {
        let path = path.to_path_buf();
        move |source| Error::Io { what, path, source }
    };
    if size_mib < MIN_MIB {
        return Err(Error::TooSmall(size_mib));
    }
    let mkfs = find_program("mkfs.ext4").ok_or(Error::NoMkfs)?;
    if let Some(directory) = path.parent() {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory);
        made.map_err(failed("cannot make the directory of"))?;
    }
    remove(path);
    let file = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(failed("cannot make"))?;
    // The command line bounds it: the product fits.
    file.set_len(size_mib.saturating_mul(1 << 20))
        .map_err(failed("cannot size"))?;
    let output = Command::new(mkfs)
        // No journal and no reserve: it does not outlive the machine, and root is who writes.
        .args([
            "-q",
            "-F",
            "-m",
            "0",
            "-O",
            "^has_journal",
            "-E",
            "nodiscard",
        ])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(failed("cannot run mkfs.ext4 on"))?;
    if !output.status.success() {
        return Err(Error::Mkfs {
            path: path.to_path_buf(),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(())
}

/// Removes it, if it is there.
pub fn remove(path: &Path) {
    // Most machines have none.
    let _ = std::fs::remove_file(path);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn it_is_sparse_and_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layers").join("a.img");
        std::fs::create_dir(dir.path().join("layers")).unwrap();
        std::fs::write(&path, "left").unwrap();
        make(&path, 64).unwrap();
        let data = std::fs::metadata(&path).unwrap();
        assert_eq!((data.len(), data.mode() & 0o777), (64 << 20, 0o600));
        assert!(data.blocks() * 512 < 8 << 20, "{} blocks", data.blocks());
        remove(&path);
        assert!(!path.exists());
    }

    #[test]
    fn one_that_is_too_small_is_refused() {
        let error = make(Path::new("/nonexistent/x"), 3)
            .unwrap_err()
            .to_string();
        assert!(error.contains("--root-size 3M"), "{error}");
    }
}

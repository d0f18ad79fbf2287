//! How far a machine may make the host's files grow.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::{SFlag, fstat};

use crate::error::{Context, Result};

/// The limit on a file's size in bytes that fits a machine which writes to `disks`: whoever takes it
/// over can fill a disk image, as the guest may, but not the host's file system by one that grows.
///
/// None if standard streams or one of `logs` go to a file: a limit that is right for the disks is not for them.
///
/// # Errors
/// What `fstat(2)` says.
pub fn limit<'a>(
    disks: impl Iterator<Item = BorrowedFd<'a>>,
    logs: impl Iterator<Item = BorrowedFd<'a>>,
) -> Result<Option<u64>> {
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let streams = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
    for stream in streams {
        if size(stream)?.is_some() {
            return Ok(None);
        }
    }
    for log in logs {
        if size(log)?.is_some() {
            return Ok(None);
        }
    }
    let mut most = 0;
    for disk in disks {
        most = most.max(size(disk)?.unwrap_or_default());
    }
    // The caller's own limit may be lower, and stays then.
    let (_, callers) = getrlimit(Resource::RLIMIT_FSIZE).doing("read limit", "fsize")?;
    Ok(Some(most.min(callers)))
}

/// A regular file's size; others have none, nor the limit a meaning for them.
fn size(file: BorrowedFd<'_>) -> Result<Option<u64>> {
    let stat = fstat(file).doing("look at", "a descriptor")?;
    let regular = SFlag::from_bits_retain(stat.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFREG;
    Ok(regular.then(|| u64::try_from(stat.st_size).unwrap_or_default()))
}

//! Who may use an image: one writer, or any number of readers.
//!
//! Open-file-description locks (fcntl(2)): the kernel drops one with the last descriptor of the machine that
//! has it, however that machine ends. Only programs that ask are kept out, as with all locks of files.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// What came of the attempt.
#[derive(Debug, PartialEq, Eq)]
pub enum Lock {
    /// The image is this machine's, to write or to read.
    Taken,
    /// Another machine uses the image in a way that excludes this one.
    InUse,
    /// The file system has no locks.
    Unsupported,
}

/// Takes the whole image, shared if it is `read_only`.
///
/// # Errors
/// What the host says.
pub fn take(image: &File, read_only: bool) -> io::Result<Lock> {
    let kind = if read_only {
        libc::F_RDLCK
    } else {
        libc::F_WRLCK
    };
    match fcntl(image, FcntlArg::F_OFD_SETLK(&whole(kind))) {
        Ok(_) => Ok(Lock::Taken),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(Lock::InUse),
        Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(Lock::Unsupported),
        Err(error) => Err(error.into()),
    }
}

/// Gives the image back, for another descriptor of this machine's to take.
///
/// # Errors
/// What the host says.
pub fn release(image: &File) -> io::Result<()> {
    match fcntl(image, FcntlArg::F_OFD_SETLK(&whole(libc::F_UNLCK))) {
        Ok(_) | Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A lock of `kind` on the whole file.
fn whole(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        // To the end, wherever it will be.
        l_len: 0,
        // Must be zero: the lock is no process's.
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writer_or_many_readers() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(image.path());
        let (first, second, third) = (open().unwrap(), open().unwrap(), open().unwrap());
        assert_eq!(take(&first, true).unwrap(), Lock::Taken);
        assert_eq!(take(&second, true).unwrap(), Lock::Taken);
        assert_eq!(take(&third, false).unwrap(), Lock::InUse);
        drop((first, second));
        assert_eq!(take(&third, false).unwrap(), Lock::Taken);
        let fourth = open().unwrap();
        assert_eq!(take(&fourth, true).unwrap(), Lock::InUse);
        // A copy of the descriptor holds it too.
        let copy = third.try_clone().unwrap();
        drop(third);
        assert_eq!(take(&fourth, false).unwrap(), Lock::InUse);
        drop(copy);
        assert_eq!(take(&fourth, false).unwrap(), Lock::Taken);
    }
}

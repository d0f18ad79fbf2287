//! Whether anybody can still write to a file.

#![allow(unsafe_code)] // Neither library has the call.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;

/// True when no descriptor or mapping that can write to the file is left in any process: the kernel grants a lease for
/// reading only then (fcntl(2), `F_SETLEASE`). The file must be open for reading alone.
///
/// # Errors
/// When the file system knows no leases.
pub fn nobody_writes(file: &File) -> io::Result<bool> {
    let set = |lease: libc::c_int| {
        // SAFETY: F_SETLEASE takes an open descriptor and an integer, and touches no memory.
        Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, lease) })
    };
    match set(libc::F_RDLCK) {
        Ok(_) => {
            // Nobody waits for it, and it ends with the descriptor at the latest.
            let _ = set(libc::F_UNLCK);
            Ok(true)
        }
        Err(Errno::EAGAIN) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    #[test]
    fn a_writer_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let writer = File::create(&path).unwrap();
        let reader = OpenOptions::new().read(true).open(&path).unwrap();
        assert!(!nobody_writes(&reader).unwrap());
        let other = writer.try_clone().unwrap();
        drop(writer);
        assert!(!nobody_writes(&reader).unwrap(), "a copy of it");
        drop(other);
        assert!(nobody_writes(&reader).unwrap());
        // Given back: it stands in nobody's way.
        drop(OpenOptions::new().write(true).open(&path).unwrap());
    }
}

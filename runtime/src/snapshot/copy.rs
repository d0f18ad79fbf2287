//! Copies of files that keep their holes, and share their blocks where the file system can.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

/// Makes `to`, which must not be there, with the content of `from`, and syncs it. It is its owner's alone.
pub fn copy(from: &File, to: &Path) -> io::Result<File> {
    let mut made = OpenOptions::new()
        .create_new(true)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(to)?;
    fill(from, &mut made)?;
    made.sync_all()?;
    Ok(made)
}

fn fill(from: &File, to: &mut File) -> io::Result<()> {
    let end = from.metadata()?.len();
    to.set_len(end)?;
    let mut at = 0;
    while let Some((start, stop)) = next_data(from, at, end)? {
        let mut source = from;
        source.seek(SeekFrom::Start(start))?;
        to.seek(SeekFrom::Start(start))?;
        // By copy_file_range(2) where both files allow it: file systems that can share blocks do so.
        let copied = io::copy(&mut source.take(stop.saturating_sub(start)), to)?;
        if copied == 0 {
            // It was cut off meanwhile.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = start.saturating_add(copied);
    }
    Ok(())
}

/// Where the next data is from `at` on, before `end`.
fn next_data(file: &File, at: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= end {
        return Ok(None);
    }
    let seek = |offset: u64, whence| {
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        lseek64(file.as_fd(), offset, whence).map(|found| u64::try_from(found).unwrap_or(end))
    };
    let start = match seek(at, Whence::SeekData) {
        // Nothing but a hole.
        Err(Errno::ENXIO) => return Ok(None),
        found => found?,
    };
    let stop = seek(start, Whence::SeekHole)?;
    Ok(Some((start, stop.min(end))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};

    #[test]
    fn holes_stay_and_data_is_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        let from = File::create_new(&path).unwrap();
        from.write_all_at(&[1; 5000], 1 << 20).unwrap();
        from.write_all_at(&[2; 300], 70 << 20).unwrap();
        from.set_len(100 << 20).unwrap();
        let from = File::open(&path).unwrap();
        let to = directory.path().join("b");
        let made = copy(&from, &to).unwrap();
        let data = made.metadata().unwrap();
        assert_eq!(
            (data.len(), data.permissions().mode() & 0o777),
            (100 << 20, 0o600)
        );
        assert!(data.blocks() * 512 < 1 << 20, "{} blocks", data.blocks());
        for (offset, length, byte) in [(1 << 20, 5000, 1), (70 << 20, 300, 2), (5 << 20, 99, 0)] {
            let mut bytes = vec![9; length];
            made.read_exact_at(&mut bytes, offset).unwrap();
            assert!(bytes.iter().all(|found| *found == byte), "{offset}");
        }
        let error = copy(&from, &to).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        let empty = File::create_new(directory.path().join("c")).unwrap();
        assert_eq!(
            copy(&empty, &directory.path().join("d"))
                .unwrap()
                .metadata()
                .unwrap()
                .len(),
            0
        );
    }
}

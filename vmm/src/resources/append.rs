//! Files that lines are appended to: the log, the metrics.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};

/// Opens a regular file, which is made if there is none, for appending; or a named pipe, whose reader may
/// come later and whose writer never waits for it.
pub fn open(path: &str) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let is_pipe = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
    if is_pipe {
        // Without reading, a pipe cannot be opened before its reader is there.
        options.read(true).write(true);
    } else {
        options.append(true).create(true).mode(0o600);
    }
    options
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn files_grow_and_pipes_do_not_wait() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        for line in ["a\n", "b\n"] {
            let mut opened = open(file.to_str().unwrap()).unwrap();
            opened.write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(file).unwrap(), "a\nb\n");
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut opened = open(pipe.to_str().unwrap()).unwrap();
        let error = loop {
            if let Err(error) = opened.write(&[0; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        open("/").unwrap_err();
    }
}

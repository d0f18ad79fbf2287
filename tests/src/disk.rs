//! Images for drives and persistent memory, and who holds them.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// The word that belongs at byte `offset` of a pattern disk.
pub fn pattern_word(offset: u64) -> u64 {
    offset ^ 0x5ca1_ab1e_0ddb_a11d
}

/// Writes a pattern disk of `sectors` sectors to `path`.
pub fn pattern_disk(path: &Path, sectors: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let mut file = BufWriter::new(file);
    for offset in (0..sectors * 512).step_by(8) {
        file.write_all(&pattern_word(offset).to_le_bytes())?;
    }
    file.flush()?;
    Ok(())
}

/// Makes an ext4 image of `size` (as of mkfs: `16M`) at `path`, with `text` in its file `hello`.
pub fn ext4_image(path: &Path, size: &str, text: &str) -> Result<()> {
    let content = tempfile::tempdir()?;
    std::fs::write(content.path().join("hello"), text)?;
    let mut command = Command::new("/sbin/mkfs.ext4");
    command.args(["-q", "-b", "4096", "-O", "^has_journal", "-d"]);
    let made = command.arg(content.path()).arg(path).arg(size).output();
    let made = made.context("mkfs.ext4 (package e2fsprogs)")?;
    ensure!(made.status.success(), "{made:?}");
    Ok(())
}

/// Whether nobody has locked the file.
pub fn is_free(path: &Path) -> Result<bool> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(lock.l_type == libc::F_UNLCK as i16)
}

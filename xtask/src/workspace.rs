//! Where things are: the checkout, and cargo's target directory.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// The target triple that `.cargo/config.toml` names; its products lie in a folder of that name.
pub const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// The root of the checkout that this program was built from.
pub fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_path_buf()
}

/// Cargo's target directory: `CARGO_TARGET_DIR`, else `target/` in the checkout.
pub fn target_dir() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) if !dir.is_empty() => root().join(dir),
        _ => root().join("target"),
    }
}

/// Where downloaded and unpacked kernels are kept.
pub fn kernels_dir() -> PathBuf {
    target_dir().join("kernels")
}

/// Waits until no other run does `work`, and keeps others from it until the lock is dropped.
///
/// # Errors
/// When the lock's file cannot be made.
pub fn lock(work: &str) -> Result<Flock<File>> {
    let dir = target_dir();
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let path = dir.join(format!(".{work}.lock"));
    let open = || {
        let file = File::options().create(true).append(true).open(&path);
        file.with_context(|| format!("open {}", path.display()))
    };
    match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((_, Errno::EWOULDBLOCK)) => say(format_args!("waiting for another run's {work}")),
        Err((_, error)) => return Err(error).with_context(|| format!("lock {}", path.display())),
    }
    Flock::lock(open()?, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("lock {}", path.display()))
}

/// A progress line, on standard error, so that a command's own output stays clean.
pub fn say(line: impl std::fmt::Display) {
    eprintln!("xtask: {line}");
}

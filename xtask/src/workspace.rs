//! Where things are: the checkout, and cargo's target directory.

use std::env;
use std::path::{Path, PathBuf};

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

/// A progress line, on standard error, so that a command's own output stays clean.
pub fn say(line: impl std::fmt::Display) {
    eprintln!("xtask: {line}");
}

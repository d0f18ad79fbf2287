//! Disks that hold the pattern which the probe verifies.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

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

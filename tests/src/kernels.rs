//! Files that are no kernels, each in its own way.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::bin;

/// Writes them to a directory that goes when it is dropped.
pub fn broken_kernels() -> (TempDir, Vec<PathBuf>) {
    let probe =
        fs::read(bin("casemate-probe")).unwrap_or_else(|error| panic!("the probe: {error}"));
    // A bzImage header that claims a payload of 100 GB: length is a u32, so 4 GiB - 1 here, and
    // an ELF whose one segment claims the full 100 GB.
    let mut bzimage = vec![0u8; 8192];
    bzimage[0x1f1] = 4;
    bzimage[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    bzimage[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    bzimage[0x211] = 1;
    bzimage[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut huge = probe.clone();
    huge[64 + 32..64 + 40].copy_from_slice(&100_000_000_000u64.to_le_bytes());
    huge[64 + 40..64 + 48].copy_from_slice(&100_000_000_000u64.to_le_bytes());
    let cases: [(&str, &[u8]); 7] = [
        ("empty", b""),
        ("text", b"This is not a kernel.\n"),
        ("short", &probe[..60]),
        ("headless", &probe[..100]),
        ("half", &probe[..probe.len() / 2]),
        ("bzimage", &bzimage),
        ("huge", &huge),
    ];
    let dir = tempfile::tempdir().unwrap_or_else(|error| panic!("no temporary directory: {error}"));
    let write = |(name, bytes): (&str, &[u8])| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        path
    };
    let paths = cases.into_iter().map(write).collect();
    (dir, paths)
}

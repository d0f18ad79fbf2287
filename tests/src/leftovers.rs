//! What a VM left on the host. What disappears while it is looked at is not left.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Every file, directory and socket below `dir`.
pub fn below(dir: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(below(&entry.path()));
        }
        found.insert(entry.path());
    }
    found
}

/// The cgroups with the name `id`, in every hierarchy.
pub fn cgroups(id: &str) -> Vec<PathBuf> {
    let all = below(Path::new("/sys/fs/cgroup"));
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name == id) && path.is_dir();
    all.into_iter().filter(named).collect()
}

/// The processes that run as `uid` or were started with the word `id`.
pub fn processes(id: &str, uid: u32) -> Vec<PathBuf> {
    let of_user = |status: &str| {
        let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        ids.is_some_and(|ids| ids.split_whitespace().any(|id| id == uid.to_string()))
    };
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let read = |name: &str| fs::read(process.path().join(name)).unwrap_or_default();
        let by_name = !id.is_empty()
            && read("cmdline")
                .split(|byte| *byte == 0)
                .any(|word| word == id.as_bytes());
        if by_name || of_user(&String::from_utf8_lossy(&read("status"))) {
            found.push(process.path());
        }
    }
    found
}

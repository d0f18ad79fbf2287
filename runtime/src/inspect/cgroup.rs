//! The cgroups of a process, with their limits.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Error;
use crate::cgroups::Hierarchies;

/// Files that hold limits, in v2 and v1.
const LIMIT_FILES: [&str; 8] = [
    "memory.max",
    "memory.limit_in_bytes",
    "memory.swap.max",
    "memory.memsw.limit_in_bytes",
    "pids.max",
    "cpu.max",
    "cpu.cfs_quota_us",
    "cpu.cfs_period_us",
];

/// Those that limit nothing without another one.
const ALONE_NO_LIMIT: [&str; 3] = [
    "cpu.cfs_period_us",
    "memory.swap.max",
    "memory.memsw.limit_in_bytes",
];

/// A cgroup with at least one limit file.
#[derive(Debug, Serialize)]
pub struct Cgroup {
    /// 1 or 2.
    pub version: u8,
    /// Its controllers; empty for v2, where the files tell.
    pub controllers: String,
    /// Its path in its hierarchy.
    pub path: String,
    /// Its limits by file.
    pub limits: BTreeMap<&'static str, String>,
}

/// Those of a process.
pub fn of_process(pid: u32) -> Result<Vec<Cgroup>, Error> {
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&path).map_err(|source| Error::Read { path, source })?;
    Ok(parse(&text, &Hierarchies::read(Path::new("/"))))
}

fn parse(text: &str, hierarchies: &Hierarchies) -> Vec<Cgroup> {
    text.lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?);
            let version = if controllers.is_empty() { 2 } else { 1 };
            let wanted: Vec<&str> = controllers.split(',').collect();
            let mount = &hierarchies
                .0
                .iter()
                .find(|one| {
                    one.version == version
                        && (version == 2 || wanted.iter().all(|name| one.has(name)))
                })?
                .mount;
            let directory = mount.join(path.trim_start_matches('/'));
            let limits: BTreeMap<&'static str, String> = LIMIT_FILES
                .into_iter()
                .filter_map(|file| {
                    let value = fs::read_to_string(directory.join(file)).ok()?;
                    Some((file, value.trim().to_string()))
                })
                .collect();
            (!limits.is_empty()).then(|| Cgroup {
                version,
                controllers: controllers.to_string(),
                path: path.to_string(),
                limits,
            })
        })
        .collect()
}

impl Cgroup {
    /// Controllers that really limit something here.
    pub fn limited(&self) -> Vec<&'static str> {
        self.limits
            .iter()
            .filter(|(file, value)| !ALONE_NO_LIMIT.contains(*file) && is_limit(value))
            .filter_map(|(file, _)| Some(file.split_once('.')?.0))
            .collect()
    }
}

fn is_limit(value: &str) -> bool {
    // v1 has a number of pages near the greatest, or -1, for "none".
    !value.starts_with("max")
        && value != "-1"
        && value.parse::<u64>().map_or(true, |number| number < 1 << 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_limit_is_not_called_one() {
        for none in ["max", "max 100000", "-1", "9223372036854771712"] {
            assert!(!is_limit(none), "{none}");
        }
        for limit in ["203423744", "34", "300000 100000"] {
            assert!(is_limit(limit), "{limit}");
        }
    }
}

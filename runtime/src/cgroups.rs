//! Which cgroup hierarchies this host has, and which limits a machine gets in them.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Name of the group above those of the machines.
pub const PARENT: &str = "casemate";
/// Microseconds of a period in which processor time is counted.
const CPU_PERIOD_US: u64 = 100_000;
/// Host memory beside the guest's own: the VMM, the broker, page tables, buffers. In MiB.
const OVERHEAD_MIB: u64 = 64;
/// Threads beside the virtual processors: control, device, helpers, broker, and the kernel's for KVM.
const EXTRA_TASKS: u64 = 32;

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// 1 or 2.
    pub version: u8,
    /// Controllers that can be used in it.
    pub controllers: Vec<String>,
    /// Where it is mounted.
    pub mount: PathBuf,
}

/// All of them.
#[derive(Debug, Clone, Default)]
pub struct Hierarchies(pub Vec<Hierarchy>);

/// How the host arranges them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// One v2 tree.
    V2,
    /// v1 trees only.
    V1,
    /// v1 trees and a v2 tree beside them.
    Hybrid,
    /// None.
    Absent,
}

/// A limit to set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// Name of the file.
    pub file: &'static str,
    /// What to write.
    pub value: String,
}

impl Hierarchy {
    /// True when this controller can be used in it.
    pub fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }
}

impl Hierarchies {
    /// Reads what is mounted under `root` (`/`, but in tests).
    pub fn read(root: &Path) -> Self {
        let table = fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
        let mut found = Vec::new();
        for line in table.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let Some(mount) = left.split(' ').nth(4) else {
                continue;
            };
            let mount = root.join(mount.trim_start_matches('/'));
            let mut right = right.split(' ');
            let (kind, options) = (right.next(), right.nth(1).unwrap_or_default());
            let (version, controllers) = match kind {
                Some("cgroup2") => {
                    let text = fs::read_to_string(mount.join("cgroup.controllers"));
                    (2, words(&text.unwrap_or_default(), ' '))
                }
                Some("cgroup") => (1, words(options, ',')),
                _ => continue,
            };
            let hierarchy = Hierarchy {
                version,
                controllers,
                mount,
            };
            if !found.contains(&hierarchy) {
                found.push(hierarchy);
            }
        }
        Self(found)
    }

    /// How they are arranged.
    pub fn layout(&self) -> Layout {
        let has = |version| self.0.iter().any(|one| one.version == version);
        match (has(1), has(2)) {
            (false, true) => Layout::V2,
            (true, false) => Layout::V1,
            (true, true) => Layout::Hybrid,
            (false, false) => Layout::Absent,
        }
    }

    /// The version of the hierarchy that has this controller.
    pub fn version_of(&self, controller: &str) -> Option<u8> {
        self.0
            .iter()
            .find(|one| one.has(controller))
            .map(|one| one.version)
    }

    /// Limits of a machine with this much memory and so many processors, as far as the host has them.
    pub fn limits(&self, memory_mib: u64, cpus: u8) -> Vec<Limit> {
        let bytes = memory_mib
            .saturating_add(memory_mib / 64)
            .saturating_add(OVERHEAD_MIB)
            .saturating_mul(1 << 20);
        let tasks = u64::from(cpus).saturating_add(EXTRA_TASKS);
        // One processor more than the guest has, for its devices.
        let quota = u64::from(cpus)
            .saturating_add(1)
            .saturating_mul(CPU_PERIOD_US);
        let limit = |file, value| Limit { file, value };
        let mut limits = Vec::new();
        match self.version_of("memory") {
            Some(2) => limits.push(limit("memory.max", bytes.to_string())),
            Some(_) => limits.push(limit("memory.limit_in_bytes", bytes.to_string())),
            None => {}
        }
        if self.version_of("pids").is_some() {
            limits.push(limit("pids.max", tasks.to_string()));
        }
        match self.version_of("cpu") {
            Some(2) => limits.push(limit("cpu.max", format!("{quota} {CPU_PERIOD_US}"))),
            Some(_) => {
                limits.push(limit("cpu.cfs_period_us", CPU_PERIOD_US.to_string()));
                limits.push(limit("cpu.cfs_quota_us", quota.to_string()));
            }
            None => {}
        }
        limits
    }

    /// Every directory that a machine may have.
    pub fn directories(&self, id: &str) -> Vec<PathBuf> {
        let mut directories: Vec<PathBuf> = self
            .0
            .iter()
            .map(|one| one.mount.join(PARENT).join(id))
            .collect();
        directories.sort();
        directories.dedup();
        directories
    }
}

fn words(text: &str, separator: char) -> Vec<String> {
    text.trim()
        .split(separator)
        .filter(|word| !word.is_empty())
        .map(str::to_string)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(mountinfo: &str, controllers: &[(&str, &str)]) -> Hierarchies {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc/self")).unwrap();
        fs::write(root.path().join("proc/self/mountinfo"), mountinfo).unwrap();
        for (mount, names) in controllers {
            let mount = root.path().join(mount);
            fs::create_dir_all(&mount).unwrap();
            fs::write(mount.join("cgroup.controllers"), names).unwrap();
        }
        Hierarchies::read(root.path())
    }

    const V1: &str = "30 29 0:26 / /sys/fs/cgroup/cpu rw,nosuid shared:9 - cgroup cgroup rw,cpu\n\
                      31 29 0:27 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n";

    #[test]
    fn a_pure_v2_host_has_all_limits() {
        let host = host(
            "30 29 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n",
            &[("sys/fs/cgroup", "cpuset cpu io memory pids\n")],
        );
        assert_eq!(host.layout(), Layout::V2);
        let limits = host.limits(128, 2);
        assert_eq!(
            limits
                .iter()
                .map(|limit| (limit.file, limit.value.as_str()))
                .collect::<Vec<_>>(),
            [
                ("memory.max", "203423744"),
                ("pids.max", "34"),
                ("cpu.max", "300000 100000")
            ]
        );
    }

    #[test]
    fn a_hybrid_host_has_what_its_v1_trees_have() {
        let v2 = "32 29 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let host = host(
            &format!("{V1}{v2}"),
            &[("sys/fs/cgroup/unified", "hugetlb\n")],
        );
        assert_eq!(host.layout(), Layout::Hybrid);
        let files: Vec<_> = host.limits(128, 1).iter().map(|limit| limit.file).collect();
        assert_eq!(
            files,
            [
                "memory.limit_in_bytes",
                "cpu.cfs_period_us",
                "cpu.cfs_quota_us"
            ]
        );
        assert_eq!(host.directories("x").len(), 3);
    }

    #[test]
    fn a_host_without_cgroups_has_none() {
        let host = host("", &[]);
        assert_eq!(host.layout(), Layout::Absent);
        assert!(host.limits(1, 1).is_empty());
    }
}

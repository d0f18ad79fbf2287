//! Which cgroup hierarchies this host has, and which limits a machine gets in them.

use std::fs;
use std::io;
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

/// Memory of a monitor, which carries bytes from one descriptor to another.
const MONITOR_BYTES: u64 = 64 << 20;
/// Tasks of a monitor: itself.
const MONITOR_TASKS: u64 = 4;
/// Controllers without which a machine would have no bounds.
const NEEDED: [&str; 3] = ["memory", "pids", "cpu"];

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
    /// Whether the host may lack the file.
    pub optional: bool,
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

    /// The controllers that a machine's limits need and this host does not offer.
    pub fn missing(&self) -> Vec<&'static str> {
        let mut missing = NEEDED.to_vec();
        missing.retain(|controller| self.version_of(controller).is_none());
        missing
    }

    /// Limits of a machine with this much memory and so many processors, as far as the host has them.
    pub fn limits(&self, memory_mib: u64, cpus: u8) -> Vec<Limit> {
        let bytes = memory_mib
            .saturating_add(memory_mib / 64)
            .saturating_add(OVERHEAD_MIB)
            .saturating_mul(1 << 20);
        let tasks = u64::from(cpus).saturating_add(EXTRA_TASKS);
        // One processor more than the guest has, for its devices.
        self.bounds(bytes, tasks, u64::from(cpus).saturating_add(1))
    }

    /// Limits of a machine's monitor.
    pub fn monitor_limits(&self) -> Vec<Limit> {
        self.bounds(MONITOR_BYTES, MONITOR_TASKS, 1)
    }

    fn bounds(&self, bytes: u64, tasks: u64, cpus: u64) -> Vec<Limit> {
        let quota = cpus.saturating_mul(CPU_PERIOD_US);
        let limit = |file, value: String| Limit {
            file,
            value,
            optional: false,
        };
        // Without one of swap, what memory has no room for would fill the host's. Only where the kernel counts it.
        let swap = |file, value: String| Limit {
            file,
            value,
            optional: true,
        };
        let mut limits = Vec::new();
        match self.version_of("memory") {
            Some(2) => {
                limits.push(limit("memory.max", bytes.to_string()));
                limits.push(swap("memory.swap.max", "0".to_string()));
            }
            Some(_) => {
                limits.push(limit("memory.limit_in_bytes", bytes.to_string()));
                // Of both together, and thus never less.
                limits.push(swap("memory.memsw.limit_in_bytes", bytes.to_string()));
            }
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

    /// Moves a machine's monitor into cgroups of its own, with limits. The error names the file.
    pub fn confine_monitor(&self, id: &str, pid: u32) -> Result<(), (PathBuf, io::Error)> {
        let at = |path: &Path| {
            let path = path.to_path_buf();
            move |error| (path, error)
        };
        let write = |path: PathBuf, text: &str| fs::write(&path, text).map_err(at(&path));
        let limits = self.monitor_limits();
        for hierarchy in &self.0 {
            let own = limits.iter().filter(|limit| {
                let controller = limit.file.split('.').next().unwrap_or_default();
                self.0.iter().find(|one| one.has(controller)) == Some(hierarchy)
            });
            let own: Vec<&Limit> = own.collect();
            if own.is_empty() {
                continue;
            }
            let parent = hierarchy.mount.join(PARENT);
            let directory = parent.join(monitor_group(id));
            fs::create_dir_all(&parent).map_err(at(&parent))?;
            if hierarchy.version == 2 {
                for holder in [&hierarchy.mount, &parent] {
                    let file = holder.join("cgroup.subtree_control");
                    for controller in NEEDED.iter().filter(|name| hierarchy.has(name)) {
                        write(file.clone(), &format!("+{controller}"))?;
                    }
                }
            }
            fs::create_dir_all(&directory).map_err(at(&directory))?;
            for limit in own {
                let file = directory.join(limit.file);
                if !limit.optional || file.exists() {
                    write(file, &limit.value)?;
                }
            }
            write(directory.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

    /// Every directory that a machine may have.
    pub fn directories(&self, id: &str) -> Vec<PathBuf> {
        let mut directories: Vec<PathBuf> = self
            .0
            .iter()
            .map(|one| one.mount.join(PARENT))
            .flat_map(|parent| [parent.join(id), parent.join(monitor_group(id))])
            .collect();
        directories.sort();
        directories.dedup();
        directories
    }
}

/// No machine has this name: ids have no dot.
fn monitor_group(id: &str) -> String {
    format!("{id}.monitor")
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
        assert!(host.missing().is_empty());
        let limits = host.limits(128, 2);
        assert_eq!(
            limits
                .iter()
                .map(|limit| (limit.file, limit.value.as_str()))
                .collect::<Vec<_>>(),
            [
                ("memory.max", "203423744"),
                ("memory.swap.max", "0"),
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
                "memory.memsw.limit_in_bytes",
                "cpu.cfs_period_us",
                "cpu.cfs_quota_us"
            ]
        );
        assert_eq!(host.directories("x").len(), 6);
        // Named, so that nobody starts a machine that may have as many tasks as it likes without knowing.
        assert_eq!(host.missing(), ["pids"]);
    }

    #[test]
    fn a_host_without_cgroups_has_none() {
        let host = host("", &[]);
        assert_eq!(host.layout(), Layout::Absent);
        assert!(host.limits(1, 1).is_empty());
        assert_eq!(host.missing(), NEEDED);
    }
}

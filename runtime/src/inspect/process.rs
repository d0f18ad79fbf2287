//! One process, from `/proc/PID` (proc(5)).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Error, Role};
use crate::state::process::{all, of_user};

/// A process.
#[derive(Debug, Serialize)]
pub struct Process {
    /// What it is there for.
    pub role: Role,
    /// Its id on the host.
    pub pid: u32,
    /// Real, effective, saved and file system user ids.
    pub uids: Vec<u32>,
    /// Likewise group ids.
    pub gids: Vec<u32>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// User id map of its user namespace.
    pub uid_map: String,
    /// Group id map likewise.
    pub gid_map: String,
    /// Every thread.
    pub threads: Vec<Thread>,
    /// Each namespace, and whether it is another than the host's.
    pub namespaces: BTreeMap<String, bool>,
    /// Its root directory.
    pub root: Root,
    /// Its open descriptors.
    pub descriptors: Vec<Descriptor>,
    /// Limits, soft and hard.
    pub limits: BTreeMap<String, String>,
}

/// A thread.
#[derive(Debug, Serialize)]
pub struct Thread {
    /// Its id on the host.
    pub tid: u32,
    /// Its name.
    pub name: String,
    /// 0 none, 1 strict, 2 filter.
    pub seccomp_mode: u32,
    /// How many filters are stacked; 0 on kernels that do not tell (before Linux 5.9).
    pub seccomp_filters: u32,
    /// Whether it can gain privileges by exec.
    pub no_new_privs: bool,
    /// The five capability sets, as masks.
    pub capabilities: Capabilities,
}

/// Masks of capabilities(7).
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// Inheritable.
    pub inheritable: u64,
    /// Permitted.
    pub permitted: u64,
    /// Effective.
    pub effective: u64,
    /// Bounding.
    pub bounding: u64,
    /// Ambient.
    pub ambient: u64,
}

impl Capabilities {
    /// True when all sets are empty.
    pub fn are_none(&self) -> bool {
        *self == Self::default()
    }
}

/// A root directory.
#[derive(Debug, Serialize)]
pub struct Root {
    /// Whether it is another mount or directory than the host's.
    pub own: bool,
    /// What is in it; cut after a few.
    pub entries: Vec<String>,
    /// Flags of the mount.
    pub mount_flags: String,
    /// Type of its file system.
    pub fs_type: String,
    /// How many mounts the process sees.
    pub mounts: usize,
}

/// An open descriptor.
#[derive(Debug, Serialize)]
pub struct Descriptor {
    /// Its number.
    pub number: u32,
    /// What it is.
    pub what: String,
    /// `r`, `w`, `rw` or `path`.
    pub access: &'static str,
    /// Whether it is a directory.
    pub directory: bool,
}

/// Entries of a root directory that are listed at most.
const MAX_ENTRIES: usize = 8;

/// The machine's processes: the jailer's tree, and the others of the machine's user.
pub fn find(uid: u32, jailer: u32) -> Vec<(Role, u32)> {
    let parents: Vec<(u32, u32)> = all()
        .into_iter()
        .filter_map(|pid| Some((pid, parent(pid)?)))
        .collect();
    let mut tree = vec![jailer];
    // The tree is two or three deep; the list only grows, so this ends.
    let mut next = 0;
    while let Some(&above) = tree.get(next) {
        tree.extend(
            parents
                .iter()
                .filter(|(_, parent)| *parent == above)
                .map(|(pid, _)| *pid),
        );
        next = next.saturating_add(1);
    }
    let mut found: Vec<(Role, u32)> = tree
        .iter()
        .filter(|pid| Path::new(&format!("/proc/{pid}/status")).exists())
        .map(|pid| {
            if has_vcpu(*pid) {
                (Role::Vmm, *pid)
            } else {
                (Role::Broker, *pid)
            }
        })
        .collect();
    let others = of_user(uid).into_iter().filter(|pid| !tree.contains(pid));
    found.extend(others.map(|pid| (Role::Monitor, pid)));
    found
}

fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    field(&status, "PPid")?.parse().ok()
}

fn has_vcpu(pid: u32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
        .any(|task| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("vcpu"))
        })
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::Read {
        path: path.to_path_buf(),
        source,
    })
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

fn numbers(status: &str, name: &str) -> Vec<u32> {
    field(status, name)
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect()
}

impl Process {
    /// Reads everything about it.
    pub fn read(role: Role, pid: u32) -> Result<Self, Error> {
        let directory = PathBuf::from(format!("/proc/{pid}"));
        let status = read(&directory.join("status"))?;
        let map = |name| {
            let text = fs::read_to_string(directory.join(name)).unwrap_or_default();
            text.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        Ok(Self {
            role,
            pid,
            uids: numbers(&status, "Uid"),
            gids: numbers(&status, "Gid"),
            groups: numbers(&status, "Groups"),
            uid_map: map("uid_map"),
            gid_map: map("gid_map"),
            threads: threads(&directory)?,
            namespaces: namespaces(&directory),
            root: root(&directory)?,
            descriptors: descriptors(&directory)?,
            limits: limits(&read(&directory.join("limits"))?),
        })
    }
}

fn threads(directory: &Path) -> Result<Vec<Thread>, Error> {
    let mut threads = Vec::new();
    for tid in sorted_numbers(&directory.join("task"))? {
        let status = read(&directory.join("task").join(tid.to_string()).join("status"))?;
        threads.push(thread(tid, &status));
    }
    Ok(threads)
}

fn thread(tid: u32, status: &str) -> Thread {
    let number = |name| {
        field(status, name)
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    };
    // What cannot be read counts as everything: a report must not call missing what it did not see.
    let mask = |name| {
        field(status, name)
            .and_then(|text| u64::from_str_radix(text, 16).ok())
            .unwrap_or(u64::MAX)
    };
    Thread {
        tid,
        name: field(status, "Name").unwrap_or_default().to_string(),
        seccomp_mode: number("Seccomp"),
        seccomp_filters: number("Seccomp_filters"),
        no_new_privs: number("NoNewPrivs") == 1,
        capabilities: Capabilities {
            inheritable: mask("CapInh"),
            permitted: mask("CapPrm"),
            effective: mask("CapEff"),
            bounding: mask("CapBnd"),
            ambient: mask("CapAmb"),
        },
    }
}

fn sorted_numbers(directory: &Path) -> Result<Vec<u32>, Error> {
    let entries = fs::read_dir(directory).map_err(|source| Error::Read {
        path: directory.to_path_buf(),
        source,
    })?;
    let mut numbers: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Compared with process 1, or with this one where that may not be looked at.
fn namespaces(directory: &Path) -> BTreeMap<String, bool> {
    let link = |base: &Path, kind: &str| fs::read_link(base.join("ns").join(kind)).ok();
    ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"]
        .into_iter()
        .filter_map(|kind| {
            let its = link(directory, kind)?;
            let host =
                link(Path::new("/proc/1"), kind).or_else(|| link(Path::new("/proc/self"), kind))?;
            Some((kind.to_string(), its != host))
        })
        .collect()
}

fn root(directory: &Path) -> Result<Root, Error> {
    use std::os::unix::fs::MetadataExt;
    // The trailing slash goes through the link, into the process's own view.
    let path = directory.join("root/");
    let failed = |source| Error::Read {
        path: path.clone(),
        source,
    };
    let entries = fs::read_dir(&path)
        .map_err(failed)?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .take(MAX_ENTRIES)
        .collect();
    let own = match (fs::metadata(&path), fs::metadata("/")) {
        (Ok(its), Ok(host)) => (its.dev(), its.ino()) != (host.dev(), host.ino()),
        _ => false,
    };
    let table = read(&directory.join("mountinfo"))?;
    let (mount_flags, fs_type) = root_mount(&table);
    Ok(Root {
        own,
        entries,
        mount_flags,
        fs_type,
        mounts: table.lines().count(),
    })
}

/// Flags and type of the last mount on `/`, the one that is seen.
fn root_mount(table: &str) -> (String, String) {
    table
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut left = left.split(' ').skip(4);
            let (place, flags) = (left.next()?, left.next()?);
            let fs_type = right.split(' ').next()?;
            (place == "/").then(|| (flags.to_string(), fs_type.to_string()))
        })
        .next_back()
        .unwrap_or_default()
}

fn descriptors(directory: &Path) -> Result<Vec<Descriptor>, Error> {
    let mut found = Vec::new();
    for number in sorted_numbers(&directory.join("fd"))? {
        let link = directory.join("fd").join(number.to_string());
        // One that was closed meanwhile is none.
        let Ok(target) = fs::read_link(&link) else {
            continue;
        };
        let info = fs::read_to_string(directory.join("fdinfo").join(number.to_string()))
            .unwrap_or_default();
        let flags = field(&info, "flags").and_then(|text| u32::from_str_radix(text, 8).ok());
        found.push(Descriptor {
            number,
            what: target.to_string_lossy().into_owned(),
            access: access(flags.unwrap_or(0)),
            directory: fs::metadata(&link).is_ok_and(|metadata| metadata.is_dir()),
        });
    }
    Ok(found)
}

fn access(flags: u32) -> &'static str {
    if flags & 0o10_000_000 != 0 {
        return "path";
    }
    match flags & 3 {
        0 => "r",
        1 => "w",
        _ => "rw",
    }
}

fn limits(table: &str) -> BTreeMap<String, String> {
    let shown = [
        ("Max address space", "address space"),
        ("Max core file size", "core file"),
        ("Max file size", "file size"),
        ("Max locked memory", "locked memory"),
        ("Max open files", "open files"),
        ("Max processes", "processes"),
    ];
    shown
        .into_iter()
        .filter_map(|(long, short)| {
            let line = table.lines().find_map(|line| line.strip_prefix(long))?;
            let mut words = line.split_whitespace();
            let (soft, hard) = (words.next()?, words.next()?);
            let text = if soft == hard {
                soft.to_string()
            } else {
                format!("{soft} (hard {hard})")
            };
            Some((short.to_string(), text))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_read() {
        let status = "Name:\tvcpu0\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t3\nCapInh:\t0000000000000000\n\
                      CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t00000000000000ff\nCapAmb:\t0000000000000000\n";
        let thread = thread(7, status);
        assert_eq!(
            (
                thread.name.as_str(),
                thread.seccomp_mode,
                thread.seccomp_filters
            ),
            ("vcpu0", 2, 3)
        );
        assert!(thread.no_new_privs && !thread.capabilities.are_none());
        assert_eq!(thread.capabilities.bounding, 0xff);
    }

    #[test]
    fn what_is_not_there_is_not_called_confined() {
        let thread = thread(1, "");
        assert!(!thread.capabilities.are_none() && !thread.no_new_privs);
        assert_eq!(thread.seccomp_mode, 0);
    }

    #[test]
    fn this_process_can_be_read() {
        let own = Process::read(Role::Monitor, std::process::id()).unwrap();
        assert!(!own.threads.is_empty() && !own.descriptors.is_empty());
        assert!(!own.root.own && !own.root.entries.is_empty());
        assert!(own.limits.contains_key("open files"));
    }

    #[test]
    fn the_last_mount_on_the_root_counts() {
        let table = "1 0 0:1 / / rw - rootfs none rw\n2 1 0:2 / / ro,nosuid,nodev,noexec - tmpfs x ro\n3 2 0:3 / /x rw - proc p rw\n";
        assert_eq!(
            root_mount(table),
            ("ro,nosuid,nodev,noexec".to_string(), "tmpfs".to_string())
        );
    }

    #[test]
    fn access_modes() {
        assert_eq!(
            [
                access(0o100_000),
                access(0o1),
                access(0o100_002),
                access(0o10_000_000)
            ],
            ["r", "w", "rw", "path"]
        );
    }
}

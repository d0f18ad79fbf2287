//! Jails with a prisoner in them, and what `/proc` says of their processes.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use casemate_tests::{Running, Vm, bin, unique_id};
use tempfile::TempDir;

/// Everything here is over much sooner, or hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A jail with the prisoner where the VMM would be.
pub struct Jail {
    pub command: Command,
    pub directory: TempDir,
    pub user: u32,
}

/// A user (and group) that nobody else has.
pub fn user() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let offset = NEXT.fetch_add(1, Ordering::Relaxed);
    1_000_000 + (std::process::id() % 10_000) * 100 + offset
}

/// A microVM with a user of its own, which the harness's other ones share.
pub fn with_user(vm: Vm, user: u32) -> Vm {
    let user = user.to_string();
    let arguments = ["--uid", &user, "--gid", &user];
    arguments.iter().fold(vm, |vm, word| vm.jailer_arg(word))
}

impl Jail {
    pub fn new() -> Self {
        let user = user();
        let id = unique_id("prisoner");
        let directory = tempfile::Builder::new()
            .prefix("casemate-test-")
            .tempdir()
            .unwrap();
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(directory.path(), open).unwrap();
        let mut command = Command::new(bin("casemate-jailer"));
        command
            .args(["--id", &id, "--exec-file"])
            .arg(env!("CARGO_BIN_EXE_casemate-prisoner"))
            .args(["--uid", &user.to_string(), "--gid", &user.to_string()]);
        Self {
            command,
            directory,
            user,
        }
    }

    /// More of the jailer's arguments.
    pub fn args<T: AsRef<std::ffi::OsStr>>(mut self, arguments: &[T]) -> Self {
        self.command.args(arguments);
        self
    }

    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    /// A file in the jail's directory, open to everybody.
    pub fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        fs::create_dir_all(Path::new(&path).parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        path
    }

    /// Starts the prisoner with these words.
    pub fn start(mut self, words: &[&str]) -> Running {
        self.command.arg("--").args(words);
        Running::start(self.command, Some(self.directory)).unwrap()
    }
}

/// The process that the jailer has become, or its child.
pub fn prisoner_of(running: &Running) -> u32 {
    let jailer = running.pid().as_raw().unsigned_abs();
    children(jailer).first().copied().unwrap_or(jailer)
}

/// Waits until something holds.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn stat(pid: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit(')').next()?.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.next()?.parse().ok()?))
}

pub fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != 'Z' && state != 'X')
}

pub fn children(pid: u32) -> Vec<u32> {
    processes()
        .filter(|process| stat(*process).is_some_and(|(_, parent)| parent == pid))
        .collect()
}

/// Every process of that user.
pub fn processes_of(user: u32) -> Vec<u32> {
    let owned = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status"));
        status.is_ok_and(|text| {
            text.lines()
                .filter(|line| line.starts_with("Uid:"))
                .any(|line| line.split_whitespace().any(|id| id == user.to_string()))
        })
    };
    processes().filter(owned).collect()
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// A field of a process's or thread's `status`.
pub fn status(path: &str, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{path}/status")).unwrap();
    let prefix = format!("{field}:");
    let line = text.lines().find_map(|line| line.strip_prefix(&prefix));
    let words = line.unwrap_or_default().split_whitespace();
    words.collect::<Vec<_>>().join(" ")
}

/// Names of threads, of which kernel threads are not ours (KVM's `kvm-nx-lpage-re` is one).
pub fn threads(pid: u32) -> BTreeMap<u32, String> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let named = |entry: fs::DirEntry| {
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        Some((
            entry.file_name().to_str()?.parse().ok()?,
            name.trim().to_owned(),
        ))
    };
    let mut all: BTreeMap<u32, String> = entries.filter_map(named).collect();
    all.retain(|_, name| !name.starts_with("kvm-nx-lpage"));
    all
}

/// What each open descriptor leads to.
pub fn descriptors(pid: u32) -> BTreeMap<u32, PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let target = |entry: fs::DirEntry| {
        Some((
            entry.file_name().to_str()?.parse().ok()?,
            fs::read_link(entry.path()).ok()?,
        ))
    };
    entries.filter_map(target).collect()
}

pub fn namespace(pid: u32, kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap()
}

/// What must hold for each process of a jail, whatever it runs.
#[track_caller]
pub fn assert_confined(pid: u32, user: u32) {
    let path = pid.to_string();
    let ids = format!("{user} {user} {user} {user}");
    for thread in threads(pid).keys() {
        let thread = format!("{pid}/task/{thread}");
        assert_eq!(status(&thread, "Uid"), ids);
        assert_eq!(status(&thread, "Gid"), ids);
        assert_eq!(status(&thread, "Groups"), "");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(&thread, set), "0000000000000000", "{set}");
        }
        assert_eq!(status(&thread, "NoNewPrivs"), "1");
    }
    for kind in ["net", "mnt", "ipc", "uts", "cgroup"] {
        let host = namespace(std::process::id(), kind);
        assert_ne!(namespace(pid, kind), host, "{kind}");
    }
    let read = |name: &str| fs::read_to_string(format!("/proc/{path}/{name}")).unwrap();
    let root = fs::read_dir(format!("/proc/{path}/root/")).unwrap();
    assert_eq!(root.count(), 0, "the root is not empty");
    let mounts = read("mounts");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for option in ["tmpfs", "ro,", "nosuid", "nodev", "noexec"] {
        assert!(mounts.contains(option), "{option} in {mounts}");
    }
    let interfaces = read("net/dev");
    assert_eq!(interfaces.lines().count(), 3, "lo alone: {interfaces}");
    let limits = read("limits");
    let hard = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().split_whitespace().nth(1).unwrap().to_owned()
    };
    assert!(["0", "1"].contains(&hard("Max core file size").as_str()));
    assert!(hard("Max open files").parse::<u32>().unwrap() <= 2048);
}

/// No directory, and nothing by which a path could be opened.
#[track_caller]
pub fn assert_no_way_out(pid: u32) {
    for (number, target) in descriptors(pid) {
        let Ok(metadata) = fs::metadata(format!("/proc/{pid}/fd/{number}")) else {
            continue;
        };
        assert!(!metadata.is_dir(), "{number} is {target:?}");
    }
}

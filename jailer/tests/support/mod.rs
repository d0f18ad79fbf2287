//! Starts jails, looks at them from outside, and leaves nothing behind.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

pub const JAILER: &str = env!("CARGO_BIN_EXE_casemate-jailer");
pub const PROBE: &str = env!("CARGO_BIN_EXE_jail-probe");

/// Nothing here takes longer than this unless it hangs.
pub const LIMIT: Duration = Duration::from_secs(20);

/// A uid (and gid) that no other test uses.
pub fn user() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let offset = NEXT.fetch_add(1, Ordering::Relaxed);
    700_000 + (std::process::id() % 10_000) * 100 + offset
}

/// A machine id that no other test run uses.
pub fn id(name: &str) -> String {
    format!("jt-{}-{name}", std::process::id())
}

/// A directory that the machine's user can enter, removed at the end.
pub fn directory() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// A jailer that will exec the probe.
pub struct Jail {
    pub id: String,
    pub user: u32,
    pub command: Command,
}

/// A jailer that runs.
pub struct Running {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    /// The probe's line.
    pub report: Value,
    cgroups: Vec<PathBuf>,
}

impl Jail {
    pub fn new(name: &str) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "the jailer's tests need root"
        );
        let (id, user) = (id(name), user());
        let mut command = Command::new(JAILER);
        command
            .args(["--id", &id, "--exec-file", PROBE])
            .args(["--uid", &user.to_string(), "--gid", &user.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Self { id, user, command }
    }

    pub fn args(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    /// Starts it, and waits for the probe's line.
    pub fn start(mut self, words: &[&str]) -> Running {
        self.command.arg("--").args(words);
        let mut child = self.command.spawn().unwrap();
        let stdin = child.stdin.take();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        if line.is_empty() {
            let mut text = String::new();
            child
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut text)
                .unwrap();
            panic!("no report; the jailer says: {text}");
        }
        Running {
            child,
            stdin,
            report: serde_json::from_str(&line).unwrap(),
            cgroups: cgroups_of(&self.id),
        }
    }

    /// Runs it to its end: exit code and what it said on standard error.
    pub fn finish(mut self, words: &[&str]) -> (i32, String) {
        self.command.arg("--").args(words).stdin(Stdio::null());
        let mut child = self.command.spawn().unwrap();
        let code = wait(&mut child);
        let mut text = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        remove_cgroups(&cgroups_of(&self.id));
        (code, text.trim_end().to_owned())
    }
}

impl Running {
    /// The VMM: the jailer itself, or its only child.
    pub fn vmm(&self) -> u32 {
        children(self.child.id())
            .first()
            .copied()
            .unwrap_or(self.child.id())
    }

    /// Lets the probe go, and returns the exit code.
    pub fn end(mut self) -> i32 {
        self.stdin = None;
        wait(&mut self.child)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Also when the test has failed; kills the VMM with its parent.
        let _ = self.child.kill();
        let _ = self.child.wait();
        remove_cgroups(&self.cgroups);
    }
}

/// The exit code, within the limit.
pub fn wait(child: &mut Child) -> i32 {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().unwrap_or(-1);
        }
        if started.elapsed() > LIMIT {
            let _ = child.kill();
            panic!("the jailer has not ended within {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A field of `/proc/<pid>/status`.
pub fn status(pid: u32, field: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with(&format!("{field}:")))
        .unwrap();
    line.split_once(':')
        .unwrap()
        .1
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

pub fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .trim_start()
            .starts_with('Z')
    })
}

pub fn children(pid: u32) -> Vec<u32> {
    let parent_of = |entry: std::io::Result<std::fs::DirEntry>| {
        let child: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).ok()?;
        let parent: u32 = stat
            .rsplit(')')
            .next()?
            .split_whitespace()
            .nth(1)?
            .parse()
            .ok()?;
        (parent == pid).then_some(child)
    };
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(parent_of)
        .collect()
}

pub fn namespace(pid: u32, kind: &str) -> PathBuf {
    std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap()
}

/// Directories named like the machine, in every cgroup hierarchy, two levels below its root.
pub fn cgroups_of(id: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    for line in mounts
        .lines()
        .filter(|line| line.split(' ').nth(2).unwrap().starts_with("cgroup"))
    {
        let mount = Path::new(line.split(' ').nth(1).unwrap());
        for entry in std::fs::read_dir(mount).into_iter().flatten().flatten() {
            let directory = entry.path().join(id);
            if directory.is_dir() {
                found.push(directory);
            }
        }
    }
    found
}

/// Removes them; their processes have ended or are about to.
pub fn remove_cgroups(directories: &[PathBuf]) {
    for directory in directories {
        for _ in 0..500 {
            if std::fs::remove_dir(directory).is_ok() || !directory.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // The parent, if no other machine uses it.
        let _ = std::fs::remove_dir(directory.parent().unwrap());
    }
}

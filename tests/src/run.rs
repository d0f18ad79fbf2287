//! `casemate` as a user runs it, with kernels and a root file system from the environment.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::leftovers::below;
use crate::process::{Finished, Running};
use crate::unique_id;
use crate::vm::bin;

fn from_environment(name: &str) -> PathBuf {
    std::env::var_os(name).map_or_else(
        || panic!("{name} is not set: start these tests with `cargo xtask test --tier linux`"),
        PathBuf::from,
    )
}

/// A busybox root file system.
pub fn rootfs() -> PathBuf {
    from_environment("CASEMATE_TEST_ROOTFS")
}

/// The file of a registered kernel: an ELF image.
pub fn kernel_file(name: &str) -> PathBuf {
    from_environment("CASEMATE_DATA_DIR")
        .join("kernels")
        .join(name)
        .join("vmlinux")
}

/// The modules of the cloud kernel called `names`, each with those that it depends on before it; an error names what
/// is missing.
pub fn modules(names: &[&str]) -> Result<Vec<PathBuf>> {
    let directory = from_environment("CASEMATE_DATA_DIR").join("kernels/cloud/modules");
    let files = below(&directory);
    let mut order = Vec::new();
    for name in names {
        add_module(name, &files, &mut order)?;
    }
    Ok(order)
}

fn add_module(name: &str, files: &BTreeSet<PathBuf>, order: &mut Vec<PathBuf>) -> Result<()> {
    let normal = |name: &str| name.replace('-', "_");
    let is_it = |path: &&PathBuf| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        path.extension().is_some_and(|end| end == "ko") && normal(&stem) == normal(name)
    };
    let file = files.iter().find(is_it);
    let file = file.with_context(|| format!("the kernel has no module {name}"))?;
    if order.contains(file) {
        return Ok(());
    }
    let bytes = std::fs::read(file)?;
    let line = bytes.split(|byte| *byte == 0);
    let depends = line.filter_map(|line| std::str::from_utf8(line).ok()?.strip_prefix("depends="));
    for other in depends.flat_map(|list| list.split(',')) {
        if !other.is_empty() {
            add_module(other, files, order)?;
        }
    }
    order.push(file.clone());
    Ok(())
}

/// A kernel's bzImage, as the distribution packages it.
pub fn packaged_kernel() -> PathBuf {
    from_environment("CASEMATE_TEST_BZIMAGE")
}

/// `casemate` with a state directory of its own, so that what is left behind shows.
pub struct Casemate {
    state: TempDir,
    /// Where its data is, if not where the environment says.
    data: Option<PathBuf>,
    /// User ids that no other test's machines have: a machine's end is the end of its user's processes.
    uids: String,
}

/// How many machines of one [`Casemate`] may run at once.
const MACHINES: u32 = 8;

impl Default for Casemate {
    fn default() -> Self {
        Self::new()
    }
}

impl Casemate {
    /// A fresh state directory.
    pub fn new() -> Self {
        let state = tempfile::Builder::new().prefix("casemate-state-").tempdir();
        let state = state.unwrap_or_else(|error| panic!("no temporary directory: {error}"));
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed) % 128;
        let first = 3_000_000 + (std::process::id() % 100_000) * 1024 + number * MACHINES;
        let uids = format!("{first}-{}", first + MACHINES - 1);
        Self {
            state,
            data: None,
            uids,
        }
    }

    /// With its data, such as snapshots, in this directory.
    #[must_use]
    pub fn with_data(mut self, data: &Path) -> Self {
        self.data = Some(data.to_owned());
        self
    }

    /// `casemate ARGS`.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(bin("casemate"));
        command
            .env("CASEMATE_STATE_DIR", self.state.path())
            .env("CASEMATE_UID_RANGE", &self.uids)
            .args(args);
        if let Some(data) = &self.data {
            command.env("CASEMATE_DATA_DIR", data);
        }
        command
    }

    /// What `casemate` notes of the machine `id`, which runs.
    pub fn record(&self, id: &str) -> Result<serde_json::Value> {
        let path = self.state.path().join("vms").join(id).join("state.json");
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }

    /// `casemate ARGS`, to its end.
    pub fn call(&self, args: &[&str]) -> Result<Finished> {
        Running::start(self.command(args), None)?.wait()
    }

    /// A bare kernel in a machine with an id of its own: `casemate run --bare --kernel KERNEL OPTIONS`, to its end;
    /// asserts that nothing is left of it, however it ended.
    #[track_caller]
    pub fn run_bare(&self, kernel: &Path, options: &[&str]) -> Finished {
        let id = unique_id("bare");
        let kernel = kernel.to_string_lossy();
        let words = ["run", "--bare", "--id", &id, "--kernel", &kernel];
        match self.call(&[&words[..], options].concat()) {
            Ok(done) => {
                self.assert_nothing_of(&id);
                done
            }
            Err(error) => panic!("{error:#}"),
        }
    }

    /// `casemate run` with the busybox root file system, `options`, and the shell script `script`.
    pub fn start(&self, options: &[&str], script: &str) -> Result<Running> {
        let rootfs = rootfs();
        let rootfs = rootfs
            .to_str()
            .context("the root file system's path is not UTF-8")?;
        let words = [
            &["run", "--rootfs", rootfs][..],
            options,
            &["--", "sh", "-c", script],
        ];
        Running::start(self.command(&words.concat()), None)
    }

    /// The same, with nothing on standard input, to its end.
    pub fn run(&self, options: &[&str], script: &str) -> Result<Finished> {
        let mut run = self.start(options, script)?;
        run.close_stdin();
        run.wait()
    }

    /// Asserts that no machine has a directory or a user id.
    #[track_caller]
    pub fn assert_state_clean(&self) {
        match self.left_in_state() {
            Ok(left) => assert!(left.is_empty(), "left behind: {left:?}"),
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Asserts that no machine but `id` has a directory or a user id.
    #[track_caller]
    pub fn assert_state_has_only(&self, id: &str) {
        let mut left = self.left_in_state().unwrap_or_default();
        left.retain(|path| !path.ends_with(id));
        let other = |path: &PathBuf| std::fs::read_to_string(path).is_ok_and(|owner| owner == id);
        left.retain(|path| !other(path));
        assert!(left.is_empty(), "left behind: {left:?}");
    }

    fn left_in_state(&self) -> Result<Vec<PathBuf>> {
        let mut left = list(&self.state.path().join("vms"))?;
        // `last` says only where to go on counting.
        let uids = list(&self.state.path().join("uids"))?;
        left.extend(uids.into_iter().filter(|path| !path.ends_with("last")));
        Ok(left)
    }

    /// Asserts that nothing is left of the machine `id`, also while other tests' machines run: no directory, no user
    /// id taken, no cgroup, no process that was started with that id.
    #[track_caller]
    pub fn assert_nothing_of(&self, id: &str) {
        match self.left_of(id) {
            Ok(left) => assert!(left.is_empty(), "left behind: {left:?}"),
            Err(error) => panic!("{error:#}"),
        }
    }

    fn left_of(&self, id: &str) -> Result<Vec<PathBuf>> {
        let mut left = self.left_in_state()?;
        let cgroups = Path::new("/sys/fs/cgroup");
        let mounts = list(cgroups)?.into_iter().chain([cgroups.to_owned()]);
        left.extend(
            mounts
                .map(|mount| mount.join("casemate").join(id))
                .filter(|path| path.exists()),
        );
        for process in list(Path::new("/proc"))? {
            let words = std::fs::read(process.join("cmdline")).unwrap_or_default();
            if words
                .split(|byte| *byte == 0)
                .any(|word| word == id.as_bytes())
            {
                left.push(process);
            }
        }
        Ok(left)
    }

    /// Asserts that nothing is left of any machine.
    #[track_caller]
    pub fn assert_clean(&self) {
        match self.left_behind() {
            Ok(left) => assert!(left.is_empty(), "left behind: {left:?}"),
            Err(error) => panic!("{error:#}"),
        }
    }

    /// What is left of machines: their directories and cgroups.
    pub fn left_behind(&self) -> Result<Vec<PathBuf>> {
        let mut left = list(&self.state.path().join("vms"))?;
        for parent in ["/sys/fs/cgroup/casemate", "/sys/fs/cgroup/memory/casemate"] {
            left.extend(
                list(Path::new(parent))?
                    .into_iter()
                    .filter(|path| path.is_dir()),
            );
        }
        Ok(left)
    }
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    match std::fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("listing {}", dir.display())),
    }
}

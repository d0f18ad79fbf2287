//! What has to be known of a machine beside its snapshot, so that others can go on from it.
//!
//! It is in the directory of each machine that can be saved, and `snapshot create` takes it over.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, chown};
use std::path::{Path, PathBuf};

use casemate_init::protocol::Spec;
use nix::errno::Errno;
use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use super::Error;
use super::plan::{Disk, Plan};
use super::taps::Tap;
use crate::layer;
use crate::snapshot;
use crate::state::Machine;

/// Its file in the machine's directory.
pub const FILE: &str = "origin.json";

/// A machine that can be saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Its kernel: a registered name, a file, or `default`.
    pub kernel: String,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs at its start.
    pub cpus: u8,
    /// How many it can have.
    pub max_cpus: Option<u8>,
    /// Its disks, in order. One that is its own is in the snapshot.
    pub disks: Vec<Disk>,
    /// Its network cards, in order.
    pub taps: Vec<Tap>,
    /// Where they are.
    pub netns: Option<PathBuf>,
    /// What it is told at the metadata service's address.
    pub metadata: Option<PathBuf>,
    /// Whether it has a virtio console.
    pub console: bool,
    /// Its command; none with a bare kernel.
    pub spec: Option<Spec>,
}

impl Origin {
    fn of(plan: &Plan) -> Self {
        Self {
            kernel: plan.kernel_name.clone(),
            memory_mib: plan.memory_mib,
            cpus: plan.cpus,
            max_cpus: plan.max_cpus,
            disks: plan.disks.clone(),
            taps: plan.taps.clone(),
            netns: plan.netns.clone(),
            metadata: plan.metadata.clone(),
            console: plan.console,
            spec: plan.spec.clone(),
        }
    }

    /// Whether it has a disk of its own, which a snapshot needs a copy of.
    pub fn has_layer(&self) -> bool {
        self.disks.iter().any(|disk| disk.name == layer::NAME)
    }
}

/// Notes what a machine is that can be saved, and makes the directory `saved`, where its broker may make a snapshot's
/// two files. It is in one that is locked for as long as the machine lives.
pub(super) fn write(plan: &Plan, machine: &Machine, saved: &Path) -> Result<Flock<File>, Error> {
    let failed = |what, path: &Path| {
        let path = path.to_path_buf();
        move |source: io::Error| Error::Saved { what, path, source }
    };
    let text = serde_json::to_vec_pretty(&Origin::of(plan)).unwrap_or_default();
    machine.write(FILE, &text)?;
    remove(saved);
    let home = saved.parent().unwrap_or(saved);
    let parent = home.parent().unwrap_or(home);
    let made = DirBuilder::new().recursive(true).mode(0o700).create(parent);
    made.map_err(failed("cannot make the directory", parent))?;
    for directory in [home, saved] {
        let made = DirBuilder::new().mode(0o700).create(directory);
        made.map_err(failed("cannot make the directory", directory))?;
    }
    let uid = Some(machine.uid());
    chown(saved, uid, uid).map_err(failed("cannot change the owner of", saved))?;
    let busy = || io::Error::from(Errno::EBUSY);
    let lock = snapshot::lock(home).and_then(|lock| lock.ok_or_else(busy));
    lock.map_err(failed("cannot lock", home))
}

/// Removes that directory, and the one that it is in, if they are there and no machine that lives has them.
pub fn remove(saved: &Path) {
    // Most machines have none.
    if let Some(home) = saved.parent()
        && let Ok(Some(_lock)) = snapshot::lock(home)
    {
        let _ = fs::remove_dir_all(home);
    }
}

/// Size, and time of the last change in nanoseconds: whether a file is still what it was. A block device has neither.
pub fn fingerprint(path: &Path) -> io::Result<Option<(u64, i64)>> {
    let data = fs::metadata(path)?;
    let changed = data
        .mtime()
        .saturating_mul(1_000_000_000)
        .saturating_add(data.mtime_nsec());
    Ok(data.is_file().then_some((data.len(), changed)))
}

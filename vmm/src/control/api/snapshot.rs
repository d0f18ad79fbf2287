//! Makes snapshots of the machine, and has a machine go on from one.

use std::sync::Arc;
use std::time::Instant;

use log::info;
use serde::Deserialize;

use super::working_set::WorkingSet;
use super::{Desk, Fault, Reply};
use crate::config::{Config, HugePages};
use crate::machine::state::{self, Saved};
use crate::machine::{self, Files, HeldMachine, Kind, Restore, RunningMachine, SavedMemory};
use crate::snapshot::format;
use crate::snapshot::memory::Written;

/// What errors call the two files.
const STATE: &str = "snapshot";
const MEMORY: &str = "snapshot memory";

/// `PUT /snapshot/create`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    #[serde(default)]
    snapshot_type: SnapshotType,
    snapshot_path: String,
    mem_file_path: String,
}

#[derive(Debug, Default, Deserialize, PartialEq, Eq)]
enum SnapshotType {
    #[default]
    Full,
    Diff,
}

/// `PUT /snapshot/load`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadSnapshot {
    snapshot_path: String,
    mem_file_path: Option<String>,
    mem_backend: Option<MemoryBackend>,
    #[serde(default)]
    enable_diff_snapshots: bool,
    #[serde(default)]
    track_dirty_pages: bool,
    #[serde(default)]
    resume_vm: bool,
    #[serde(default)]
    network_overrides: Vec<NetworkOverride>,
    vsock_override: Option<VsockOverride>,
    #[serde(default)]
    clock_realtime: bool,
    huge_pages: Option<RestoredPages>,
    #[serde(default)]
    working_set: WorkingSet,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoryBackend {
    backend_path: String,
    backend_type: BackendType,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum BackendType {
    /// A memory file.
    File,
    /// The socket of a process that brings the pages.
    Uffd,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NetworkOverride {
    iface_id: String,
    host_dev_name: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VsockOverride {
    uds_path: String,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum RestoredPages {
    /// As they were.
    Snapshot,
    None,
    Transparent,
    #[serde(rename = "2M")]
    TwoMegabytes,
}

impl LoadSnapshot {
    /// Whether something in it is of an older version of the API.
    pub fn is_deprecated(&self) -> bool {
        self.mem_file_path.is_some() || self.enable_diff_snapshots
    }

    /// Where the memory is.
    fn memory(&self) -> Result<(BackendType, &str), Fault> {
        match (&self.mem_file_path, &self.mem_backend) {
            (Some(path), None) => Ok((BackendType::File, path)),
            (None, Some(backend)) => Ok((backend.backend_type, &backend.backend_path)),
            _ => Err(Fault::MemoryOnce),
        }
    }

    /// The config of the machine that was saved, changed as this asks for.
    fn change(&self, config: &mut Config) -> Result<(), Fault> {
        let machine = &mut config.machine_config;
        machine.track_dirty_pages = self.track_dirty_pages || self.enable_diff_snapshots;
        machine.huge_pages = match self.huge_pages {
            None | Some(RestoredPages::Snapshot) => machine.huge_pages,
            Some(RestoredPages::None) => HugePages::None,
            Some(RestoredPages::Transparent) => HugePages::Transparent,
            Some(RestoredPages::TwoMegabytes) => HugePages::TwoMegabytes,
        };
        override_sockets(
            config,
            &self.network_overrides,
            self.vsock_override.as_ref(),
        )?;
        config.check()?;
        Ok(())
    }
}

/// Changes what cards and sockets lead to.
pub(super) fn override_sockets(
    config: &mut Config,
    cards: &[NetworkOverride],
    vsock: Option<&VsockOverride>,
) -> Result<(), Fault> {
    for change in cards {
        let mut cards = config.network_interfaces.iter_mut();
        let card = cards.find(|card| card.iface_id == change.iface_id);
        let card =
            card.ok_or_else(|| Fault::NoDevice(format!("network interface {}", change.iface_id)))?;
        card.host_dev_name = Some(change.host_dev_name.clone());
    }
    if let Some(change) = vsock {
        let vsock = config.vsock.as_mut();
        let vsock = vsock.ok_or_else(|| Fault::NoDevice("Vsock device".to_owned()))?;
        vsock.uds_path = change.uds_path.clone();
    }
    Ok(())
}

impl Desk {
    /// Makes a snapshot of a machine that is paused. Nothing is left of one that fails.
    pub(super) fn create_snapshot(
        &mut self,
        machine: &RunningMachine,
        create: &CreateSnapshot,
    ) -> Result<Reply, Fault> {
        if !self.paused {
            return Err(Fault::NotPausedYet);
        }
        let kind = match create.snapshot_type {
            SnapshotType::Full => Kind::Full,
            SnapshotType::Diff => Kind::Differences,
        };
        if kind == Kind::Differences && !self.config.machine_config.track_dirty_pages {
            return Err(Fault::NotTracked);
        }
        let (state, memory) = (&create.snapshot_path, &create.mem_file_path);
        if state == memory {
            return Err(Fault::OneFile);
        }
        let start = Instant::now();
        // First of all: nothing is made for a machine that cannot be saved.
        let held = machine.hold(&self.config)?;
        let written = self
            .write_snapshot(held, kind, state, memory)
            .inspect_err(|_| {
                for name in [state, memory] {
                    // What was not made, or has its name already, cannot be given up.
                    let _ = self.source.discard(STATE, name);
                }
            })?;
        machine.snapshot_named();
        info!(
            "snapshot: {} pages of {} MiB in {:?}",
            written.pages,
            written.ram >> 20,
            start.elapsed()
        );
        Ok(Reply::Done)
    }

    fn write_snapshot(
        &mut self,
        held: HeldMachine<'_>,
        kind: Kind,
        state: &str,
        memory: &str,
    ) -> Result<Written, Fault> {
        let files = Files {
            state: self.source.create_later(STATE, state)?,
            memory: self.source.create_later(MEMORY, memory)?,
        };
        let written = held.save(files, kind)?;
        // The memory first: the state says that a snapshot is there.
        self.source.commit(MEMORY, memory)?;
        self.source.commit(STATE, state)?;
        Ok(written)
    }

    /// Has a machine go on from a snapshot, before anything else has been said of one.
    pub(super) fn load_snapshot(&mut self, load: &LoadSnapshot) -> Result<Reply, Fault> {
        if !self.config.is_untouched() {
            return Err(Fault::Configured);
        }
        let (backend, path) = load.memory()?;
        let file = self.source.open_file(STATE, &load.snapshot_path)?;
        let (id, sections) = format::read(&file).map_err(state::Error::from)?;
        let mut saved: Saved = state::parse(id, &sections)?;
        let mut config = saved.machine.config.clone();
        load.change(&mut config)?;
        saved.machine.config = config.clone();
        let memory = match backend {
            BackendType::File => SavedMemory::File(Arc::new(self.source.open_file(MEMORY, path)?)),
            BackendType::Uffd => SavedMemory::Handler {
                parts: Some(self.source.page_handler(path)?),
                lost: Arc::default(),
            },
        };
        // A handler knows itself what it brings first.
        let working_set = match backend {
            BackendType::File => self.working_set(&load.working_set, path, &saved),
            BackendType::Uffd => None,
        };
        let options = machine::Options {
            enable_pci: saved.machine.enable_pci,
            // Nobody boots.
            boot_timer: None,
            ..self.options
        };
        let restore = Restore {
            saved,
            memory,
            working_set,
            by_wall_clock: load.clock_realtime,
        };
        let machine = self.build::<Fault>(&config, options, Some(restore))?;
        self.config = config;
        self.options = options;
        self.paused = !load.resume_vm;
        if load.resume_vm {
            self.guest_runs();
        }
        self.take_over(machine.start())
    }
}

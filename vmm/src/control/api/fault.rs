//! Why a request was not done: what its `fault_message` says.

use thiserror::Error;

use super::http::{Response, Status};
use super::routes;
use crate::control::observe;
use crate::mmds::StoreError;
use crate::virtio::update::UpdateError;
use crate::{config, lockdown, machine, resources};

/// Why a request was not done.
#[derive(Debug, Error)]
pub enum Fault {
    /// It was not understood.
    #[error(transparent)]
    Route(#[from] routes::Error),
    /// The machine that it describes is refused.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// Something that it names is not there.
    #[error(transparent)]
    Resources(#[from] resources::Error),
    /// The machine cannot be built.
    #[error("the machine cannot be started: {0}")]
    Machine(#[from] machine::Error),
    /// A wall cannot be put up.
    #[error("the machine cannot be started: {0}")]
    Lockdown(#[from] lockdown::Error),
    /// Nothing to boot.
    #[error("there is nothing to boot: PUT /boot-source first")]
    NothingToBoot,
    /// Only before the start.
    #[error("this can be done only before the machine is started")]
    Started,
    /// Only after the start.
    #[error("this can be done only after the machine is started")]
    NotStarted,
    /// Metadata that cannot be.
    #[error("metadata: {0}")]
    Metadata(StoreError),
    /// More than the guest has.
    #[error("`amount_mib` is {0}: the guest cannot give back more than `mem_size_mib`")]
    TooMuchMemory(u32),
    /// There is no device of that name.
    #[error("there is no {0}")]
    NoDevice(String),
    /// A device cannot be changed.
    #[error("{device}: {source}")]
    Update {
        /// Which one.
        device: String,
        /// Why.
        source: UpdateError,
    },
    /// Another number of vCPUs is refused.
    #[error(transparent)]
    Vcpus(#[from] machine::vcpus::Error),
    /// A device does not come, or go.
    #[error(transparent)]
    Hotplug(#[from] machine::hotplug::Error),
    /// A vCPU does not stop.
    #[error(
        "vCPU {0} is busy with a console that nobody reads, or waits for memory that nobody brings, and does not pause; the machine runs on"
    )]
    NotPaused(usize),
    /// Metrics that go nowhere.
    #[error("metrics go nowhere: PUT /metrics before the start, or start with --metrics-path")]
    NoMetrics,
    /// Metrics that cannot be written.
    #[error("metrics: {0}")]
    Metrics(std::io::Error),
    /// The log or the metrics.
    #[error(transparent)]
    Observe(#[from] observe::Error),
    /// The machine could not be started, and cannot any more.
    #[error("the machine cannot be started, and this VMM ends: {0}")]
    StartFailed(String),
    /// Only of a machine that is paused.
    #[error("a snapshot is of a machine that is paused: PATCH /vm with `state` Paused first")]
    NotPausedYet,
    /// Nobody knows what has changed.
    #[error(
        "which pages change is not tracked in this machine: have it do so by `track_dirty_pages`, of `/machine-config` \
             or of `/snapshot/load`, or make a snapshot of all (Full)"
    )]
    NotTracked,
    /// Two files with one name.
    #[error("`snapshot_path` and `mem_file_path` are one file: name two")]
    OneFile,
    /// It was not saved.
    #[error("the snapshot cannot be made: {0}")]
    NotSaved(#[from] machine::SaveError),
    /// Something has been said of the machine already.
    #[error(
        "the machine has been configured already: a snapshot says all of it, so load it into a new VMM"
    )]
    Configured,
    /// No memory, or two.
    #[error("say where the memory is: one of `mem_backend` and `mem_file_path`")]
    MemoryOnce,
    /// It is no snapshot of a machine.
    #[error("the snapshot cannot be loaded: {0}")]
    Snapshot(#[from] machine::state::Error),
    /// It goes while it runs.
    #[error("the machine is paused: resume it, and it can be moved; or make a snapshot of it")]
    Paused,
    /// It cannot go.
    #[error("the machine cannot be moved: {0}")]
    NotMoved(#[source] machine::SaveError),
    /// It cannot come.
    #[error("the machine cannot come: {0}")]
    NotReceived(#[source] machine::moving::Error),
    /// What came is not what was offered.
    #[error("the machine that came is not the one that was offered")]
    OtherMachine,
    /// Nobody is to change it meanwhile.
    #[error(
        "the machine is being moved: wait until it has (`GET /migration`), or cancel that (`PUT /migration/cancel`)"
    )]
    Moving,
    /// Nothing to cancel.
    #[error("no machine is being moved")]
    NotMoving,
}

impl Fault {
    /// The answer.
    pub fn response(&self) -> Response {
        let status = match self {
            Self::Metadata(StoreError::TooLarge { .. }) => Status::PayloadTooLarge,
            _ => Status::BadRequest,
        };
        Response::fault(status, &self.to_string())
    }
}

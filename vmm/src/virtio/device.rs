//! What a virtio device is to its transport and its worker.

use std::io;
use std::sync::Arc;

use log::Level;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::config_space::ConfigSpace;
use super::queue::{self, Progress, Queue, QueueStates, Signal};
use super::update::{Answer, Update, UpdateError};
use crate::event_loop::{self, EventSet, Registrar};
use crate::memory::GuestMemory;
use crate::metrics::Source;

/// VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX and VIRTIO_F_VERSION_1 (section 6): what
/// every device offers.
pub const COMMON_FEATURES: u64 = (1 << 28) | EVENT_IDX | VERSION_1;
/// VIRTIO_RING_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1: no driver gets by without it.
pub const VERSION_1: u64 = 1 << 32;

/// Device types (section 5).
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[repr(u32)]
pub enum DeviceType {
    /// Network card (section 5.1).
    Net = 1,
    /// Block device (section 5.2).
    Block = 2,
    /// Console (section 5.3).
    Console = 3,
    /// Entropy device (section 5.4).
    Entropy = 4,
    /// Memory balloon (section 5.5).
    Balloon = 5,
    /// Socket device (section 5.10).
    Vsock = 19,
    /// Memory device (section 5.15).
    Mem = 24,
    /// Shared file system (section 5.11).
    Fs = 26,
    /// Persistent memory (section 5.19).
    Pmem = 27,
}

/// What a device is, fixed for its life.
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// Its type.
    pub device_type: DeviceType,
    /// Features of its own that it offers; the transport adds [`COMMON_FEATURES`].
    pub features: u64,
    /// Largest size of each of its queues, [`queue::MAX_QUEUES`] at most: powers of two.
    pub queue_sizes: &'static [u16],
}

/// What a running device works with.
#[derive(Clone)]
pub struct DeviceIo {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Tells the driver about used buffers.
    pub signal: Arc<dyn Signal>,
    /// Watches the device's own descriptors.
    pub events: Registrar,
}

/// The queues of a running device by index; `None` for one that the driver does not use.
pub type Queues = [Option<Queue>; queue::MAX_QUEUES];

/// Why a device should do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The driver made buffers available in this queue.
    Queue(u16),
    /// A descriptor that the device watches is ready.
    Ready {
        /// The key that the device gave it.
        key: u32,
        /// What it is ready for.
        events: EventSet,
    },
}

/// Why a device stopped working. The transport answers with NEEDS_RESET.
#[derive(Debug, Error)]
pub enum Error {
    /// The driver broke a queue.
    #[error(transparent)]
    Queue(#[from] queue::Error),
    /// A descriptor cannot be watched.
    #[error(transparent)]
    Events(#[from] event_loop::Error),
    /// The host refused something that the device cannot work without.
    #[error("{what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// Why a device does not go on from a saved one.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// It is not what this kind of device saves.
    #[error(transparent)]
    Malformed(#[from] serde_json::Error),
    /// It is, and makes no sense.
    #[error("{0}")]
    Nonsense(&'static str),
}

/// A virtio device. It knows no transport and no KVM, and lives on a device thread.
///
/// State moves in one way: [`stop`](VirtioDevice::stop) turns the running device into plain data,
/// [`start`](VirtioDevice::start) makes it run from plain data. A reset is a stop whose data nobody
/// keeps.
pub trait VirtioDevice: Send {
    /// What it is. The same at every call.
    fn traits(&self) -> Traits;

    /// Its configuration space (section 2.5), which the transport serves to the driver. Asked for
    /// once.
    fn config(&self) -> Arc<ConfigSpace>;

    /// Runs with `queues` and the `features` that the driver accepted. Only called while stopped.
    /// Every queue is announced by an [`Event::Queue`] afterwards, so it need not look into them.
    ///
    /// # Errors
    /// When the host refuses something; the device then is as it was before.
    fn start(&mut self, queues: Queues, features: u64, io: DeviceIo) -> Result<(), Error>;

    /// Stops, with nothing in flight and no descriptor watched afterwards, and returns its queues.
    /// Does nothing, and returns none, while stopped.
    fn stop(&mut self) -> QueueStates;

    /// Its queues with nothing in flight, for the device of another machine to start from; this one goes on afterwards.
    /// None while stopped.
    fn hold(&mut self) -> Option<QueueStates>;

    /// What it is beyond its config and its queues, for [`restore`](VirtioDevice::restore).
    fn save(&self) -> Value {
        Value::Null
    }

    /// Becomes, while stopped and before its first start, what the device of another machine was: of the same config, as its
    /// [`save`](VirtioDevice::save) said.
    ///
    /// # Errors
    /// When that is nothing that it can be.
    fn restore(&mut self, _: &Value) -> Result<(), RestoreError> {
        Ok(())
    }

    /// Why it cannot be on another machine, if so.
    fn obstacle(&self) -> Option<&'static str> {
        None
    }

    /// Does what `event` asks for: a bounded amount of it. `More` brings the same event again.
    ///
    /// # Errors
    /// When the driver broke a queue. The device is then stopped and waits for a reset.
    fn handle(&mut self, event: Event) -> Result<Progress, Error>;

    /// What it counts, for the metrics; asked for once.
    fn metrics(&self) -> Option<Source> {
        None
    }

    /// Gives back what others may wait for: locks, which a copy of a descriptor in another process would hold on.
    /// Called once, while stopped, on the device thread; what follows is that the device is dropped, on another one.
    fn retire(&mut self) {}

    /// Does what the operator asks for, running or not: a bounded amount of work.
    ///
    /// # Errors
    /// When this kind of device cannot, or the host refuses; the device then is as it was before.
    fn update(&mut self, update: Update) -> Result<Answer, UpdateError> {
        Err(UpdateError::NotThisDevice(update.name()))
    }
}

/// The states of running queues.
pub fn states(queues: &Queues) -> QueueStates {
    let mut states = QueueStates::default();
    for (state, queue) in states.iter_mut().zip(queues) {
        *state = queue.as_ref().map(Queue::state);
    }
    states
}

/// Events that are logged as warnings; a guest can cause as many of a kind as it likes.
const WARNINGS: u32 = 8;

/// Keeps a guest from filling the host's log: the first events of a kind are warnings, the rest
/// is for those who debug.
#[derive(Debug, Default)]
pub struct LogBudget(u32);

impl LogBudget {
    /// The level of the next event.
    pub fn level(&mut self) -> Level {
        self.0 = self.0.saturating_add(1);
        if self.0 <= WARNINGS {
            Level::Warn
        } else {
            Level::Debug
        }
    }
}

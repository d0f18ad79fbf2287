//! The running machine's virtio devices by the names that the config gives them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::virtio::device::DeviceType;
use crate::virtio::update::{Answer, Update, UpdateError};
use crate::virtio::worker::{Held, RestoreFailed, Restored, SavedDevice};
use crate::virtio::{VirtioDevice, WorkerHandle};

/// A device.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum DeviceName {
    /// One of `drives`.
    Drive(String),
    /// One of `network-interfaces`.
    NetworkInterface(String),
    /// One of `pmem`.
    Pmem(String),
    /// The only one of its kind.
    Only(DeviceType),
}

impl DeviceName {
    /// Its group and id in the metrics, of those that have a section of their own.
    pub fn counted_as(&self) -> Option<(&'static str, &str)> {
        match self {
            Self::Drive(id) => Some(("block", id)),
            Self::NetworkInterface(id) => Some(("net", id)),
            Self::Pmem(id) => Some(("pmem", id)),
            Self::Only(_) => None,
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Drive(id) => write!(out, "drive {id}"),
            Self::NetworkInterface(id) => write!(out, "network interface {id}"),
            Self::Pmem(id) => write!(out, "pmem {id}"),
            Self::Only(kind) => write!(out, "{kind:?} device"),
        }
    }
}

/// The names of `devices`, which the machine has made of `config`: those of a kind in the config's order.
pub(super) fn names(config: &Config, devices: &[Box<dyn VirtioDevice>]) -> Vec<DeviceName> {
    let mut drives = config.drives_in_order().map(|drive| &drive.drive_id);
    let mut cards = config.network_interfaces.iter().map(|card| &card.iface_id);
    let mut pmem = config.pmem.iter().map(|pmem| &pmem.id);
    let name = |kind| {
        let name = match kind {
            DeviceType::Block => drives.next().cloned().map(DeviceName::Drive),
            DeviceType::Net => cards.next().cloned().map(DeviceName::NetworkInterface),
            DeviceType::Pmem => pmem.next().cloned().map(DeviceName::Pmem),
            _ => None,
        };
        name.unwrap_or(DeviceName::Only(kind))
    };
    let kinds = devices.iter().map(|device| device.traits().device_type);
    kinds.map(name).collect()
}

/// The devices.
pub struct Devices {
    /// By their index on the device thread.
    names: BTreeMap<u16, DeviceName>,
    /// None without devices.
    worker: Option<WorkerHandle>,
}

impl Devices {
    /// Devices that the thread has taken in the order of their names.
    pub(super) fn new(names: Vec<DeviceName>, worker: Option<WorkerHandle>) -> Self {
        Self {
            names: (0..).zip(names).collect(),
            worker,
        }
    }

    /// One that has come.
    pub(super) fn insert(&mut self, index: u16, name: DeviceName) {
        self.names.insert(index, name);
    }

    /// One that has gone: its index may soon be another one's.
    pub(super) fn remove(&mut self, name: &DeviceName) {
        self.names.retain(|_, other| other != name);
    }

    /// What the device with this index is called.
    pub(super) fn name(&self, index: u16) -> Option<&DeviceName> {
        self.names.get(&index)
    }

    /// See [`WorkerHandle::hold`]. Without devices there is nothing to hold.
    ///
    /// # Errors
    /// When the device thread has ended.
    pub(super) fn hold(&self) -> Result<(Vec<SavedDevice>, Option<Held>), ()> {
        let Some(worker) = &self.worker else {
            return Ok((Vec::new(), None));
        };
        let (devices, held) = worker.hold().ok_or(())?;
        Ok((devices, Some(held)))
    }

    /// See [`WorkerHandle::restore`].
    pub(super) fn restore(&self, devices: Vec<Restored>) -> Result<Option<Held>, RestoreFailed> {
        match &self.worker {
            Some(worker) if !devices.is_empty() => worker.restore(devices).map(Some),
            _ => Ok(None),
        }
    }

    /// Changes a device.
    ///
    /// # Errors
    /// When there is none of that name, or it cannot be changed so.
    pub fn update(&self, name: &DeviceName, update: Update) -> Result<Answer, UpdateError> {
        let found = self.names.iter().find(|(_, other)| *other == name);
        match (found, &self.worker) {
            (Some((index, _)), Some(worker)) => worker.update(*index, update),
            _ => Err(UpdateError::NoDevice),
        }
    }
}

//! The machine as data: Firecracker's config-file schema, read and validated once, here.
//!
//! Each section has a file. The API's bodies are these sections, too, and make a [`Config`] one by one.
//! Some fields are ours: `boot-source.protocol`, `machine-config.pit`, `machine-config.max_vcpu_count`,
//! `machine-config.numa_nodes`,
//! of `drives[]` `discard`, `queues`, `copy_on_write` and `io_engine: Auto`, of `network-interfaces[]` `mtu`,
//! `queues` and `socket`, `fs` and `console`.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::balloon::Balloon;
pub use self::boot_source::{BootSource, DEFAULT_BOOT_ARGS};
pub use self::console::Console;
pub use self::cpu::{
    Bitmap, CpuConfig, CpuTemplate, CpuidModifier, CpuidRegister, CpuidRegisterModifier,
    KvmCapability, MsrModifier,
};
pub use self::drive::{CacheType, CopyOnWrite, Drive, IoEngine, MAX_DRIVE_QUEUES};
pub use self::entropy::Entropy;
pub use self::fs::Fs;
pub use self::logger::{Level, Logger};
pub use self::machine::{HugePages, MAX_MEMORY_MIB, MAX_VCPUS, MachineConfig, NamedCpuTemplate};
pub use self::memory_hotplug::MemoryHotplug;
pub use self::metrics::Metrics;
pub use self::mmds::{MmdsConfig, MmdsVersion};
pub use self::net::{MacAddress, NetworkInterface};
pub use self::numa::NumaNode;
pub use self::pmem::Pmem;
pub use self::rate_limiter::{RateLimiter, TokenBucket};
pub use self::serial::Serial;
pub use self::vsock::Vsock;
use crate::memory::layout;

mod balloon;
mod boot_source;
mod console;
pub mod cpu;
mod drive;
mod entropy;
mod fs;
mod logger;
mod machine;
mod memory_hotplug;
mod metrics;
mod mmds;
mod net;
mod numa;
pub(crate) mod objects;
mod pmem;
mod rate_limiter;
mod serial;
mod vsock;

/// Largest config file in bytes.
pub const MAX_FILE_SIZE: u64 = 1 << 20;
/// Longest id of a device.
const MAX_ID: usize = 64;

/// A machine. The default has nothing to boot yet.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// The balloon device, if any.
    pub balloon: Option<Balloon>,
    /// Block devices.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// What is booted.
    pub boot_source: BootSource,
    /// What the guest sees of its CPU.
    pub cpu_config: Option<CpuConfig>,
    /// The log.
    pub logger: Option<Logger>,
    /// CPUs and memory.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// Where metrics go.
    pub metrics: Option<Metrics>,
    /// The metadata service.
    pub mmds_config: Option<MmdsConfig>,
    /// Network cards.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// The socket device, if any.
    pub vsock: Option<Vsock>,
    /// The entropy device, if any.
    pub entropy: Option<Entropy>,
    /// Shared directories.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fs: Vec<Fs>,
    /// Persistent memory devices.
    #[serde(default)]
    pub pmem: Vec<Pmem>,
    /// Where the first serial port's output goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// The memory device, if any.
    pub memory_hotplug: Option<MemoryHotplug>,
    /// The virtio console, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
}

/// Why a config is refused.
#[derive(Debug, Error)]
pub enum Error {
    /// Not JSON, a field that does not exist, one that is missing, or one of another type.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// A value outside its range.
    #[error("`{field}` is {value}: {allowed}")]
    Range {
        /// The field.
        field: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// Two devices with one name.
    #[error("two {kind} are called {id:?}: each needs a name of its own")]
    DuplicateId {
        /// The section of the config.
        kind: &'static str,
        /// The name.
        id: String,
    },
    /// One file or tap behind two devices.
    #[error("`{field}` {value:?} is used twice: a guest would corrupt it")]
    SharedBackend {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// More than one root device.
    #[error(
        "{0:?} and {1:?} both have `is_root_device` (of pmem: `root_device`): only one can be the root"
    )]
    TwoRoots(String, String),
    /// Each virtio device has an interrupt pin of its own, and there are only so many.
    #[error(
        "{wanted} virtio devices are configured, but the I/O APIC has interrupt pins for {available}: remove some"
    )]
    NotEnoughInterruptPins {
        /// How many there are.
        wanted: usize,
        /// How many there can be.
        available: usize,
    },
}

fn range<T>(
    field: &'static str,
    value: impl fmt::Display,
    allowed: &'static str,
) -> Result<T, Error> {
    let value = value.to_string();
    Err(Error::Range {
        field,
        value,
        allowed,
    })
}

impl Config {
    /// Whether nothing has been said of the machine yet.
    pub fn is_untouched(&self) -> bool {
        self.is_same(&Self::default())
    }

    /// Whether it says the same.
    pub fn is_same(&self, other: &Self) -> bool {
        let text = serde_json::to_string(self);
        text.is_ok_and(|text| serde_json::to_string(other).is_ok_and(|other| other == text))
    }

    /// Reads a config.
    ///
    /// # Errors
    /// See [`Error`]; each says which field and what to do.
    pub fn from_json(text: &[u8]) -> Result<Self, Error> {
        let config: Self = objects::from_slice(text)?;
        config.boot_source.check()?;
        config.check()?;
        Ok(config)
    }

    /// Checks all but whether there is something to boot.
    ///
    /// # Errors
    /// See [`Error`]; each says which field and what to do.
    pub fn check(&self) -> Result<(), Error> {
        self.machine_config.check()?;
        let wanted = self.device_count();
        let available = layout::VIRTIO_GSIS.count();
        if wanted > available {
            return Err(Error::NotEnoughInterruptPins { wanted, available });
        }
        self.check_devices()?;
        match &self.mmds_config {
            Some(mmds) => mmds.check(&self.network_interfaces),
            None => Ok(()),
        }
    }

    /// Memory in bytes.
    pub fn memory_size(&self) -> u64 {
        // Bounded by the check, so the product fits.
        self.machine_config.mem_size_mib.saturating_mul(1 << 20)
    }

    /// Whether another process works for a device, and maps the memory.
    pub fn shares_memory(&self) -> bool {
        let drives = self.drives.iter().map(|drive| &drive.socket);
        let cards = self.network_interfaces.iter().map(|card| &card.socket);
        !self.fs.is_empty() || drives.chain(cards).any(Option::is_some)
    }

    /// The drives in the order of their windows: the root first, then as configured.
    pub fn drives_in_order(&self) -> impl Iterator<Item = &Drive> {
        let root = self.drives.iter().filter(|drive| drive.is_root_device);
        root.chain(self.drives.iter().filter(|drive| !drive.is_root_device))
    }

    /// How many virtio devices there are.
    pub fn device_count(&self) -> usize {
        [
            self.drives.len(),
            self.network_interfaces.len(),
            self.pmem.len(),
            usize::from(self.vsock.is_some()),
            usize::from(self.entropy.is_some()),
            self.fs.len(),
            usize::from(self.balloon.is_some()),
            usize::from(self.console.is_some()),
            usize::from(self.memory_hotplug.is_some()),
        ]
        .into_iter()
        .fold(0, usize::saturating_add)
    }

    /// Checks each device, and that no two are in each other's way; not how many there are. It holds as well for a
    /// machine that runs, where devices come and go.
    ///
    /// # Errors
    /// See [`Error`]; each says which field and what to do.
    pub fn check_devices(&self) -> Result<(), Error> {
        let mut ids = BTreeSet::new();
        let mut paths = BTreeSet::new();
        for drive in &self.drives {
            check_id("drives", "drives[].drive_id", &drive.drive_id, &mut ids)?;
            drive.check()?;
            if let Some(path) = &drive.path_on_host {
                check_unshared("drives[].path_on_host", path, &mut paths)?;
            }
            if let Some(socket) = &drive.socket {
                check_unshared("drives[].socket", socket, &mut paths)?;
            }
            if let Some(layer) = &drive.copy_on_write {
                check_unshared("drives[].path_on_host", &layer.path_on_host, &mut paths)?;
            }
        }
        let mut tags = BTreeSet::new();
        for fs in &self.fs {
            fs.check()?;
            check_unshared("fs[].tag", &fs.tag, &mut tags)?;
            check_unshared("fs[].socket", &fs.socket, &mut tags)?;
        }
        ids.clear();
        for pmem in &self.pmem {
            check_id("pmem", "pmem[].id", &pmem.id, &mut ids)?;
            pmem.check()?;
            check_unshared("pmem[].path_on_host", &pmem.path_on_host, &mut paths)?;
        }
        ids.clear();
        for network in &self.network_interfaces {
            let id = &network.iface_id;
            let field = "network-interfaces[].iface_id";
            check_id("network-interfaces", field, id, &mut ids)?;
            network.check()?;
            if let Some(tap) = &network.host_dev_name {
                check_unshared("network-interfaces[].host_dev_name", tap, &mut paths)?;
            }
            if let Some(socket) = &network.socket {
                check_unshared("network-interfaces[].socket", socket, &mut paths)?;
            }
        }
        self.check_roots()?;
        self.check_balloon()?;
        if let Some(vsock) = &self.vsock {
            vsock.check()?;
        }
        if let Some(memory) = &self.memory_hotplug {
            memory.check()?;
            if self.shares_memory() {
                return range(
                    "memory-hotplug.total_size_mib",
                    memory.total_size_mib,
                    "leave `memory-hotplug` out: the process behind a `socket` would not see such memory",
                );
            }
        }
        Ok(())
    }

    fn check_roots(&self) -> Result<(), Error> {
        let drives = self.drives.iter().filter(|drive| drive.is_root_device);
        let pmem = self.pmem.iter().filter(|pmem| pmem.root_device);
        let mut roots = drives
            .map(|drive| &drive.drive_id)
            .chain(pmem.map(|pmem| &pmem.id));
        match (roots.next(), roots.next()) {
            (Some(first), Some(second)) => Err(Error::TwoRoots(first.clone(), second.clone())),
            _ => Ok(()),
        }
    }

    fn check_balloon(&self) -> Result<(), Error> {
        match &self.balloon {
            Some(balloon) if u64::from(balloon.amount_mib) > self.machine_config.mem_size_mib => {
                range(
                    "balloon.amount_mib",
                    balloon.amount_mib,
                    "the guest cannot give back more than `mem_size_mib`",
                )
            }
            _ => Ok(()),
        }
    }
}

fn check_id<'a>(
    kind: &'static str,
    field: &'static str,
    id: &'a str,
    seen: &mut BTreeSet<&'a str>,
) -> Result<(), Error> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if id.is_empty() || id.len() > MAX_ID || !id.chars().all(fits) {
        return range(
            field,
            format_args!("{id:.80?}"),
            "use 1 to 64 letters, digits and underscores",
        );
    }
    if !seen.insert(id) {
        let id = id.to_owned();
        return Err(Error::DuplicateId { kind, id });
    }
    Ok(())
}

/// A name is looked up as it is, but must be printable and not empty to be looked up at all.
fn check_path(field: &'static str, path: &str) -> Result<(), Error> {
    if path.is_empty() || path.contains(char::is_control) {
        return range(
            field,
            format_args!("{path:.200?}"),
            "it may not be empty or contain control characters",
        );
    }
    Ok(())
}

/// What is behind a device: something of the host's or the socket of a vhost-user back-end, and one of them only.
fn check_backend(
    (field, own): (&'static str, Option<&str>),
    (socket_field, socket): (&'static str, Option<&str>),
    allowed: &'static str,
) -> Result<(), Error> {
    match (own, socket) {
        (Some(own), None) => check_path(field, own),
        (None, Some(socket)) => check_path(socket_field, socket),
        _ => range(field, format_args!("{own:?}"), allowed),
    }
}

fn check_unshared<'a>(
    field: &'static str,
    value: &'a str,
    seen: &mut BTreeSet<(&'static str, &'a str)>,
) -> Result<(), Error> {
    if seen.insert((field, value)) {
        return Ok(());
    }
    let value = value.to_owned();
    Err(Error::SharedBackend { field, value })
}

#[cfg(test)]
mod tests;

//! The machine as data: Firecracker's config-file schema, read and validated once, here.
//!
//! Five fields are ours: `boot-source.protocol`, `machine-config.pit`, `machine-config.max_vcpu_count`,
//! `drives[].discard` and `network-interfaces[].mtu`.
//! What Firecracker knows and this VMM does not do yet is refused by name, never ignored.

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;
use serde::de::IgnoredAny;
use thiserror::Error;

pub use self::rate_limiter::RateLimiter;
use crate::boot::Protocol;
use crate::memory::layout;

mod rate_limiter;

/// Largest config file in bytes.
pub const MAX_FILE_SIZE: u64 = 1 << 20;
/// Most vCPUs of a machine.
pub const MAX_VCPUS: u8 = 32;
/// Largest memory in MiB (16 TiB): far beyond any host, small enough to count bytes in 64 bits.
pub const MAX_MEMORY_MIB: u64 = 16 << 20;
/// Longest id of a device.
const MAX_ID: usize = 64;
/// Context ids 0 to 2 and the largest number have fixed meanings (vsock(7)).
const CIDS: std::ops::RangeInclusive<u64> = 3..=0xffff_fffe;
/// Smallest MTU that a virtio network card may announce (virtio 1.2, section 5.1.4.1).
const MIN_MTU: u16 = 68;

/// A machine.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// What is booted.
    pub boot_source: BootSource,
    /// CPUs and memory.
    pub machine_config: MachineConfig,
    /// Block devices.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// Network cards.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// The socket device, if any.
    pub vsock: Option<Vsock>,
    /// The entropy device, if any.
    pub entropy: Option<Entropy>,
    balloon: Option<IgnoredAny>,
    cpu_config: Option<IgnoredAny>,
    logger: Option<IgnoredAny>,
    memory_hotplug: Option<IgnoredAny>,
    metrics: Option<IgnoredAny>,
    mmds_config: Option<IgnoredAny>,
    pmem: Option<IgnoredAny>,
    serial: Option<IgnoredAny>,
}

/// What is booted.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: an ELF64 image or a bzImage.
    pub kernel_image_path: String,
    /// The initial RAM disk.
    pub initrd_path: Option<String>,
    /// The kernel's command line.
    pub boot_args: Option<String>,
    /// How the kernel is entered; without it the image decides.
    pub protocol: Option<Protocol>,
}

/// CPUs and memory.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpu_count: u8,
    /// How many vCPUs there can be while the machine runs, `vcpu_count` to [`MAX_VCPUS`]. Without it their
    /// number is fixed.
    pub max_vcpu_count: Option<u8>,
    /// Memory in MiB, 1 to [`MAX_MEMORY_MIB`].
    pub mem_size_mib: u64,
    /// Whether there is an i8254 timer (for guests that cannot do without).
    #[serde(default)]
    pub pit: bool,
    #[serde(default)]
    smt: bool,
    #[serde(default)]
    track_dirty_pages: bool,
    huge_pages: Option<HugePages>,
    cpu_template: Option<IgnoredAny>,
}

impl MachineConfig {
    /// How many vCPUs there can be.
    pub fn max_vcpus(&self) -> u8 {
        self.max_vcpu_count.unwrap_or(self.vcpu_count)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum HugePages {
    None,
    #[serde(rename = "2M")]
    TwoMegabytes,
}

/// When a block device's writes are on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum CacheType {
    /// A flush does nothing, and none is offered to the guest.
    #[default]
    Unsafe,
    /// A guest's flush is an `fdatasync`.
    Writeback,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
enum IoEngine {
    #[default]
    Sync,
    Async,
}

fn yes() -> bool {
    true
}

/// A block device.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name, unique among drives; also its serial number in the guest.
    pub drive_id: String,
    /// The image: a regular file or a block device.
    pub path_on_host: String,
    /// Whether the kernel's root file system is on it.
    #[serde(default)]
    pub is_root_device: bool,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub is_read_only: bool,
    /// The partition that holds the root file system.
    pub partuuid: Option<String>,
    /// When writes are on the disk.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Whether the guest may give blocks back to the host.
    #[serde(default = "yes")]
    pub discard: bool,
    #[serde(default)]
    io_engine: IoEngine,
    /// How much the guest may use it.
    pub rate_limiter: Option<RateLimiter>,
    socket: Option<IgnoredAny>,
}

/// A network card.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name, unique among network cards.
    pub iface_id: String,
    /// The tap interface behind it.
    pub host_dev_name: String,
    /// Its address; without it the guest chooses.
    pub guest_mac: Option<MacAddress>,
    /// Largest packet in bytes that the guest should send, 68 to 65535.
    pub mtu: Option<u16>,
    /// How much the guest may receive.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// How much the guest may send.
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// The socket device.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id, 3 to 2³² - 2.
    pub guest_cid: u64,
    /// The Unix socket that host programs connect to; `<uds_path>_<port>` is where the guest connects to.
    pub uds_path: String,
    #[serde(rename = "vsock_id")]
    _vsock_id: Option<String>,
}

/// The entropy device.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// How much the guest may take.
    pub rate_limiter: Option<RateLimiter>,
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct MacAddress(pub [u8; 6]);

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a MAC address such as 06:00:ac:10:00:02");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2);
            let part = part.filter(|part| part.bytes().all(|c| c.is_ascii_hexdigit()));
            *byte = part
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(wrong)?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        if bytes[0] & 1 != 0 {
            return Err(format!(
                "{text:?} is a group address: the first byte of a card's own address is even"
            ));
        }
        Ok(Self(bytes))
    }
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
    /// A field of Firecracker's that this VMM does not do yet.
    #[error("`{0}` is not supported yet: remove it")]
    NotSupported(&'static str),
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
    #[error("{0:?} and {1:?} both have `is_root_device`: only one drive can be the root")]
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
    /// Reads a config.
    ///
    /// # Errors
    /// See [`Error`]; each says which field and what to do.
    pub fn from_json(text: &[u8]) -> Result<Self, Error> {
        let config: Self = serde_json::from_slice(text)?;
        config.refuse_unsupported()?;
        config.check_machine()?;
        config.check_devices()?;
        Ok(config)
    }

    /// Memory in bytes.
    pub fn memory_size(&self) -> u64 {
        // Bounded by `check_machine`, so the product fits.
        self.machine_config.mem_size_mib.saturating_mul(1 << 20)
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
            usize::from(self.vsock.is_some()),
            usize::from(self.entropy.is_some()),
        ]
        .into_iter()
        .fold(0, usize::saturating_add)
    }

    fn refuse_unsupported(&self) -> Result<(), Error> {
        let machine = &self.machine_config;
        let drives = || self.drives.iter();
        let found = [
            (self.balloon.is_some(), "balloon"),
            (self.cpu_config.is_some(), "cpu-config"),
            (self.logger.is_some(), "logger"),
            (self.memory_hotplug.is_some(), "memory-hotplug"),
            (self.metrics.is_some(), "metrics"),
            (self.mmds_config.is_some(), "mmds-config"),
            (self.pmem.is_some(), "pmem"),
            (self.serial.is_some(), "serial"),
            (machine.smt, "machine-config.smt"),
            (
                machine.track_dirty_pages,
                "machine-config.track_dirty_pages",
            ),
            (
                machine.huge_pages == Some(HugePages::TwoMegabytes),
                "machine-config.huge_pages",
            ),
            (
                machine.cpu_template.is_some(),
                "machine-config.cpu_template",
            ),
            (
                drives().any(|d| d.io_engine == IoEngine::Async),
                "drives[].io_engine: Async",
            ),
            (drives().any(|d| d.socket.is_some()), "drives[].socket"),
        ];
        match found.into_iter().find(|(used, _)| *used) {
            Some((_, field)) => Err(Error::NotSupported(field)),
            None => Ok(()),
        }
    }

    fn check_machine(&self) -> Result<(), Error> {
        let machine = &self.machine_config;
        if !(1..=MAX_VCPUS).contains(&machine.vcpu_count) {
            return range(
                "machine-config.vcpu_count",
                machine.vcpu_count,
                "use 1 to 32",
            );
        }
        if let Some(most) = machine.max_vcpu_count
            && !(machine.vcpu_count..=MAX_VCPUS).contains(&most)
        {
            return range(
                "machine-config.max_vcpu_count",
                most,
                "use `vcpu_count` to 32",
            );
        }
        if !(1..=MAX_MEMORY_MIB).contains(&machine.mem_size_mib) {
            return range(
                "machine-config.mem_size_mib",
                machine.mem_size_mib,
                "use 1 or more (MiB), at most 16777216",
            );
        }
        let boot = &self.boot_source;
        check_path("boot-source.kernel_image_path", &boot.kernel_image_path)?;
        if let Some(path) = &boot.initrd_path {
            check_path("boot-source.initrd_path", path)?;
        }
        let args = boot.boot_args.as_deref().unwrap_or_default();
        if args.contains(char::is_control) {
            return range(
                "boot-source.boot_args",
                format_args!("{args:?}"),
                "control characters are not allowed",
            );
        }
        Ok(())
    }

    fn check_devices(&self) -> Result<(), Error> {
        let wanted = self.device_count();
        let available = layout::VIRTIO_GSIS.count();
        if wanted > available {
            return Err(Error::NotEnoughInterruptPins { wanted, available });
        }
        let mut ids = BTreeSet::new();
        let mut paths = BTreeSet::new();
        let mut root: Option<&Drive> = None;
        for drive in &self.drives {
            check_id("drives", "drives[].drive_id", &drive.drive_id, &mut ids)?;
            check_path("drives[].path_on_host", &drive.path_on_host)?;
            check_unshared("drives[].path_on_host", &drive.path_on_host, &mut paths)?;
            if let Some(uuid) = &drive.partuuid {
                let fits = |c: char| c.is_ascii_hexdigit() || c == '-';
                if uuid.is_empty() || uuid.len() > 36 || !uuid.chars().all(fits) {
                    return range(
                        "drives[].partuuid",
                        format_args!("{uuid:?}"),
                        "use a partition's UUID: hexadecimal digits and hyphens",
                    );
                }
            }
            if drive.is_root_device
                && let Some(first) = root.replace(drive)
            {
                return Err(Error::TwoRoots(
                    first.drive_id.clone(),
                    drive.drive_id.clone(),
                ));
            }
        }
        ids.clear();
        for network in &self.network_interfaces {
            let (id, tap) = (&network.iface_id, &network.host_dev_name);
            check_id(
                "network-interfaces",
                "network-interfaces[].iface_id",
                id,
                &mut ids,
            )?;
            check_path("network-interfaces[].host_dev_name", tap)?;
            check_unshared("network-interfaces[].host_dev_name", tap, &mut paths)?;
            if let Some(mtu) = network.mtu.filter(|mtu| *mtu < MIN_MTU) {
                return range("network-interfaces[].mtu", mtu, "use 68 to 65535");
            }
        }
        if let Some(vsock) = &self.vsock {
            check_path("vsock.uds_path", &vsock.uds_path)?;
            if !CIDS.contains(&vsock.guest_cid) {
                return range(
                    "vsock.guest_cid",
                    vsock.guest_cid,
                    "use 3 to 4294967294; the others have fixed meanings",
                );
            }
        }
        Ok(())
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
            format_args!("{path:?}"),
            "it may not be empty or contain control characters",
        );
    }
    Ok(())
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

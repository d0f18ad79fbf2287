//! A paused machine as plain data, on its way to a snapshot and back.
//!
//! | section | index | payload |
//! |---|---|---|
//! | [`MACHINE`] | 0 | [`MachineState`], as JSON |
//! | [`VCPU`] | the vCPU | [`VcpuState`], as JSON |
//! | [`VM`] | 0 | [`VmState`], as JSON |

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::devices::DeviceName;
use crate::config::Config;
use crate::devices::serial::SavedSerial;
use crate::devices::{clock, i8042, vcpus};
use crate::kvm::{VcpuState, VmState};
use crate::pci::hotplug;
use crate::snapshot::{Section, SnapshotId, format};
use crate::virtio::transport::state::TransportState;

/// Kinds of sections.
pub const MACHINE: u32 = 1;
/// See above.
pub const VCPU: u32 = 2;
/// See above.
pub const VM: u32 = 3;
/// The version of each of them.
const VERSION: u32 = 1;

/// All of a machine but its vCPUs and what KVM has of it.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// What it was made from.
    pub config: Config,
    /// Whether its devices are on a PCI bus.
    pub enable_pci: bool,
    /// Address and length of each piece of its memory.
    pub memory: Vec<(u64, u64)>,
    /// Where the memory of each pmem device is.
    pub pmem: BTreeMap<String, u64>,
    /// The serial port.
    pub serial: SavedSerial,
    /// The keyboard.
    pub i8042: i8042::State,
    /// Events that the guest has not been told of.
    pub acpi_events: u32,
    /// The numbers on the clock page.
    pub clock: clock::State,
    /// Which vCPUs there are, where they can come and go.
    pub vcpus: Option<vcpus::State>,
    /// What the guest has not been told of its bus.
    pub pci: Option<hotplug::State>,
    /// The virtio devices.
    pub devices: Vec<DeviceState>,
}

/// A virtio device.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// What the config calls it.
    pub name: DeviceName,
    /// Its window's number, or its slot on the bus.
    pub place: usize,
    /// What its driver has made of it.
    pub transport: TransportState,
    /// What it says of itself.
    pub data: Value,
}

/// Why a snapshot's state is none of a machine.
#[derive(Debug, Error)]
pub enum Error {
    /// The file.
    #[error(transparent)]
    Format(#[from] format::Error),
    /// A section that has to be there.
    #[error("it has no section of kind {0}")]
    Missing(u32),
    /// One that nobody knows: of a newer version, which says so in the file's.
    #[error("its section of kind {kind} has version {found}, this program knows version {VERSION}")]
    Version {
        /// Its kind.
        kind: u32,
        /// Its version.
        found: u32,
    },
    /// One that cannot be read.
    #[error("its section of kind {kind}, number {index}: {source}")]
    Section {
        /// Its kind.
        kind: u32,
        /// Its number.
        index: u32,
        /// Why.
        source: serde_json::Error,
    },
}

/// A saved machine, but for its memory.
#[derive(Debug)]
pub struct Saved {
    /// By which its memory file is known.
    pub id: SnapshotId,
    /// Almost all of it.
    pub machine: MachineState,
    /// The vCPUs, in order.
    pub vcpus: Vec<VcpuState>,
    /// What KVM has of it.
    pub vm: VmState,
}

/// The sections of a machine.
///
/// # Errors
/// When JSON cannot be written, which is not to be expected.
pub fn sections(
    machine: &MachineState,
    vcpus: &[VcpuState],
    vm: &VmState,
) -> Result<Vec<Section>, serde_json::Error> {
    let section = |kind, index, payload| Section {
        kind,
        index,
        version: VERSION,
        payload,
    };
    let mut sections = vec![section(MACHINE, 0, serde_json::to_vec(machine)?)];
    for (index, vcpu) in (0..).zip(vcpus) {
        sections.push(section(VCPU, index, serde_json::to_vec(vcpu)?));
    }
    sections.push(section(VM, 0, serde_json::to_vec(vm)?));
    Ok(sections)
}

/// What sections say.
///
/// # Errors
/// When one is missing or cannot be read.
pub fn parse(id: SnapshotId, sections: &[Section]) -> Result<Saved, Error> {
    let only = |kind| {
        let mut of_kind = sections.iter().filter(|section| section.kind == kind);
        of_kind.next().ok_or(Error::Missing(kind))
    };
    let vcpus = sections.iter().filter(|section| section.kind == VCPU);
    let vcpus: Vec<VcpuState> = vcpus.map(read).collect::<Result<_, _>>()?;
    if vcpus.is_empty() {
        return Err(Error::Missing(VCPU));
    }
    Ok(Saved {
        id,
        machine: read(only(MACHINE)?)?,
        vcpus,
        vm: read(only(VM)?)?,
    })
}

fn read<T: DeserializeOwned>(section: &Section) -> Result<T, Error> {
    let Section {
        kind,
        index,
        version,
        ref payload,
    } = *section;
    if version != VERSION {
        return Err(Error::Version {
            kind,
            found: version,
        });
    }
    serde_json::from_slice(payload).map_err(|source| Error::Section {
        kind,
        index,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram_regions;
    use crate::snapshot::describe::kind;
    use crate::snapshot::memory::Trailer;

    /// Of a probe with two vCPUs, and with a drive, sockets, random bytes, a balloon and a console on a PCI bus. Files of
    /// versions to come are added beside these, and none is changed: they are the promise of docs/snapshot-format.md.
    const STATE: &[u8] = include_bytes!("../snapshot/fixtures/v1.0.0.state");
    /// The last page of its memory file.
    const MEMORY_END: &[u8; 4096] = include_bytes!("../snapshot/fixtures/v1.0.0.memory-end");

    #[test]
    fn kinds_are_called_what_they_are() {
        assert_eq!([MACHINE, VCPU, VM].map(kind), ["machine", "vcpu", "vm"]);
    }

    #[test]
    fn what_an_earlier_version_wrote_is_read() {
        let (id, sections) = format::decode(STATE).unwrap();
        let saved = parse(id, &sections).unwrap();
        let machine = &saved.machine;
        assert_eq!(saved.vcpus.len(), 2);
        assert!(saved.vcpus.iter().all(|vcpu| !vcpu.cpuid().is_empty()));
        assert_eq!(machine.memory, ram_regions(64 << 20));
        assert!(machine.enable_pci && machine.pci.is_some());
        let names = machine.devices.iter().map(|device| device.name.to_string());
        let names: Vec<_> = names.collect();
        assert_eq!(names.len(), 5, "{names:?}");
        machine.config.check().unwrap();
        let trailer = Trailer::decode(MEMORY_END).unwrap();
        assert_eq!((trailer.id, trailer.base), (id, None));
        assert_eq!(trailer.regions, machine.memory);
        // It says the same when it is written again.
        let again = sections_of(&saved);
        let (_, again) = format::decode(&format::encode(id, &again).unwrap()).unwrap();
        assert_eq!(again, sections);
    }

    fn sections_of(saved: &Saved) -> Vec<Section> {
        sections(&saved.machine, &saved.vcpus, &saved.vm).unwrap()
    }
}

//! Makes a machine that goes on from a saved one, step by step beside [`build`](super::build): where a new machine is given
//! what its firmware and its kernel would find, this one is given what was saved.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, OnceLock};

use kvm_bindings::CpuId;
use thiserror::Error;

use super::Panel;
use super::attached;
use super::devices::DeviceName;
use super::hotplug::Hotplug;
use super::page_handler::{self, PageHandler};
use super::state::{DeviceState, MachineState, Saved};
use crate::devices::SerialPort;
use crate::devices::serial::{SavedSerial, SerialOptions};
use crate::kvm::cpuid::MachineCpuid;
use crate::kvm::{self, Vcpu, Vm};
use crate::memory::cut_off::MappedFile;
use crate::memory::{self, GuestMemory};
use crate::resources::PageHandlerParts;
use crate::snapshot::memory as memory_file;
use crate::snapshot::working_set::Run;
use crate::virtio::transport::mmio::MmioTransport;
use crate::virtio::transport::state::RestoreError;
use crate::virtio::worker::Restored;

/// A saved machine that another one goes on from.
pub struct Restore {
    /// All of it but the memory.
    pub saved: Saved,
    /// The memory.
    pub memory: SavedMemory,
    /// Pages of it that the guest will use first, where that is known.
    pub working_set: Option<Vec<Run>>,
    /// Whether the guest's clock goes on as if it had run meanwhile.
    pub by_wall_clock: bool,
}

/// Where the memory of a saved machine is.
pub enum SavedMemory {
    /// In this file.
    File(Arc<File>),
    /// With a process that brings it. The parts are taken when the memory is made.
    Handler {
        /// How to ask it.
        parts: Option<PageHandlerParts>,
        /// What has become of it before the machine was complete.
        lost: Arc<OnceLock<page_handler::Error>>,
    },
    /// It has come already, from the machine itself.
    Here(GuestMemory),
}

/// Why no machine goes on from a saved one.
#[derive(Debug, Error)]
pub enum Error {
    /// The memory file.
    #[error("the snapshot's memory: {0}")]
    Memory(#[from] memory_file::Error),
    /// Nobody would say what happened to it.
    #[error("the snapshot's memory file cannot be watched: {0}")]
    Watch(#[source] std::io::Error),
    /// Another number of vCPUs than its config has.
    #[error("the snapshot has {found} vCPUs, its config {expected}")]
    Vcpus {
        /// How many are saved.
        found: usize,
        /// How many there can be.
        expected: usize,
    },
    /// Other devices than its config has.
    #[error("the snapshot's devices are not those of its config: {0}")]
    Devices(String),
    /// A transport.
    #[error("the snapshot's {device}: {source}")]
    Transport {
        /// Whose it is.
        device: DeviceName,
        /// Why.
        source: RestoreError,
    },
    /// Another part of it.
    #[error("the snapshot's {0} make no sense")]
    Nonsense(&'static str),
    /// Persistent memory would be elsewhere.
    #[error("the file of pmem {0} has another size than when the machine was saved")]
    Pmem(String),
}

impl Restore {
    fn machine(&self) -> &MachineState {
        &self.saved.machine
    }

    /// The memory, and who brings it, if it is not there.
    pub(super) fn memory(
        &mut self,
        options: memory::Options,
    ) -> Result<(GuestMemory, Option<PageHandler>), super::Error> {
        let regions = &self.saved.machine.memory;
        // Where else than a new machine of this size has it, it might lie over devices.
        if *regions != memory::ram_regions(self.machine().config.memory_size()) {
            return Err(Error::Nonsense("pieces of memory").into());
        }
        match &mut self.memory {
            SavedMemory::File(file) => {
                memory_file::check(file, self.saved.id, regions).map_err(Error::Memory)?;
                let memory = memory_file::map(file, regions, options);
                Ok((memory.map_err(Error::Memory)?, None))
            }
            SavedMemory::Handler { parts, lost } => {
                let parts = parts.take().ok_or(page_handler::Error::Gone)?;
                let made = PageHandler::allocate(parts, lost, regions, options);
                made.map(|(memory, handler)| (memory, Some(handler)))
            }
            SavedMemory::Here(memory) if memory_file::regions(memory) == *regions => {
                Ok((memory.clone(), None))
            }
            SavedMemory::Here(_) => Err(Error::Nonsense("pieces of memory").into()),
        }
    }

    /// Whether it is still the same machine, and not one that goes on from a snapshot of it.
    pub(super) fn is_moved(&self) -> bool {
        matches!(self.memory, SavedMemory::Here(_))
    }

    /// Where it is said that the memory does not come, if it comes from another process.
    pub(super) fn lost(&self) -> Option<Arc<OnceLock<page_handler::Error>>> {
        match &self.memory {
            SavedMemory::File(_) | SavedMemory::Here(_) => None,
            SavedMemory::Handler { lost, .. } => Some(Arc::clone(lost)),
        }
    }

    /// Its memory's file, if it is mapped, which is to stay as it is from now on.
    pub(super) fn watch(&self) -> Result<Option<MappedFile>, Error> {
        match &self.memory {
            SavedMemory::File(file) => MappedFile::watch(file).map(Some).map_err(Error::Watch),
            SavedMemory::Handler { .. } | SavedMemory::Here(_) => Ok(None),
        }
    }

    /// The vCPUs, and what KVM has besides; `here` is what a new machine would be told on this host.
    pub(super) fn processors(
        &self,
        vm: &Vm,
        vcpus: &[Vcpu],
        here: &MachineCpuid,
    ) -> Result<Vec<CpuId>, super::Error> {
        let saved = &self.saved.vcpus;
        let (found, expected) = (saved.len(), vcpus.len());
        if found != expected {
            return Err(Error::Vcpus { found, expected }.into());
        }
        let mut cpuids = Vec::with_capacity(expected);
        for (vcpu, saved) in vcpus.iter().zip(saved) {
            vcpu.restore(saved, &here.of_vcpu(vcpu.id())?)?;
            let cpuid = CpuId::from_entries(saved.cpuid());
            cpuids.push(cpuid.map_err(|_| kvm::Error::TooManyEntries("CPUID"))?);
        }
        vm.restore(&self.saved.vm, self.by_wall_clock)?;
        Ok(cpuids)
    }

    /// The serial port.
    pub(super) fn serial(&self, options: SerialOptions) -> Result<SerialPort, Error> {
        let saved: &SavedSerial = &self.machine().serial;
        let port = SerialPort::restored(options, saved);
        port.map_err(|_| Error::Nonsense("serial port's registers"))
    }

    /// Where the devices called `names`, in this order, are attached.
    pub(super) fn places(&self, names: &[DeviceName], pci: bool) -> Result<Vec<usize>, Error> {
        let machine = self.machine();
        if machine.enable_pci != pci || machine.devices.len() != names.len() {
            let (found, expected) = (machine.devices.len(), names.len());
            return Err(Error::Devices(format!("{found} of {expected}")));
        }
        names
            .iter()
            .map(|name| Ok(self.device(name)?.place))
            .collect()
    }

    fn device(&self, name: &DeviceName) -> Result<&DeviceState, Error> {
        let mut devices = self.machine().devices.iter();
        let found = devices.find(|device| device.name == *name);
        found.ok_or_else(|| Error::Devices(format!("{name} is missing")))
    }

    /// Whether persistent memory is where it was.
    pub(super) fn check_pmem(&self, places: &BTreeMap<String, u64>) -> Result<(), Error> {
        for (id, address) in places {
            if self.machine().pmem.get(id) != Some(address) {
                return Err(Error::Pmem(id.clone()));
            }
        }
        Ok(())
    }

    /// What is neither virtio nor a CPU. Once its interrupts are bound.
    pub(super) fn panel(&self, panel: &Panel) -> Result<(), Error> {
        let machine = self.machine();
        if !panel.i8042.restore(&machine.i8042) {
            return Err(Error::Nonsense("keyboard's registers"));
        }
        panel.acpi.restore(machine.acpi_events);
        panel.clock.restore(machine.clock);
        match (&panel.vcpus, machine.vcpus) {
            (Some(registers), Some(saved)) if registers.restore(saved) => Ok(()),
            (None, None) => Ok(()),
            _ => Err(Error::Nonsense("registers of vCPUs")),
        }
    }

    /// The transports of the devices called `names`, in the order of their indices on the device thread, and how the devices
    /// are to go on.
    pub(super) fn devices(
        mut self,
        names: &[DeviceName],
        windows: &[Arc<MmioTransport>],
        hotplug: Option<&Hotplug>,
    ) -> Result<Vec<Restored>, Error> {
        let mut restored = Vec::with_capacity(names.len());
        for (index, name) in (0..).zip(names) {
            let place = self.device(name)?.place;
            let attached = attached::find(windows, hotplug, index);
            let attached = attached.filter(|(number, _)| *number == place);
            let (_, transport) =
                attached.ok_or_else(|| Error::Devices(format!("{name} is elsewhere")))?;
            let devices = &mut self.saved.machine.devices;
            let device = devices.iter_mut().find(|device| device.name == *name);
            let Some(device) = device else { continue };
            let start = transport.restore(&device.transport);
            let start = start.map_err(|source| Error::Transport {
                device: name.clone(),
                source,
            })?;
            restored.push(Restored {
                index,
                data: device.data.take(),
                start,
            });
        }
        let pci = self.saved.machine.pci;
        let same = match (hotplug, pci) {
            (Some(hotplug), Some(pci)) => hotplug.registers().restore(pci),
            (None, None) => true,
            _ => false,
        };
        same.then_some(restored)
            .ok_or(Error::Nonsense("registers of PCI devices"))
    }
}

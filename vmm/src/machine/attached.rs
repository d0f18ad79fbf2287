//! How virtio devices are attached to the machine: by MMIO windows, or to a PCI bus.

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::devices::DeviceName;
use super::hotplug::{self, Hotplug, Occupant, Slot};
use super::{Error, host};
use crate::boot::MmioDeviceInfo;
use crate::bus::{self, Bus};
use crate::devices::AcpiRegisters;
use crate::event_loop;
use crate::kvm::{self, MsiPort, Vm};
use crate::memory::{GuestMemory, layout};
use crate::pci::bus::{BarWindow, Ecam};
use crate::pci::{HotplugRegisters, PciBus, SLOTS};
use crate::virtio::transport::endpoint::Doorbells;
use crate::virtio::transport::mmio::{MmioTransport, QUEUE_NOTIFY};
use crate::virtio::transport::pci::msix::MsiSender;
use crate::virtio::transport::pci::{self, PciTransport};
use crate::virtio::transport::state::SavedTransport;
use crate::virtio::{DeviceWorker, VirtioDevice};

impl MsiSender for MsiPort {
    fn send(&self, address: u64, data: u32) {
        MsiPort::send(self, address, data);
    }
}

/// All virtio devices, one way or the other.
pub(super) enum Attached {
    Mmio(OnMmio),
    Pci(OnPci),
}

impl Attached {
    /// What ACPI tells of the windows.
    pub(super) fn windows(&self) -> Vec<MmioDeviceInfo> {
        match self {
            Self::Mmio(devices) => devices.0.iter().map(|window| window.info).collect(),
            Self::Pci(_) => Vec::new(),
        }
    }

    /// Lets the devices answer the guest's accesses.
    pub(super) fn put_on(&self, mmio: &mut Bus) -> Result<(), bus::Error> {
        match self {
            Self::Mmio(devices) => devices.0.iter().try_for_each(|window| {
                let (base, size) = (window.info.base, window.info.size);
                mmio.insert(base, size, window.transport.clone())
            }),
            Self::Pci(devices) => {
                let ecam = Arc::new(Ecam(Arc::clone(&devices.bus)));
                mmio.insert(layout::PCI_ECAM_START, layout::PCI_ECAM_SIZE, ecam)?;
                let bars = Arc::new(BarWindow(Arc::clone(&devices.bus)));
                mmio.insert(layout::PCI_WINDOW_START, layout::PCI_WINDOW_SIZE, bars)?;
                let (start, size) = (layout::PCI_REGISTERS_START, layout::PCI_REGISTERS_SIZE);
                mmio.insert(start, size, Arc::clone(&devices.registers) as _)
            }
        }
    }

    /// Makes the devices' eventfds interrupts. On PCI there are none: interrupts are messages.
    pub(super) fn bind_interrupts(&self, vm: &Vm) -> Result<(), kvm::Error> {
        match self {
            Self::Mmio(devices) => devices
                .0
                .iter()
                .try_for_each(|window| vm.register_irqfd(&window.irq, window.info.gsi)),
            Self::Pci(_) => Ok(()),
        }
    }

    /// Makes the guest's notifications writes to the devices' eventfds.
    pub(super) fn bind_doorbells(&self, vm: &Vm) -> Result<(), kvm::Error> {
        match self {
            Self::Mmio(devices) => devices.0.iter().try_for_each(|window| {
                let address = window.info.base.saturating_add(QUEUE_NOTIFY);
                let mut doorbells = (0_u32..).zip(window.transport.endpoint().notifiers());
                doorbells.try_for_each(|(queue, doorbell)| {
                    vm.register_ioeventfd(doorbell, address, queue)
                })
            }),
            Self::Pci(devices) => devices.slots.iter().try_for_each(|slot| {
                let addresses = (pci::doorbells(slot.number)..).step_by(pci::DOORBELL_SIZE);
                let doorbells = slot.doorbells.notifiers().iter();
                let mut doorbells = (0_u16..).zip(addresses.zip(doorbells));
                doorbells.try_for_each(|(queue, (address, doorbell))| {
                    vm.register_ioeventfd(doorbell, address, queue)
                })
            }),
        }
    }

    /// What the device thread runs, if there is one, and what adds devices to it. `names` are those of the
    /// devices, in order.
    pub(super) fn into_worker(self, names: &[DeviceName]) -> Result<Working, event_loop::Error> {
        match self {
            Self::Mmio(OnMmio(windows)) if windows.is_empty() => Ok(Working::default()),
            Self::Mmio(OnMmio(windows)) => {
                let mut worker = DeviceWorker::new()?;
                let mut transports = Vec::with_capacity(windows.len());
                for window in windows {
                    worker.add(Arc::clone(window.transport.endpoint()), window.device)?;
                    transports.push(window.transport);
                }
                Ok(Working {
                    worker: Some(worker),
                    windows: transports,
                    hotplug: None,
                })
            }
            Self::Pci(devices) => {
                let (worker, hotplug) = devices.into_worker(names)?;
                Ok(Working {
                    worker: Some(worker),
                    windows: Vec::new(),
                    hotplug: Some(hotplug),
                })
            }
        }
    }
}

/// What is left to the control thread of the devices' attachment.
#[derive(Default)]
pub(super) struct Working {
    /// What the device thread runs, if there is one.
    pub(super) worker: Option<DeviceWorker>,
    /// The transports on MMIO, by their devices' index.
    pub(super) windows: Vec<Arc<MmioTransport>>,
    /// What adds devices on PCI.
    pub(super) hotplug: Option<Hotplug>,
}

/// Where the device with this index on the device thread is attached, and how: in one of the windows, or on the bus if there
/// is one.
pub(super) fn find<'a>(
    windows: &'a [Arc<MmioTransport>],
    hotplug: Option<&'a Hotplug>,
    index: u16,
) -> Option<(usize, &'a dyn SavedTransport)> {
    let Some(hotplug) = hotplug else {
        let place = usize::from(index);
        return Some((place, windows.get(place)?.as_ref()));
    };
    let occupied = |slot: &'a Slot| Some((slot.number, slot.occupant.as_ref()?));
    let mut occupants = hotplug.slots.iter().filter_map(occupied);
    let (place, occupant) = occupants.find(|(_, occupant)| occupant.index == index)?;
    Some((place, occupant.transport.as_ref()))
}

type Device = (Arc<PciTransport>, Box<dyn VirtioDevice>);

/// Devices with a window and an interrupt pin each.
pub(super) struct OnMmio(Vec<Window>);

struct Window {
    info: MmioDeviceInfo,
    irq: EventFd,
    transport: Arc<MmioTransport>,
    device: Box<dyn VirtioDevice>,
}

impl OnMmio {
    /// Gives each device a window and an interrupt pin.
    pub(super) fn attach(
        devices: Vec<Box<dyn VirtioDevice>>,
        memory: &GuestMemory,
    ) -> Result<Self, Error> {
        let mut bases = (layout::VIRTIO_MMIO_START..layout::PCI_ECAM_START)
            .step_by(usize::try_from(layout::VIRTIO_MMIO_SIZE).unwrap_or(usize::MAX));
        let mut gsis = layout::VIRTIO_GSIS;
        let windows = devices.into_iter().map(|device| {
            let (base, gsi) = bases.next().zip(gsis.next()).ok_or(Error::NoWindow)?;
            let irq = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("make an eventfd"))?;
            let device_irq = irq.try_clone().map_err(host("share an eventfd"))?;
            Ok(Window {
                info: MmioDeviceInfo {
                    base,
                    size: layout::VIRTIO_MMIO_SIZE,
                    gsi,
                },
                irq,
                transport: MmioTransport::new(device.as_ref(), memory.clone(), device_irq)?,
                device,
            })
        });
        Ok(Self(windows.collect::<Result<_, Error>>()?))
    }
}

/// Devices on a PCI bus.
pub(super) struct OnPci {
    bus: Arc<PciBus>,
    registers: Arc<HotplugRegisters>,
    memory: GuestMemory,
    sender: Arc<dyn MsiSender>,
    slots: Vec<Slot>,
    devices: Vec<Device>,
}

impl OnPci {
    /// Gives each device a slot, from the first behind the host bridge, and every other slot the doorbells of a
    /// device that may come. The guest learns of that by `acpi`. With `places`, each device has the slot that they say.
    pub(super) fn attach(
        devices: Vec<Box<dyn VirtioDevice>>,
        memory: &GuestMemory,
        msi: MsiPort,
        acpi: Arc<AcpiRegisters>,
        places: Option<&[usize]>,
    ) -> Result<Self, Error> {
        let bus = Arc::new(PciBus::new());
        let registers = HotplugRegisters::new(Arc::clone(&bus), acpi);
        let mut attached = Self {
            registers: Arc::new(registers.map_err(host("make an eventfd"))?),
            bus,
            memory: memory.clone(),
            sender: Arc::new(msi),
            slots: Vec::new(),
            devices: Vec::new(),
        };
        let mut numbers: Vec<usize> = (1..SLOTS).collect();
        for (at, device) in devices.into_iter().enumerate() {
            let wanted = match places {
                Some(places) => places.get(at).copied(),
                None => numbers.first().copied(),
            };
            let free = numbers.iter().position(|number| Some(*number) == wanted);
            let number = numbers.remove(free.ok_or(Error::NoWindow)?);
            let queues = device.traits().queue_sizes.len().max(hotplug::QUEUES);
            let doorbells = attached.add_slot(number, queues)?;
            let transport = PciTransport::new(
                device.as_ref(),
                memory.clone(),
                number,
                doorbells,
                Arc::clone(&attached.sender),
            );
            attached.bus.insert(number, Arc::clone(&transport) as _);
            attached.devices.push((transport, device));
        }
        for number in numbers {
            attached.add_slot(number, hotplug::QUEUES)?;
        }
        // The lowest free one is taken first when a device comes.
        attached.slots.sort_by_key(|slot| slot.number);
        Ok(attached)
    }

    fn add_slot(&mut self, number: usize, queues: usize) -> Result<Arc<Doorbells>, Error> {
        let doorbells = Doorbells::new(queues).map_err(host("make an eventfd"))?;
        self.slots.push(Slot {
            number,
            doorbells: Arc::clone(&doorbells),
            occupant: None,
        });
        Ok(doorbells)
    }

    fn into_worker(
        mut self,
        names: &[DeviceName],
    ) -> Result<(DeviceWorker, Hotplug), event_loop::Error> {
        let mut worker = DeviceWorker::new()?;
        let devices = self.devices.into_iter().zip(names);
        for ((transport, device), name) in devices {
            let index = worker.add(Arc::clone(transport.endpoint()), device)?;
            let place = transport.slot();
            let slot = self.slots.iter_mut().find(|slot| slot.number == place);
            if let Some(slot) = slot {
                slot.occupant = Some(Occupant {
                    name: name.clone(),
                    index,
                    transport,
                });
            }
        }
        let hotplug = Hotplug {
            registers: self.registers,
            memory: self.memory,
            sender: self.sender,
            worker: worker.handle(),
            slots: self.slots,
        };
        Ok((worker, hotplug))
    }
}

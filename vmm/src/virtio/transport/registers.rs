//! A device's registers as a driver of a test reaches them, whatever it is attached to.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::endpoint::{Doorbells, Endpoint};
use super::mmio::MmioTransport;
use super::pci::msix::MsiSender;
use super::pci::{PciTransport, doorbells};
use crate::bus::BusDevice;
use crate::memory::{GuestMemory, layout};
use crate::pci::PciBus;
use crate::pci::bus::{BarWindow, Ecam};
use crate::virtio::device::VirtioDevice;

/// What a driver does to a device.
pub trait Registers: Send + Sync {
    /// Makes the registers reachable, whatever was done to that.
    fn reach(&self) {}
    /// The status register.
    fn status(&self) -> u8;
    /// Writes it.
    fn set_status(&self, status: u8);
    /// 32 of the features that the device offers.
    fn offered(&self, page: u32) -> u32;
    /// Accepts 32 features.
    fn accept(&self, page: u32, features: u32);
    /// Gives a queue its size and its three areas, and makes it ready.
    fn set_up_queue(&self, index: u16, size: u16, areas: [u64; 3]);
    /// Asks for a queue not to be ready.
    fn disable_queue(&self, index: u16);
    /// Rings a queue.
    fn ring(&self, index: u16);
    /// Offsets worth an odd access.
    fn places(&self) -> &'static [u64];
    /// Any access.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Any access.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A device's two ends: its driver's, and its worker's.
pub type Attached = (Arc<dyn Registers>, Arc<Endpoint>);

/// `device` in an MMIO window.
pub fn mmio(device: &dyn VirtioDevice, memory: &GuestMemory) -> Attached {
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let transport = MmioTransport::new(device, memory.clone(), irq).unwrap();
    let endpoint = Arc::clone(transport.endpoint());
    (Arc::new(Window(transport)), endpoint)
}

struct Window(Arc<MmioTransport>);

impl Window {
    fn set(&self, offset: u64, value: u32) {
        self.0.write(offset, &value.to_le_bytes());
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.0.read(offset, &mut data);
        u32::from_le_bytes(data)
    }
}

impl Registers for Window {
    fn status(&self) -> u8 {
        self.get(0x70) as u8
    }

    fn set_status(&self, status: u8) {
        self.set(0x70, status.into());
    }

    fn offered(&self, page: u32) -> u32 {
        self.set(0x14, page);
        self.get(0x10)
    }

    fn accept(&self, page: u32, features: u32) {
        self.set(0x24, page);
        self.set(0x20, features);
    }

    fn set_up_queue(&self, index: u16, size: u16, areas: [u64; 3]) {
        self.set(0x30, index.into());
        self.set(0x38, size.into());
        for (offset, place) in [0x80, 0x90, 0xa0].into_iter().zip(areas) {
            self.set(offset, place as u32);
            self.set(offset + 4, (place >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    fn disable_queue(&self, index: u16) {
        self.set(0x30, index.into());
        self.set(0x44, 0);
    }

    fn ring(&self, index: u16) {
        self.set(0x50, index.into());
    }

    fn places(&self) -> &'static [u64] {
        &[0x70, 0x64, 0x44, 0x30, 0x38, 0x80, 0x100, 0x50]
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

/// `device` as a function of a PCI bus of its own.
pub fn pci(device: &dyn VirtioDevice, memory: &GuestMemory) -> Attached {
    let queues = device.traits().queue_sizes.len();
    let transport = PciTransport::new(
        device,
        memory.clone(),
        SLOT,
        Doorbells::new(queues).unwrap(),
        Arc::new(Messages::default()),
    );
    let endpoint = Arc::clone(transport.endpoint());
    let bus = Arc::new(PciBus::new());
    bus.insert(SLOT, transport);
    (Arc::new(Function(bus)), endpoint)
}

/// Counts the interrupts.
#[derive(Default)]
struct Messages(AtomicU64);

impl MsiSender for Messages {
    fn send(&self, _: u64, _: u32) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

const SLOT: usize = 3;
/// Behind the BAR's offsets come those of configuration space.
const CONFIG: u64 = 1 << 20;
const MSIX_TABLE: u64 = 0x1000;

struct Function(Arc<PciBus>);

impl Function {
    /// Where the BAR starts out.
    fn home() -> u64 {
        doorbells(SLOT) & !(layout::PCI_BAR_SIZE - 1)
    }

    fn get<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.read(offset, &mut data);
        data
    }
}

impl Registers for Function {
    /// Puts the BAR where it was, has it decoded, and lets interrupts through.
    fn reach(&self) {
        self.write(CONFIG + 0x10, &(Self::home() as u32).to_le_bytes());
        self.write(CONFIG + 4, &[6, 0]);
        let mut capability = u64::from(self.get::<1>(CONFIG + 0x34)[0]);
        while self.get(CONFIG + capability) != [0x11] {
            capability = self.get::<1>(CONFIG + capability + 1)[0].into();
        }
        self.write(CONFIG + capability + 2, &[0, 0x80]);
        for entry in 0..2 {
            let at = MSIX_TABLE + entry * 16;
            self.write(at, &0xfee0_0000_u64.to_le_bytes());
            self.write(at + 8, &(0x30 + entry).to_le_bytes());
        }
    }

    fn status(&self) -> u8 {
        self.get::<1>(0x14)[0]
    }

    fn set_status(&self, status: u8) {
        self.write(0x14, &[status]);
    }

    fn offered(&self, page: u32) -> u32 {
        self.write(0x00, &page.to_le_bytes());
        u32::from_le_bytes(self.get(0x04))
    }

    fn accept(&self, page: u32, features: u32) {
        self.write(0x08, &page.to_le_bytes());
        self.write(0x0c, &features.to_le_bytes());
    }

    fn set_up_queue(&self, index: u16, size: u16, areas: [u64; 3]) {
        self.write(0x16, &index.to_le_bytes());
        self.write(0x18, &size.to_le_bytes());
        self.write(0x1a, &(index % 2).to_le_bytes());
        for (offset, place) in [0x20, 0x28, 0x30].into_iter().zip(areas) {
            self.write(offset, &(place as u32).to_le_bytes());
            self.write(offset + 4, &((place >> 32) as u32).to_le_bytes());
        }
        self.write(0x1c, &[1, 0]);
    }

    fn disable_queue(&self, index: u16) {
        self.write(0x16, &index.to_le_bytes());
        self.write(0x1c, &[0, 0]);
    }

    fn ring(&self, index: u16) {
        let doorbell = doorbells(SLOT) - Self::home() + u64::from(index) * 4;
        self.write(doorbell, &index.to_le_bytes());
    }

    fn places(&self) -> &'static [u64] {
        &[
            0x08,
            0x0c,
            0x10,
            0x14,
            0x16,
            0x18,
            0x1a,
            0x1c,
            0x20,
            0x28,
            0x30,
            0x100,
            0x400,
            0x1000,
            0x100c,
            0x1800,
            0x2180,
            0x2184,
            CONFIG + 4,
            CONFIG + 0x10,
            CONFIG + 0x40,
            CONFIG + 0x80,
        ]
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(CONFIG) {
            Some(offset) => Ecam(Arc::clone(&self.0)).read(offset | (SLOT as u64) << 15, data),
            None => {
                let at = Self::home() - layout::PCI_WINDOW_START + offset;
                BarWindow(Arc::clone(&self.0)).read(at, data);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset.checked_sub(CONFIG) {
            Some(offset) => Ecam(Arc::clone(&self.0)).write(offset | (SLOT as u64) << 15, data),
            None => {
                let at = Self::home() - layout::PCI_WINDOW_START + offset;
                BarWindow(Arc::clone(&self.0)).write(at, data);
            }
        }
    }
}

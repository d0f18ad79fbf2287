//! virtio over PCI (virtio 1.2, section 4.1), with MSI-X.
//!
//! The probe takes no interrupts. It looks for them where the local APIC keeps those that it has not delivered
//! (Intel SDM volume 3, 11.8.4), and as it never takes one from there, it gives each interrupt that
//! it has seen a new vector.

use core::cell::Cell;
use core::sync::atomic::{AtomicU32, Ordering};

use super::{Doorbell, Transport};
use crate::machine::{read8, read16, read32, write8, write16, write32};

/// Configuration space of bus 0.
const ECAM: u64 = 0xe000_0000;
const SLOTS: u64 = 32;
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
/// Command: memory space and bus master.
const ENABLE: u16 = 6;

const CAP_VENDOR: u8 = 9;
const CAP_MSIX: u8 = 0x11;
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const DEVICE: u8 = 4;

/// The local APIC: id, spurious vector with the bit that switches it on, requested interrupts.
const APIC: u64 = 0xfee0_0000;
const APIC_ID: u64 = APIC + 0x20;
const APIC_SPURIOUS: u64 = APIC + 0xf0;
const APIC_ON: u32 = 0x1ff;
const APIC_REQUESTED: u64 = APIC + 0x200;
/// The next vector that no device has had: what one has left behind is no interrupt of another.
static NEXT_VECTOR: AtomicU32 = AtomicU32::new(0x40);
/// One MSI-X vector for the configuration, and one for each of so many queues.
const VECTORS: usize = 9;

/// The common configuration structure.
mod reg {
    pub const DEVICE_FEATURES_SEL: u64 = 0x00;
    pub const DEVICE_FEATURES: u64 = 0x04;
    pub const DRIVER_FEATURES_SEL: u64 = 0x08;
    pub const DRIVER_FEATURES: u64 = 0x0c;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const STATUS: u64 = 0x14;
    pub const QUEUE_SEL: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_AREAS: [u64; 3] = [0x20, 0x28, 0x30];
}

/// A function.
pub struct Pci {
    common: u64,
    config: u64,
    notify: u64,
    multiplier: u64,
    table: u64,
    /// What each entry of the MSI-X table sends.
    vectors: [Cell<u32>; VECTORS],
}

impl Pci {
    /// The `index`th device of type `id` on the bus.
    pub fn find(id: u32, index: usize) -> Option<Self> {
        let functions = (1..SLOTS).map(|slot| ECAM + (slot << 15));
        let is_it = |at: &u64| {
            read16(*at) == VENDOR && u32::from(read16(at + 2)) == u32::from(FIRST_DEVICE) + id
        };
        Self::at(functions.filter(is_it).nth(index)?)
    }

    fn at(function: u64) -> Option<Self> {
        write16(function + 4, ENABLE);
        let bar = u64::from(read32(function + 0x10) & !0xf);
        let structure = |kind: u8| {
            let at = capability(function, CAP_VENDOR, kind)?;
            Some((at, bar + u64::from(read32(at + 8))))
        };
        let (notify_capability, notify) = structure(NOTIFY)?;
        let msix = capability(function, CAP_MSIX, 0)?;
        let device = Self {
            common: structure(COMMON)?.1,
            // Not every device has one.
            config: structure(DEVICE).map_or(0, |(_, at)| at),
            notify,
            multiplier: u64::from(read32(notify_capability + 16)),
            table: bar + u64::from(read32(msix + 4) & !7),
            vectors: [const { Cell::new(0) }; VECTORS],
        };
        write32(APIC_SPURIOUS, APIC_ON);
        let entries = usize::from(read16(msix + 2) & 0x7ff) + 1;
        for entry in 0..entries.min(VECTORS) {
            device.renew(entry);
        }
        write8(msix + 3, 0x80);
        Some(device)
    }

    /// Gives an entry of the table a vector that was not seen yet, and unmasks it.
    fn renew(&self, entry: usize) {
        let vector = NEXT_VECTOR.fetch_add(1, Ordering::Relaxed);
        self.vectors[entry].set(vector);
        let at = self.table + entry as u64 * 16;
        write32(at, APIC as u32 | read32(APIC_ID) >> 24 << 12);
        write32(at + 4, 0);
        write32(at + 8, vector);
        write32(at + 12, 0);
    }
}

/// The capability with this id and, if it is virtio's, of this type.
fn capability(function: u64, id: u8, kind: u8) -> Option<u64> {
    let mut at = function + u64::from(read8(function + 0x34));
    // No list is longer than this.
    for _ in 0..48 {
        if at == function {
            return None;
        }
        if read8(at) == id && (id != CAP_VENDOR || read8(at + 3) == kind) {
            return Some(at);
        }
        at = function + u64::from(read8(at + 1));
    }
    None
}

impl Transport for Pci {
    fn status(&self) -> u32 {
        read8(self.common + reg::STATUS).into()
    }

    fn set_status(&self, status: u32) {
        write8(self.common + reg::STATUS, status as u8);
        // Vectors are forgotten by a reset.
        if status & 4 != 0 {
            write16(self.common + reg::CONFIG_VECTOR, 0);
        }
    }

    fn features(&self, half: u32) -> u32 {
        write32(self.common + reg::DEVICE_FEATURES_SEL, half);
        read32(self.common + reg::DEVICE_FEATURES)
    }

    fn accept(&self, half: u32, features: u32) {
        write32(self.common + reg::DRIVER_FEATURES_SEL, half);
        write32(self.common + reg::DRIVER_FEATURES, features);
    }

    fn queue_max(&self, index: u32) -> usize {
        write16(self.common + reg::QUEUE_SEL, index as u16);
        read16(self.common + reg::QUEUE_SIZE).into()
    }

    fn set_up_queue(&self, index: u32, size: u32, areas: [u64; 3]) -> Option<Doorbell> {
        write16(self.common + reg::QUEUE_SEL, index as u16);
        write16(self.common + reg::QUEUE_SIZE, size as u16);
        for (register, address) in reg::QUEUE_AREAS.into_iter().zip(areas) {
            write32(self.common + register, address as u32);
            write32(self.common + register + 4, (address >> 32) as u32);
        }
        let vector = (index + 1) as u16;
        write16(self.common + reg::QUEUE_VECTOR, vector);
        if usize::from(vector) < VECTORS && read16(self.common + reg::QUEUE_VECTOR) != vector {
            return None;
        }
        write16(self.common + reg::QUEUE_ENABLE, 1);
        let offset = u64::from(read16(self.common + reg::QUEUE_NOTIFY_OFF));
        let doorbell = Doorbell::Narrow(self.notify + offset * self.multiplier);
        (read16(self.common + reg::QUEUE_ENABLE) == 1).then_some(doorbell)
    }

    fn take_interrupts(&self) -> u32 {
        let mut bits = 0;
        for (entry, vector) in self.vectors.iter().enumerate() {
            let vector = vector.get();
            let register = APIC_REQUESTED + u64::from(vector / 32) * 16;
            if vector != 0 && read32(register) >> (vector % 32) & 1 != 0 {
                bits |= if entry == 0 { 2 } else { 1 };
                self.renew(entry);
            }
        }
        bits
    }

    fn config(&self) -> u64 {
        self.config
    }
}

//! virtio over MMIO (virtio 1.2, section 4.2).

use super::{Doorbell, Transport};
use crate::cmdline::Cmdline;
use crate::machine::{read32, write32};

/// Register offsets (virtio 1.2, table 4.1).
mod reg {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_AREAS: [u64; 3] = [0x80, 0x90, 0xa0];
    pub const CONFIG: u64 = 0x100;
}

const MAGIC: u32 = 0x7472_6976;

/// A window.
pub struct Mmio {
    base: u64,
}

impl Mmio {
    /// The `index`th device of type `id` among those on the command line.
    pub fn find(cmdline: &Cmdline, id: u32, index: usize) -> Option<Self> {
        let mut found = cmdline.virtio_windows().filter(|&base| {
            read32(base + reg::MAGIC) == MAGIC
                && read32(base + reg::VERSION) == 2
                && read32(base + reg::DEVICE_ID) == id
        });
        found.nth(index).map(|base| Self { base })
    }

    fn get(&self, register: u64) -> u32 {
        read32(self.base + register)
    }

    fn set(&self, register: u64, value: u32) {
        write32(self.base + register, value);
    }
}

impl Transport for Mmio {
    fn status(&self) -> u32 {
        self.get(reg::STATUS)
    }

    fn set_status(&self, status: u32) {
        self.set(reg::STATUS, status);
    }

    fn features(&self, half: u32) -> u32 {
        self.set(reg::DEVICE_FEATURES_SEL, half);
        self.get(reg::DEVICE_FEATURES)
    }

    fn accept(&self, half: u32, features: u32) {
        self.set(reg::DRIVER_FEATURES_SEL, half);
        self.set(reg::DRIVER_FEATURES, features);
    }

    fn queue_max(&self, index: u32) -> usize {
        self.set(reg::QUEUE_SEL, index);
        self.get(reg::QUEUE_NUM_MAX) as usize
    }

    fn set_up_queue(&self, index: u32, size: u32, areas: [u64; 3]) -> Option<Doorbell> {
        self.set(reg::QUEUE_SEL, index);
        self.set(reg::QUEUE_NUM, size);
        for (register, address) in reg::QUEUE_AREAS.into_iter().zip(areas) {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(reg::QUEUE_READY, 1);
        (self.get(reg::QUEUE_READY) == 1).then_some(Doorbell::Wide(self.base + reg::QUEUE_NOTIFY))
    }

    fn take_interrupts(&self) -> u32 {
        let bits = self.get(reg::INTERRUPT_STATUS);
        self.set(reg::INTERRUPT_ACK, bits);
        bits
    }

    fn config(&self) -> u64 {
        self.base + reg::CONFIG
    }
}

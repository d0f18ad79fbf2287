//! The common configuration structure (virtio 1.2, section 4.1.4.3).
//!
//! Each field is accessed in its own width, those of eight bytes also by halves; any other access
//! reads as zero and writes nothing.

use super::msix::{Msix, Source};
use crate::virtio::config_space::ConfigSpace;
use crate::virtio::transport::core::{Area, Core, Half};
use crate::virtio::transport::endpoint::Endpoint;

/// Bytes of the structure, up to the fields of features that are not offered.
pub const SIZE: u64 = 0x38;
/// Offset of the status register.
pub const STATUS: u64 = 0x14;

/// What the structure shows, with the registers held.
pub struct Common<'a> {
    pub core: &'a mut Core,
    pub msix: &'a Msix,
    pub endpoint: &'a Endpoint,
    pub config: &'a ConfigSpace,
}

impl Common<'_> {
    /// The selected queue as a source of interrupts.
    fn queue(&self) -> Source {
        // Beyond the largest queue there is no vector to read or to set.
        Source::Queue(u16::try_from(self.core.queue_select()).unwrap_or(u16::MAX))
    }

    fn queue_exists(&self) -> bool {
        self.core.queue_max_size() != 0
    }

    /// Reads `len` bytes at `offset`.
    pub fn read(&self, offset: u64, len: usize) -> u64 {
        match (offset, len) {
            (0x00, 4) => self.core.device_features_select().into(),
            (0x04, 4) => self.core.device_features().into(),
            (0x08, 4) => self.core.driver_features_select().into(),
            (0x0c, 4) => self.core.driver_features().into(),
            (0x10, 2) => self.msix.vector(Source::Config).into(),
            (0x12, 2) => self.core.queue_count().into(),
            (STATUS, 1) => self.endpoint.read_status(self.core).into(),
            // A byte of it: a driver reads it before and after, and looks for a difference.
            (0x15, 1) => (self.config.generation() as u8).into(),
            (0x16, 2) => self.core.queue_select().into(),
            (0x18, 2) => self.core.queue_size().into(),
            (0x1a, 2) => self.msix.vector(self.queue()).into(),
            (0x1c, 2) => self.core.queue_ready().into(),
            // Each queue has a doorbell of its own, in order.
            (0x1e, 2) if self.queue_exists() => self.core.queue_select().into(),
            _ => match (area(offset), offset & 4, len) {
                (Some(area), 0, 4 | 8) => self.core.queue_address(area),
                (Some(area), 4, 4) => self.core.queue_address(area) >> 32,
                _ => 0,
            },
        }
    }

    /// Writes the low `len` bytes of `value` at `offset`.
    pub fn write(&mut self, offset: u64, len: usize, value: u64) {
        let (low, high) = (value as u32, (value >> 32) as u32);
        match (offset, len) {
            (0x00, 4) => self.core.select_device_features(low),
            (0x08, 4) => self.core.select_driver_features(low),
            (0x0c, 4) => self.core.accept_features(low),
            (0x10, 2) => self.msix.set_vector(Source::Config, low as u16),
            (STATUS, 1) => {
                if self.endpoint.write_status(self.core, low as u8) {
                    self.msix.reset();
                }
            }
            (0x16, 2) => self.core.select_queue(low),
            (0x18, 2) => self.core.set_queue_size(low),
            (0x1a, 2) if self.queue_exists() => {
                self.msix.set_vector(self.queue(), low as u16);
            }
            // A driver never disables a queue by this (section 4.1.4.3.2).
            (0x1c, 2) if low == 1 => self.core.set_queue_ready(true),
            _ => match (area(offset), offset & 4, len) {
                (Some(area), 0, 4) => self.core.set_queue_address(area, Half::Low, low),
                (Some(area), 4, 4) => self.core.set_queue_address(area, Half::High, low),
                (Some(area), 0, 8) => {
                    self.core.set_queue_address(area, Half::Low, low);
                    self.core.set_queue_address(area, Half::High, high);
                }
                _ => {}
            },
        }
    }
}

/// Which address an aligned offset belongs to.
fn area(offset: u64) -> Option<Area> {
    match offset {
        0x20 | 0x24 => Some(Area::Descriptors),
        0x28 | 0x2c => Some(Area::Driver),
        0x30 | 0x34 => Some(Area::Device),
        _ => None,
    }
}

//! The bus: which device answers a guest's access to a port or an MMIO address.

use std::collections::BTreeMap;
use std::sync::Arc;

use thiserror::Error;

/// A device that a guest reaches by port I/O or MMIO.
///
/// Called on vCPU threads, several at once. A guest chooses `offset` and the width
/// (1 to 8 bytes, odd ones too), so neither may be trusted: an access that the device does
/// not define reads as zero or as all ones, and writes nothing.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the start of the device's window.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` from the start of the device's window.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device could not be put on the bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// Two devices claim the same address.
    #[error("bus window {base:#x}+{size:#x} overlaps the one at {other:#x}")]
    Overlap {
        /// First address of the refused window.
        base: u64,
        /// Size of the refused window in bytes.
        size: u64,
        /// First address of the window already there.
        other: u64,
    },
    /// The window is empty or runs past the end of the address space.
    #[error("bus window {base:#x}+{size:#x} is empty or wraps")]
    BadWindow {
        /// First address of the refused window.
        base: u64,
        /// Size of the refused window in bytes.
        size: u64,
    },
}

/// An address space of devices, read-only once the machine is built.
#[derive(Default)]
pub struct Bus {
    windows: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base`, for `size` bytes.
    ///
    /// # Errors
    /// When the window is empty, wraps, or overlaps another one.
    pub fn insert(
        &mut self,
        base: u64,
        size: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Error> {
        let bad = Error::BadWindow { base, size };
        let last = match size.checked_sub(1).and_then(|n| base.checked_add(n)) {
            Some(last) => last,
            None => return Err(bad),
        };
        if let Some((&other, &(other_size, _))) = self.windows.range(..=last).next_back()
            && other.saturating_add(other_size) > base
        {
            return Err(Error::Overlap { base, size, other });
        }
        self.windows.insert(base, (size, device));
        Ok(())
    }

    /// Reads from the device at `address`; an address that no device claims reads as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `address`; a write that no device claims goes nowhere.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    /// The device whose window holds the whole access, and the offset in it.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let (&base, (size, device)) = self.windows.range(..=address).next_back()?;
        let offset = address.checked_sub(base)?;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= *size).then_some((device.as_ref(), offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(u8);
    impl BusDevice for Fixed {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0.wrapping_add(offset as u8));
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn finds_the_device_and_the_offset() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, Arc::new(Fixed(1))).unwrap();
        bus.insert(0x1010, 0x10, Arc::new(Fixed(0x40))).unwrap();
        let mut byte = [0];
        bus.read(0x100f, &mut byte);
        assert_eq!(byte, [0x10]);
        bus.read(0x1011, &mut byte);
        assert_eq!(byte, [0x41]);
    }

    #[test]
    fn unclaimed_and_straddling_accesses_read_as_ones() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, Arc::new(Fixed(1))).unwrap();
        for address in [0, 0xfff, 0x100e, 0x1010, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "at {address:#x}");
        }
    }

    #[test]
    fn refuses_overlap_and_wrap() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, Arc::new(Fixed(1))).unwrap();
        for (base, size) in [(0x1000, 1), (0xff8, 0x10), (0x100f, 1), (0, u64::MAX)] {
            assert!(matches!(
                bus.insert(base, size, Arc::new(Fixed(2))),
                Err(Error::Overlap { .. })
            ));
        }
        for (base, size) in [(0x2000, 0), (u64::MAX, 2)] {
            assert!(matches!(
                bus.insert(base, size, Arc::new(Fixed(2))),
                Err(Error::BadWindow { .. })
            ));
        }
    }
}

//! Bus 0 and its host bridge.
//!
//! The bridge forwards two windows: configuration space, and one window for BARs. BARs start out
//! inside it, each device's in its own place, and a guest may move them. A BAR that was moved out
//! of the window (onto RAM, another device, the APICs) is decoded by nobody: RAM and everything
//! else on the [`Bus`](crate::bus::Bus) answer as before. Of BARs that overlap inside, the one of
//! the lowest device number answers. So no value of a BAR reaches anything but PCI devices of the
//! same guest.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::{FunctionConfig, Identity};
use crate::bus::BusDevice;
use crate::memory::layout;

/// Device numbers of a bus. Number 0 is the host bridge.
pub const SLOTS: usize = 32;

/// Class of a host bridge.
const HOST_BRIDGE: u32 = 0x06_00_00;
/// A bridge without vendor-specific parts, as QEMU's generic one.
const BRIDGE_VENDOR: u16 = 0x1b36;
const BRIDGE_DEVICE: u16 = 0x0008;

/// Function 0 of a device. Called on vCPU threads, several at once; every access has one, two or four
/// bytes and is aligned.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space, at an offset below 4096.
    fn config_read(&self, offset: usize, data: &mut [u8]);
    /// Writes configuration space, at an offset below 4096.
    fn config_write(&self, offset: usize, data: &[u8]);
    /// Where the BAR of `layout::PCI_BAR_SIZE` bytes lies, if it is decoded.
    fn bar(&self) -> Option<u64>;
    /// Reads within the BAR; up to eight bytes, of any alignment.
    fn bar_read(&self, offset: u64, data: &mut [u8]);
    /// Writes within the BAR; up to eight bytes, of any alignment.
    fn bar_write(&self, offset: u64, data: &[u8]);
    /// Ends what is in flight: the guest has let the device go.
    fn stop(&self) {}
}

type Functions = [Option<Arc<dyn PciFunction>>; SLOTS];

/// The bus.
#[derive(Default)]
pub struct PciBus {
    functions: Mutex<Functions>,
}

impl PciBus {
    /// A bus with a host bridge.
    pub fn new() -> Self {
        let bus = Self::default();
        bus.insert(0, Arc::new(HostBridge::new()));
        bus
    }

    fn functions(&self) -> MutexGuard<'_, Functions> {
        self.functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `function` answer as device number `slot`, if there is one.
    pub fn insert(&self, slot: usize, function: Arc<dyn PciFunction>) {
        if let Some(place) = self.functions().get_mut(slot) {
            *place = Some(function);
        }
    }

    /// Lets device number `slot` answer no more.
    pub fn remove(&self, slot: usize) -> Option<Arc<dyn PciFunction>> {
        self.functions().get_mut(slot)?.take()
    }

    /// Device number `slot`. The lock is not held while it answers.
    pub(super) fn function(&self, slot: usize) -> Option<Arc<dyn PciFunction>> {
        self.functions().get(slot)?.clone()
    }

    /// The function whose BAR holds the whole access at `offset` in the window, and the offset in the BAR.
    fn decode(&self, offset: u64, len: usize) -> Option<(Arc<dyn PciFunction>, u64)> {
        let address = layout::PCI_WINDOW_START.checked_add(offset)?;
        let functions = self.functions().clone();
        functions.into_iter().flatten().find_map(|function| {
            let offset = address.checked_sub(function.bar()?)?;
            let end = offset.checked_add(u64::try_from(len).ok()?)?;
            (end <= layout::PCI_BAR_SIZE).then_some((function, offset))
        })
    }
}

/// The window of configuration space.
pub struct Ecam(pub Arc<PciBus>);

impl Ecam {
    /// The function and the offset in its configuration space. Accesses are one, two or four bytes wide and
    /// aligned.
    fn find(&self, offset: u64, len: usize) -> Option<(Arc<dyn PciFunction>, usize)> {
        let offset = usize::try_from(offset).ok()?;
        let aligned = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len);
        let (slot, function, register) = (offset >> 15, offset >> 12 & 7, offset & 0xfff);
        (aligned && function == 0).then(|| Some((self.0.function(slot)?, register)))?
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.find(offset, data.len()) {
            Some((function, offset)) => function.config_read(offset, data),
            // As if nobody answered on a wire.
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, offset)) = self.find(offset, data.len()) {
            function.config_write(offset, data);
        }
    }
}

/// The window of BARs.
pub struct BarWindow(pub Arc<PciBus>);

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.0.decode(offset, data.len()) {
            Some((function, offset)) => function.bar_read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, offset)) = self.0.decode(offset, data.len()) {
            function.bar_write(offset, data);
        }
    }
}

/// Device 0: what some guests look for before they believe in a bus.
struct HostBridge(Mutex<FunctionConfig>);

impl HostBridge {
    fn new() -> Self {
        Self(Mutex::new(FunctionConfig::new(Identity {
            vendor: BRIDGE_VENDOR,
            device: BRIDGE_DEVICE,
            class: HOST_BRIDGE,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        })))
    }

    fn config(&self) -> MutexGuard<'_, FunctionConfig> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }
    fn config_write(&self, offset: usize, data: &[u8]) {
        self.config().write(offset, data);
    }
    fn bar(&self) -> Option<u64> {
        None
    }
    fn bar_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with its number, wherever its BAR is.
    struct Fixed(u8, Mutex<Option<u64>>);

    impl PciFunction for Fixed {
        fn config_read(&self, offset: usize, data: &mut [u8]) {
            data.fill(self.0.wrapping_add(offset as u8));
        }
        fn config_write(&self, _: usize, data: &[u8]) {
            assert!(matches!(data.len(), 1 | 2 | 4));
        }
        fn bar(&self) -> Option<u64> {
            *self.1.lock().unwrap()
        }
        fn bar_read(&self, _: u64, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn bar_write(&self, _: u64, _: &[u8]) {}
    }

    fn bus(bars: &[Option<u64>]) -> Arc<PciBus> {
        let bus = PciBus::new();
        for (slot, bar) in (1..).zip(bars) {
            bus.insert(slot, Arc::new(Fixed(slot as u8, Mutex::new(*bar))));
        }
        Arc::new(bus)
    }

    fn read(device: &dyn BusDevice, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xee; len];
        device.read(offset, &mut data);
        device.write(offset, &data);
        data
    }

    #[test]
    fn configuration_space_is_strict() {
        let ecam = Ecam(bus(&[None]));
        assert_eq!(read(&ecam, 0, 4), [0x36, 0x1b, 8, 0]);
        assert_eq!(read(&ecam, 0xa, 2), [0, 6], "a host bridge");
        assert_eq!(read(&ecam, 1 << 15, 4), [1; 4]);
        assert_eq!(read(&ecam, (1 << 15) + 2, 2), [3; 2]);
        // Nobody there; another function; odd widths; not aligned; out of range.
        for (offset, len) in [
            (2 << 15, 4),
            (31 << 15, 4),
            (1 << 15 | 1 << 12, 4),
            (1 << 15 | 7 << 12, 1),
            (1 << 15, 8),
            (1 << 15, 3),
            ((1 << 15) + 2, 4),
            ((1 << 15) + 1, 2),
            (32 << 15, 4),
            (u64::MAX, 1),
            (u64::MAX - 3, 4),
        ] {
            assert_eq!(read(&ecam, offset, len), vec![0xff; len], "{offset:#x}");
        }
    }

    #[test]
    fn bars_may_be_anywhere() {
        let start = layout::PCI_WINDOW_START;
        let window = BarWindow(bus(&[
            Some(start),
            None,
            // Over the first one's end, and beyond.
            Some(start + 0x2000),
            // On RAM, on the last byte of the address space.
            Some(0),
            Some(u64::MAX),
        ]));
        assert_eq!(read(&window, 0, 4), [1; 4]);
        assert_eq!(read(&window, 0x3ffc, 4), [1; 4]);
        assert_eq!(read(&window, 0x4000, 4), [3; 4]);
        // Across an end: whoever holds all of it.
        assert_eq!(read(&window, 0x3ffe, 4), [3; 4]);
        assert_eq!(read(&window, 0x5ffe, 4), [0xff; 4]);
        assert_eq!(read(&window, 0x6000, 8), [0xff; 8]);
        assert_eq!(read(&window, u64::MAX, 1), [0xff]);
    }

    #[test]
    fn what_was_removed_answers_no_more() {
        let bus = bus(&[Some(layout::PCI_WINDOW_START)]);
        assert!(bus.remove(1).is_some());
        assert!(bus.remove(1).is_none());
        assert!(bus.remove(SLOTS).is_none());
        assert_eq!(read(&Ecam(Arc::clone(&bus)), 1 << 15, 4), [0xff; 4]);
        assert_eq!(read(&BarWindow(bus), 0, 4), [0xff; 4]);
    }
}

//! The registers by which PCI devices come and go: what the host wants, and what the guest has let go.
//!
//! Each is 32 bits wide, with one bit for each slot of the bus.
//!
//! | offset | register |
//! |---|---|
//! | 0 | added: slots with a device that the guest has not been told of; reading clears |
//! | 4 | leaving: slots whose device the guest is asked to let go; reading clears |
//! | 8 | eject: the guest writes which slots it has let go |
//!
//! Anything else reads as zero and ignores writes. A guest can let go what it was asked for and nothing else:
//! which devices a machine has is the host's to say. What it lets go answers no more and has nothing in flight from
//! then on; the control thread, told by [`HotplugRegisters::ejected`], takes it away.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use super::{PciBus, PciFunction, SLOTS};
use crate::bus::BusDevice;
use crate::devices::Line;
use crate::devices::acpi::{AcpiRegisters, Event};

const _: () = assert!(SLOTS == u32::BITS as usize);

const ADDED: u64 = 0;
const LEAVING: u64 = 4;
const EJECT: u64 = 8;

/// The registers as plain data.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    added: u32,
    leaving: u32,
    /// Was asked to go, whether the guest has seen it or not.
    asked: u32,
    /// Was let go; the control thread has not seen it yet.
    gone: u32,
}

impl State {
    /// Whether the guest has let go of a device that the control thread has not taken away yet.
    pub fn is_leaving(self) -> bool {
        self.gone != 0
    }
}

/// The registers.
pub struct HotplugRegisters {
    state: Mutex<State>,
    bus: Arc<PciBus>,
    events: Arc<AcpiRegisters>,
    ejected: Line,
}

impl HotplugRegisters {
    /// The registers of `bus`. Changes are announced as [`Event::Pci`] of `events`.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new(bus: Arc<PciBus>, events: Arc<AcpiRegisters>) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            bus,
            events,
            ejected: Line::new()?,
        })
    }

    /// Becomes readable when the guest has let go of devices.
    pub fn ejected(&self) -> &EventFd {
        &self.ejected
    }

    /// The registers as plain data.
    pub fn save(&self) -> State {
        *self.state()
    }

    /// Becomes what `saved` says. False, with nothing changed, where that is of devices which are not there.
    pub fn restore(&self, saved: State) -> bool {
        let there = (0..SLOTS).filter(|slot| self.bus.function(*slot).is_some());
        let there = there.fold(0, |all, slot| all | bit(slot));
        let known = (saved.added | saved.leaving | saved.asked) & !there == 0 && saved.gone == 0;
        if known {
            *self.state() = saved;
        }
        known
    }

    /// Puts `function` in `slot`, which is free, and tells the guest.
    pub fn insert(&self, slot: usize, function: Arc<dyn PciFunction>) {
        {
            // Under the lock that lets devices go: what was asked of the slot before is not about this one.
            let mut state = self.state();
            state.leaving &= !bit(slot);
            state.asked &= !bit(slot);
            state.added |= bit(slot);
            self.bus.insert(slot, function);
        }
        self.events.raise(Event::Pci);
    }

    /// Asks the guest to let go the device in `slot`, if it has not. It may be asked again.
    pub fn ask(&self, slot: usize) {
        {
            let mut state = self.state();
            if self.bus.function(slot).is_none() {
                return;
            }
            state.leaving |= bit(slot);
            state.asked |= bit(slot);
        }
        self.events.raise(Event::Pci);
    }

    /// Takes the slots whose device the guest has let go.
    pub fn take_gone(&self) -> Vec<usize> {
        // First forgotten, then looked at: what comes later wakes us again.
        let _ = self.ejected.read();
        let gone = std::mem::take(&mut self.state().gone);
        (0..SLOTS).filter(|slot| gone & bit(*slot) != 0).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn eject(&self, slots: u32) {
        // Of two vCPUs that let go the same device, one finds it.
        let (granted, functions) = {
            let mut state = self.state();
            let granted = state.asked & slots;
            state.asked &= !granted;
            // What was said of it and not heard is not about the next device in its slot.
            state.added &= !granted;
            state.leaving &= !granted;
            let slots = (0..SLOTS).filter(|slot| granted & bit(*slot) != 0);
            // None answers any more when the lock is free again.
            let functions: Vec<_> = slots.filter_map(|slot| self.bus.remove(slot)).collect();
            (granted, functions)
        };
        for function in functions {
            function.stop();
        }
        if granted != 0 {
            self.state().gone |= granted;
            // An eventfd fails only in ways that a new attempt would too.
            let _ = self.ejected.trigger();
        }
    }
}

fn bit(slot: usize) -> u32 {
    let slot = u32::try_from(slot).unwrap_or(u32::MAX);
    1_u32.checked_shl(slot).unwrap_or(0)
}

impl BusDevice for HotplugRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            let mut state = self.state();
            let value = match offset {
                ADDED => std::mem::take(&mut state.added),
                LEAVING => std::mem::take(&mut state.leaving),
                _ => 0,
            };
            *data = value.to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (EJECT, Ok(slots)) = (offset, <[u8; 4]>::try_from(data)) {
            self.eject(u32::from_le_bytes(slots));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ending::EndSignal;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Stopped(AtomicUsize);

    impl PciFunction for Stopped {
        fn config_read(&self, _: usize, _: &mut [u8]) {}
        fn config_write(&self, _: usize, _: &[u8]) {}
        fn bar(&self) -> Option<u64> {
            None
        }
        fn bar_read(&self, _: u64, _: &mut [u8]) {}
        fn bar_write(&self, _: u64, _: &[u8]) {}
        fn stop(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn registers() -> (HotplugRegisters, Arc<PciBus>, Arc<AcpiRegisters>) {
        let ends = Arc::new(EndSignal::new().unwrap());
        let acpi = Arc::new(AcpiRegisters::new(ends).unwrap());
        let bus = Arc::new(PciBus::new());
        let registers = HotplugRegisters::new(Arc::clone(&bus), Arc::clone(&acpi)).unwrap();
        (registers, bus, acpi)
    }

    fn read(device: &dyn BusDevice, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_guest_is_told_once() {
        let (registers, bus, acpi) = registers();
        let function = || Arc::<Stopped>::default();
        bus.insert(1, function());
        registers.insert(3, function());
        registers.insert(31, function());
        registers.ask(1);
        assert!(acpi.interrupt().read().is_ok());
        assert_eq!(read(acpi.as_ref(), 4), 1 << 2, "the event");
        for len in [1, 2, 3, 8] {
            let mut data = vec![0xff; len];
            registers.read(0, &mut data);
            assert_eq!(data, vec![0; len], "an odd width neither sees nor clears");
        }
        assert_eq!(
            (read(&registers, 0), read(&registers, 0)),
            (1 << 3 | 1 << 31, 0)
        );
        assert_eq!((read(&registers, 4), read(&registers, 4)), (1 << 1, 0));
        for offset in [8, 12, 28, u64::MAX] {
            assert_eq!(read(&registers, offset), 0);
        }
    }

    #[test]
    fn a_guest_lets_go_what_it_was_asked_for() {
        let (registers, bus, _) = registers();
        let function = Arc::new(Stopped::default());
        for slot in [1, 2] {
            bus.insert(slot, Arc::clone(&function) as Arc<dyn PciFunction>);
        }
        registers.write(8, &u32::MAX.to_le_bytes());
        assert!(registers.take_gone().is_empty());
        assert!(registers.ejected().read().is_err());
        registers.ask(2);
        for (offset, data) in [
            (8, &[0xff; 1][..]),
            (8, &[0xff; 8]),
            (0, &[0xff; 4]),
            (4, &[0xff; 4]),
        ] {
            registers.write(offset, data);
        }
        assert!(registers.take_gone().is_empty());
        registers.write(8, &u32::MAX.to_le_bytes());
        registers.write(8, &u32::MAX.to_le_bytes());
        assert_eq!(function.0.load(Ordering::SeqCst), 1, "stopped once");
        assert_eq!(registers.take_gone(), [2]);
        assert!(registers.take_gone().is_empty());
        assert!(bus.remove(2).is_none() && bus.remove(1).is_some());
        // What it has not heard of the one is not about the next.
        registers.insert(3, function);
        registers.ask(3);
        registers.write(8, &(1_u32 << 3).to_le_bytes());
        assert_eq!((read(&registers, 0), read(&registers, 4)), (0, 0));
        assert_eq!(registers.take_gone(), [3]);
        // Nobody there.
        registers.ask(9);
        registers.write(8, &(1_u32 << 9).to_le_bytes());
        assert!(registers.take_gone().is_empty());
    }

    /// Whoever asks twice, the second time when the guest has let it go and nobody has looked yet.
    #[test]
    fn what_was_asked_of_a_device_is_not_asked_of_the_next() {
        for asked_before_the_first in [false, true] {
            let (registers, bus, _) = registers();
            let function = Arc::new(Stopped::default());
            let slot = 1_u32 << 4;
            registers.insert(4, Arc::clone(&function) as Arc<dyn PciFunction>);
            registers.ask(4);
            if asked_before_the_first {
                assert_eq!(read(&registers, 4), slot);
                registers.ask(4);
            }
            registers.write(8, &slot.to_le_bytes());
            registers.ask(4);
            assert_eq!(read(&registers, 4), 0, "there is nobody to ask");
            registers.write(8, &slot.to_le_bytes());
            assert_eq!(registers.take_gone(), [4]);
            registers.insert(4, Arc::clone(&function) as Arc<dyn PciFunction>);
            registers.write(8, &slot.to_le_bytes());
            assert!(registers.take_gone().is_empty() && bus.function(4).is_some());
            assert_eq!((read(&registers, 0), read(&registers, 4)), (slot, 0));
            assert_eq!(function.0.load(Ordering::SeqCst), 1, "the first one");
        }
    }
}

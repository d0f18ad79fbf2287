//! The page of registers that the ACPI tables name: sleep, reset, and events for the guest.
//!
//! | offset | bytes | register |
//! |---|---|---|
//! | 0 | 1 | sleep control (ACPI 6.5, section 4.8.3.7): `SLP_EN` with `SLP_TYP` 5 powers off |
//! | 1 | 1 | sleep status: always 0, nothing wakes up here |
//! | 2 | 1 | reset: writing 1 resets |
//! | 4 | 4 | pending [`Event`]s of the generic event device; reading clears |
//!
//! Anything else reads as zero and ignores writes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::Line;
use crate::bus::BusDevice;
use crate::ending::{End, EndSignal};
use vm_superio::Trigger;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;
/// Offset of the register of pending events.
pub const EVENTS: u64 = 4;

/// `SLP_TYP` of `\_S5` in bits 4..2, and `SLP_EN` in bit 5.
const POWER_OFF: u8 = 5 << 2 | 1 << 5;
const SLEEP_BITS: u8 = 0b0011_1100;
const RESET_VALUE: u8 = 1;

/// What the generic event device tells a guest of: its bit in the register of pending events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Event {
    /// The power button was pressed.
    PowerButton = 1 << 0,
    /// vCPUs were added, or are asked to go.
    Vcpus = 1 << 1,
    /// PCI devices came, or are asked to go.
    Pci = 1 << 2,
    /// The machine is another one than before: it was restored or cloned.
    Generation = 1 << 3,
    /// The clock page has changed.
    Clock = 1 << 4,
}

/// The registers.
pub struct AcpiRegisters {
    pending: AtomicU32,
    line: Line,
    ends: Arc<EndSignal>,
}

impl AcpiRegisters {
    /// Registers that announce the machine's end to `ends`.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new(ends: Arc<EndSignal>) -> io::Result<Self> {
        Ok(Self {
            pending: AtomicU32::new(0),
            line: Line::new()?,
            ends,
        })
    }

    /// The interrupt of the generic event device.
    pub fn interrupt(&self) -> &EventFd {
        &self.line
    }

    /// Presses the power button: a guest with ACPI shuts down in its own time.
    pub fn press_power_button(&self) {
        self.raise(Event::PowerButton);
    }

    /// What the guest has not been told yet: bits of [`Event`].
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::SeqCst)
    }

    /// Has the guest told what was pending on another machine.
    pub fn restore(&self, pending: u32) {
        self.pending.fetch_or(pending, Ordering::SeqCst);
        if pending != 0 {
            // As above.
            let _ = self.line.trigger();
        }
    }

    /// Tells the guest of `event`.
    pub fn raise(&self, event: Event) {
        // First the bit: the guest's handler reads it when the interrupt comes.
        self.pending.fetch_or(event as u32, Ordering::SeqCst);
        // An eventfd fails only in ways that a new attempt would too.
        let _ = self.line.trigger();
    }
}

impl BusDevice for AcpiRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (EVENTS, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(data)) {
            *data = self.pending.swap(0, Ordering::SeqCst).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SLEEP_CONTROL, [value]) if value & SLEEP_BITS == POWER_OFF => {
                self.ends.announce(End::PoweredOff);
            }
            (RESET, [RESET_VALUE]) => self.ends.announce(End::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> (AcpiRegisters, Arc<EndSignal>) {
        let ends = Arc::new(EndSignal::new().unwrap());
        (AcpiRegisters::new(Arc::clone(&ends)).unwrap(), ends)
    }

    #[test]
    fn s5_powers_off_and_nothing_else_does() {
        let (registers, ends) = registers();
        for value in [0, 0x14, 0x20, 0x20 | 4 << 2, 0x20 | 7 << 2] {
            registers.write(0, &[value]);
        }
        for (offset, data) in [
            (0, &[0x34, 0][..]),
            (1, &[0x34]),
            (2, &[0]),
            (2, &[2]),
            (3, &[1]),
            (4, &[1]),
            (4095, &[1]),
        ] {
            registers.write(offset, data);
        }
        registers.write(u64::MAX, &[]);
        assert_eq!(ends.announced(), None);
        registers.write(0, &[0x34]);
        assert_eq!(ends.announced(), Some(End::PoweredOff));
    }

    #[test]
    fn reset_resets() {
        let (registers, ends) = registers();
        registers.write(2, &[1]);
        assert_eq!(ends.announced(), Some(End::Reset));
    }

    #[test]
    fn the_power_button_interrupts_and_reads_once() {
        let (registers, _) = registers();
        let mut data = [0xff; 4];
        registers.read(4, &mut data);
        assert_eq!(data, [0; 4]);
        registers.press_power_button();
        assert_eq!(registers.interrupt().read().unwrap(), 1);
        let mut odd = [0xff; 3];
        registers.read(4, &mut odd);
        assert_eq!(odd, [0; 3], "an odd width neither sees nor clears it");
        registers.read(4, &mut data);
        assert_eq!(data, [1, 0, 0, 0]);
        registers.read(4, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn events_gather_until_they_are_read() {
        let (registers, _) = registers();
        registers.raise(Event::Vcpus);
        registers.raise(Event::Clock);
        registers.raise(Event::Clock);
        let mut data = [0; 4];
        registers.read(4, &mut data);
        assert_eq!(data, [0b1_0010, 0, 0, 0]);
    }
}

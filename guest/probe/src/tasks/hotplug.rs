//! `hotplug`: waits for the generic event device's interrupt, as a guest with ACPI does, and does what the registers
//! behind it say. A device that came is used by the task `probe.use=TASK`; one that is asked to go is let go. It ends
//! when `probe.rounds=N` (1) have gone. With `probe.hostile=1` it lets go what nobody asked it for, with a request in
//! flight, and several times.

use super::{Failure, blk};
use crate::cmdline::Cmdline;
use crate::machine::{read16, read32, wait_for, write16, write32};
use crate::serial;

/// Pending events; of PCI devices.
const EVENTS: u64 = 0xc000_0004;
const PCI: u32 = 1 << 2;
/// Which slots have a new device, which are asked to let theirs go, and which have.
const ADDED: u64 = 0xc000_0020;
const LEAVING: u64 = 0xc000_0024;
const EJECT: u64 = 0xc000_0028;

/// Configuration space, and where BARs start out.
const ECAM: u64 = 0xe000_0000;
const BARS: u64 = 0xe100_0000;
const BARS_END: u64 = 0xe110_0000;

/// The I/O APIC's pin of the event device.
const IOAPIC: u64 = 0xfec0_0000;
const IOAPIC_WINDOW: u64 = IOAPIC + 0x10;
const GED_PIN: u32 = 5;
/// The local APIC: id, the bit that switches it on, requested interrupts.
const APIC: u64 = 0xfee0_0000;
const APIC_ID: u64 = APIC + 0x20;
const APIC_SPURIOUS: u64 = APIC + 0xf0;
const APIC_ON: u32 = 0x1ff;
const APIC_REQUESTED: u64 = APIC + 0x200;
const FIRST_VECTOR: u32 = 0xc0;

/// The event device's interrupt, seen where the local APIC keeps what it has not delivered. It is never taken from
/// there, so each gets a vector of its own.
struct Interrupt {
    vector: u32,
}

impl Interrupt {
    fn new() -> Self {
        write32(APIC_SPURIOUS, APIC_ON);
        let interrupt = Self {
            vector: FIRST_VECTOR,
        };
        interrupt.route();
        interrupt
    }

    /// An edge on the pin becomes the vector, here.
    fn route(&self) {
        let set = |register: u32, value: u32| {
            write32(IOAPIC, register);
            write32(IOAPIC_WINDOW, value);
        };
        let entry = 0x10 + 2 * GED_PIN;
        set(entry + 1, read32(APIC_ID) & 0xff << 24);
        set(entry, self.vector);
    }

    fn wait(&mut self) -> Result<(), Failure> {
        let register = APIC_REQUESTED + u64::from(self.vector / 32) * 16;
        let bit = self.vector % 32;
        wait_for(|| read32(register) >> bit & 1 != 0)
            .map_err(|_| "no interrupt of the event device came")?;
        self.vector += 1;
        self.route();
        Ok(())
    }
}

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let hostile = cmdline.number("probe.hostile") == Some(1);
    let task = cmdline.value("probe.use").unwrap_or("boot");
    let mut rounds = cmdline.number("probe.rounds").unwrap_or(1);
    let mut interrupt = Interrupt::new();
    if hostile {
        write32(EJECT, u32::MAX);
    }
    serial::line(format_args!("probe: waiting"));
    while rounds > 0 {
        interrupt.wait()?;
        if read32(EVENTS) & PCI == 0 {
            // Heard of already, by an interrupt before.
            continue;
        }
        let (added, leaving) = (read32(ADDED), read32(LEAVING));
        if added != 0 {
            serial::line(format_args!("probe: added {added:#x}"));
            if !slots(added).all(is_there) {
                return Err("nobody is in the slot");
            }
            super::run(task, cmdline)?;
            serial::line(format_args!("probe: used"));
        }
        if leaving != 0 {
            serial::line(format_args!("probe: leaving {leaving:#x}"));
            if hostile {
                blk::leave_in_flight(cmdline)?;
                write32(EJECT, u32::MAX);
                write32(EJECT, 0);
                write32(EJECT, u32::MAX);
                touch(leaving);
            }
            write32(EJECT, leaving);
            if slots(leaving).any(is_there) {
                return Err("somebody is still in the slot");
            }
            rounds = rounds.saturating_sub(u64::from(leaving.count_ones()));
            serial::line(format_args!("probe: ejected, {rounds} to go"));
        }
    }
    Ok(())
}

fn slots(bits: u32) -> impl Iterator<Item = u32> {
    (0..32).filter(move |slot| bits >> slot & 1 != 0)
}

fn is_there(slot: u32) -> bool {
    read16(ECAM + (u64::from(slot) << 15)) != 0xffff
}

/// Writes to everything that was the device's.
fn touch(leaving: u32) {
    for slot in slots(leaving) {
        for register in (0..64).step_by(4) {
            write32(ECAM + (u64::from(slot) << 15) + register, u32::MAX);
        }
    }
    for address in (BARS..BARS_END).step_by(128) {
        write16(address, 0);
    }
}

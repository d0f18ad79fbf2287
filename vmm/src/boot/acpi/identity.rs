//! Where the guest finds what tells it that it was restored or cloned.

use acpi_tables::Aml;
use acpi_tables::aml::{Memory32Fixed, Name, Notify, Package, Path, ResourceTemplate, ZERO};

use super::bytes;
use super::dsdt::{device_in_sb, window};
use super::events::Handler;
use crate::boot::Error;
use crate::devices::acpi::Event;
use crate::memory::layout;

/// Both devices say by this number that their memory has changed.
const CHANGED: u8 = 0x80;

/// Appends the devices of the generation id and of the clock page, and what the guest has to do when they
/// change.
pub(super) fn devices(body: &mut Vec<u8>) -> Result<[Handler; 2], Error> {
    generation(body);
    clock(body)?;
    let handler = |event, device: &str| {
        let device: Path = device.into();
        let code = bytes(&Notify::new(&device, &CHANGED));
        Handler { event, code }
    };
    Ok([
        handler(Event::Generation, "\\_SB_.VGEN"),
        handler(Event::Clock, "\\_SB_.VCLK"),
    ])
}

/// Guests know the device by its compatible id; Linux also by the other one.
fn generation(body: &mut Vec<u8>) {
    let id = "VM_Gen_Counter";
    let (compatible, description) = (Name::new("_CID".into(), &id), Name::new("_DDN".into(), &id));
    // The address: its lower half and its upper half.
    let address = layout::GENERATION_START as u32;
    let address = Package::new(vec![&address, &ZERO]);
    let address = Name::new("ADDR".into(), &address);
    let more: [&dyn Aml; 3] = [&compatible, &description, &address];
    device_in_sb(body, "VGEN", &"VMGENCTR", 0, &more, None);
}

fn clock(body: &mut Vec<u8>) -> Result<(), Error> {
    let id = "VMCLOCK";
    let (compatible, description) = (Name::new("_CID".into(), &id), Name::new("_DDN".into(), &id));
    let (base, size) = window(layout::CLOCK_START, layout::CLOCK_SIZE)?;
    let memory = Memory32Fixed::new(false, base, size);
    let resources = ResourceTemplate::new(vec![&memory]);
    let more: [&dyn Aml; 2] = [&compatible, &description];
    device_in_sb(body, "VCLK", &"AMZNC10C", 0, &more, Some(resources));
    Ok(())
}

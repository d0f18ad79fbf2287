//! The DSDT: sleep state, power button, and every device that has no way to announce itself.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Notify, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::sdt::Sdt;

use super::events::{self, Handler};
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes, cpus, identity, pci};
use crate::boot::{Error, MachineDescription, MmioDeviceInfo};
use crate::devices::acpi::Event;
use crate::memory::layout;

const HEADER_SIZE: u32 = 36;
const REVISION: u8 = 2;
/// Value that the guest writes to sleep control (with SLP_EN) to switch off.
const S5_SLEEP_TYPE: u8 = 5;
/// Notification "S0 power button pressed" (ACPI 6.5, table 5.164).
const POWER_BUTTON_PRESSED: u8 = 0x80;
const COM1_PORTS: u8 = 8;

/// The table for `machine`.
pub(super) fn build(machine: &MachineDescription) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    sleep_state(&mut body);
    for (index, device) in machine.mmio_devices.iter().enumerate() {
        virtio_mmio(&mut body, index, device)?;
    }
    let pci = machine.has_pci.then(|| pci::root_bridge(&mut body));
    if machine.has_com1 {
        com1(&mut body);
    }
    if machine.has_i8042 {
        i8042(&mut body);
    }
    let mut handlers = vec![power_button(&mut body)];
    handlers.extend(pci.transpose()?);
    handlers.extend(cpus::hotplug(&mut body, machine)?);
    handlers.extend(identity::devices(&mut body)?);
    events::generic_event_device(&mut body, &machine.ged, &handlers)?;

    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER_SIZE,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&body);
    Ok(dsdt.as_slice().to_vec())
}

fn sleep_state(body: &mut Vec<u8>) {
    let types = Package::new(vec![&S5_SLEEP_TYPE]);
    Name::new("\\_S5_".into(), &types).to_aml_bytes(body);
}

/// Linux knows a virtio-mmio device by this id (drivers/virtio/virtio_mmio.c).
fn virtio_mmio(body: &mut Vec<u8>, index: usize, device: &MmioDeviceInfo) -> Result<(), Error> {
    let (base, size) = window(device.base, device.size)?;
    let memory = Memory32Fixed::new(true, base, size);
    let interrupt = edge(device.gsi);
    // Names have four characters; more devices than this do not fit the interrupt pins by far.
    let name = format!("V{:03X}", index & 0xfff);
    device_in_sb(
        body,
        &name,
        &"LNRO0005",
        index,
        &[&Name::new("_CCA".into(), &acpi_tables::aml::ONE)],
        Some(ResourceTemplate::new(vec![&memory, &interrupt])),
    );
    Ok(())
}

fn com1(body: &mut Vec<u8>) {
    let ports = IO::new(layout::COM1_PORT, layout::COM1_PORT, 1, COM1_PORTS);
    let interrupt = edge(layout::COM1_GSI);
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    device_in_sb(
        body,
        "COM1",
        &EISAName::new("PNP0501"),
        0,
        &[],
        Some(resources),
    );
}

fn i8042(body: &mut Vec<u8>) {
    let data = IO::new(layout::I8042_PORT, layout::I8042_PORT, 1, 1);
    let command = layout::I8042_PORT + 4;
    let command = IO::new(command, command, 1, 1);
    let interrupt = edge(layout::I8042_GSI);
    let resources = ResourceTemplate::new(vec![&data, &command, &interrupt]);
    device_in_sb(
        body,
        "PS2K",
        &EISAName::new("PNP0303"),
        0,
        &[],
        Some(resources),
    );
}

fn power_button(body: &mut Vec<u8>) -> Handler {
    device_in_sb(body, "PWRB", &EISAName::new("PNP0C0C"), 0, &[], None);
    let button: Path = "\\_SB_.PWRB".into();
    Handler {
        event: Event::PowerButton,
        code: bytes(&Notify::new(&button, &POWER_BUTTON_PRESSED)),
    }
}

/// Appends a device under `\_SB_`.
pub(super) fn device_in_sb(
    body: &mut Vec<u8>,
    name: &str,
    hid: &dyn Aml,
    uid: usize,
    more: &[&dyn Aml],
    resources: Option<ResourceTemplate>,
) {
    let hid = Name::new("_HID".into(), hid);
    let uid = Name::new("_UID".into(), &uid);
    let resources = resources.map(|template| Name::new("_CRS".into(), &template));
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid];
    if let Some(resources) = &resources {
        children.push(resources);
    }
    children.extend_from_slice(more);
    let device = Device::new(name.into(), children);
    Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(body);
}

/// An interrupt pin: edge-triggered, active high, not shared.
pub(super) fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// A window below 4 GiB as 32-bit numbers.
pub(super) fn window(base: u64, size: u64) -> Result<(u32, u32), Error> {
    let too_high = || Error::DeviceTooHigh { base, size };
    let end = base.checked_add(size).ok_or_else(too_high)?;
    if end > 1 << 32 {
        return Err(too_high());
    }
    let base = u32::try_from(base).map_err(|_| too_high())?;
    let size = u32::try_from(size).map_err(|_| too_high())?;
    Ok((base, size))
}

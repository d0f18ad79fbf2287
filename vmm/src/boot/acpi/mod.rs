//! The ACPI tables (ACPI 6.5, hardware-reduced): how an unmodified kernel finds its CPUs, its
//! devices, its power button, and how to switch off.

mod cpus;
mod dsdt;
mod events;
mod identity;
mod numa;
mod pci;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{IoApic, LocalInterruptController, MADT};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use super::{Error, MachineDescription};
use crate::memory::{GuestMemory, layout};

const OEM_ID: [u8; 6] = *b"CASEMT";
const OEM_TABLE_ID: [u8; 8] = *b"CASEMATE";
const OEM_REVISION: u32 = 1;

/// Registers in the page at `layout::ACPI_REGISTERS_START`.
const SLEEP_CONTROL: u64 = layout::ACPI_REGISTERS_START;
const SLEEP_STATUS: u64 = layout::ACPI_REGISTERS_START + 1;
const RESET: u64 = layout::ACPI_REGISTERS_START + 2;
/// What a guest writes to the reset register.
const RESET_VALUE: u8 = 1;
/// IA-PC boot architecture flags (table 5.10): an i8042 is there; no VGA to probe; no CMOS clock.
const BOOT_ARCH_8042: u16 = 1 << 1;
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_CMOS_RTC: u16 = 1 << 5;
/// PCAT_COMPAT in the MADT's flags (section 5.2.12): there is a pair of i8259, to be masked by who uses
/// the I/O APIC.
const PCAT_COMPAT: u8 = 1 << 0;
/// Where a table has its checksum, and the MADT its flags.
const CHECKSUM: usize = 9;
const MADT_FLAGS: usize = 40;

/// Writes all tables into `layout::ACPI_TABLES_START..ACPI_TABLES_END`; returns the RSDP's address.
pub(super) fn write(memory: &GuestMemory, machine: &MachineDescription) -> Result<u64, Error> {
    let start = layout::ACPI_TABLES_START;
    let tables = build(machine, start)?;
    let limit = layout::ACPI_TABLES_END - start;
    let size = tables.len() as u64;
    if size > limit {
        return Err(Error::AcpiTooLarge { size, limit });
    }
    memory
        .write_slice(&tables, GuestAddress(start))
        .map_err(Error::memory("the ACPI tables", start))?;
    Ok(start)
}

/// Builds the tables as they lie in memory from `start` on: the RSDP first, where a guest without
/// boot parameters looks for it, then what each table points to before it.
fn build(machine: &MachineDescription, start: u64) -> Result<Vec<u8>, Error> {
    let mut blob = Blob::new(start, Rsdp::len());
    let dsdt = blob.add(&dsdt::build(machine)?);
    let fadt = blob.add(&bytes(&fadt(machine, dsdt)));
    let madt = blob.add(&madt(machine));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if machine.has_pci {
        xsdt.add_entry(blob.add(&pci::mcfg()));
    }
    for table in numa::tables(machine) {
        xsdt.add_entry(blob.add(&table));
    }
    let xsdt = blob.add(&bytes(&xsdt));
    Ok(blob.finish(&bytes(&Rsdp::new(OEM_ID, xsdt))))
}

fn fadt(machine: &MachineDescription, dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Set means: no button in fixed hardware. The power button is a device.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    let i8042 = if machine.has_i8042 { BOOT_ARCH_8042 } else { 0 };
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS_RTC | i8042).into();
    fadt.sleep_control_reg = register(SLEEP_CONTROL);
    fadt.sleep_status_reg = register(SLEEP_STATUS);
    fadt.reset_reg = register(RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// A one-byte register in memory.
fn register(address: u64) -> GAS {
    GAS::new(
        AddressSpace::SystemMemory,
        8,
        0,
        AccessSize::ByteAccess,
        address,
    )
}

fn madt(machine: &MachineDescription) -> Vec<u8> {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LAPIC_START as u32),
    );
    for id in 0..machine.max_vcpus {
        madt.add_structure(cpus::local_apic(id, machine));
    }
    // No interrupt overrides: every pin is named by the device that has it.
    madt.add_structure(IoApic::new(0, layout::IOAPIC_START as u32, 0));
    let mut table = bytes(&madt);
    // The i8259 pair is routed for the timer's sake. The library knows no flags of this table.
    if machine.pit {
        for (at, change) in [
            (MADT_FLAGS, PCAT_COMPAT),
            (CHECKSUM, PCAT_COMPAT.wrapping_neg()),
        ] {
            if let Some(byte) = table.get_mut(at) {
                *byte = byte.wrapping_add(change);
            }
        }
    }
    table
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Tables one after another, each at a multiple of 16 bytes.
struct Blob {
    start: u64,
    bytes: Vec<u8>,
}

impl Blob {
    /// Leaves `head` bytes free at the start.
    fn new(start: u64, head: usize) -> Self {
        Self {
            start,
            bytes: vec![0; head],
        }
    }

    /// Appends a table; returns its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let offset = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(table);
        self.start.saturating_add(offset as u64)
    }

    fn finish(mut self, head: &[u8]) -> Vec<u8> {
        for (to, from) in self.bytes.iter_mut().zip(head) {
            *to = *from;
        }
        self.bytes
    }
}

#[cfg(test)]
mod tests;

//! The tables that the processor itself reads at the first instruction: descriptors and pages.

use vm_memory::{Bytes, GuestAddress};

use super::{Error, Protocol};
use crate::memory::{GuestMemory, layout};

/// Selector of the code segment: `__BOOT_CS` of Linux's boot protocol.
pub const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segments: `__BOOT_DS` of Linux's boot protocol.
pub const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment, which virtualisation hardware insists on.
pub const TSS_SELECTOR: u16 = 0x20;

/// Descriptors (Intel SDM volume 3, 3.4.5): flat, present, ring 0, accessed.
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
/// A busy TSS at address 0; with 64 bits the entry after it is its upper half, zero.
const TSS: u64 = 0x0000_8b00_0000_ffff;

/// Page table entries: present and writable; and a 2 MiB page.
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 0x83;
const PAGE_DIRECTORIES: u64 = 4;
const ENTRIES: u64 = 512;
const LARGE_PAGE_SHIFT: u32 = 21;

/// The global descriptor table for `protocol`, indexed by the selectors above divided by eight; it goes to
/// `layout::GDT_START`.
pub const fn gdt(protocol: Protocol) -> [u64; 6] {
    let code = match protocol {
        Protocol::Linux64 => CODE_64,
        Protocol::Pvh => CODE_32,
    };
    [0, 0, code, DATA, TSS, 0]
}

/// Writes the GDT, and page tables that map the first 4 GiB to themselves for a kernel entered in
/// long mode.
pub(super) fn write(memory: &GuestMemory, protocol: Protocol) -> Result<(), Error> {
    write_table(memory, layout::GDT_START, &gdt(protocol))?;
    if protocol == Protocol::Pvh {
        return Ok(());
    }
    write_table(
        memory,
        layout::PML4_START,
        &[layout::PDPTE_START | PRESENT_WRITABLE],
    )?;
    let directories: Vec<u64> = (0..PAGE_DIRECTORIES)
        .map(|i| (layout::PDE_START + i * ENTRIES * 8) | PRESENT_WRITABLE)
        .collect();
    write_table(memory, layout::PDPTE_START, &directories)?;
    let pages: Vec<u64> = (0..PAGE_DIRECTORIES * ENTRIES)
        .map(|i| (i << LARGE_PAGE_SHIFT) | LARGE_PAGE)
        .collect();
    write_table(memory, layout::PDE_START, &pages)
}

fn write_table(memory: &GuestMemory, address: u64, entries: &[u64]) -> Result<(), Error> {
    let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
    memory
        .write_slice(&bytes, GuestAddress(address))
        .map_err(Error::memory("descriptor and page tables", address))
}

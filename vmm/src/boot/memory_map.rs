//! What a guest is told about its physical memory (e820 and PVH's memory map use the same types).

use vm_memory::{Address, GuestMemoryRegion};

use crate::memory::{GuestMemory, layout};

/// Usable memory.
pub(super) const RAM: u32 = 1;
/// Not to be used.
pub(super) const RESERVED: u32 = 2;
/// ACPI tables; a guest may reuse it once it has read them.
pub(super) const ACPI: u32 = 3;

/// A range of physical addresses and its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) start: u64,
    pub(super) size: u64,
    pub(super) kind: u32,
}

/// The map, in the order of addresses, without overlaps.
pub(super) fn memory_map(memory: &GuestMemory, has_pci: bool) -> Vec<Entry> {
    let mut map = Vec::new();
    for region in memory.ram() {
        let start = region.start_addr().raw_value();
        let end = start.saturating_add(region.len());
        // Cut the legacy hole out: between its ends nothing is RAM for the guest.
        add(&mut map, start, end.min(layout::LOW_MEMORY_END), RAM);
        add(&mut map, start.max(layout::HIGH_MEMORY_START), end, RAM);
    }
    let (tables, tables_end) = (layout::ACPI_TABLES_START, layout::ACPI_TABLES_END);
    add(&mut map, tables, tables_end, ACPI);
    // The guest may not reuse these: they change while it runs.
    let clock_end = layout::CLOCK_START.saturating_add(layout::CLOCK_SIZE);
    add(&mut map, layout::GENERATION_START, clock_end, RESERVED);
    let reset_vector = layout::RESET_VECTOR;
    add(&mut map, reset_vector, layout::HIGH_MEMORY_START, RESERVED);
    let (hole, hole_end) = (layout::MMIO_HOLE_START, layout::MMIO_HOLE_END);
    if has_pci {
        // Not the window of BARs: Linux gives no BAR an address that is reserved. The configuration
        // space must be: Linux uses none that is not.
        let window = layout::PCI_WINDOW_START;
        let window_end = window.saturating_add(layout::PCI_WINDOW_SIZE);
        add(&mut map, hole, window, RESERVED);
        add(&mut map, window_end, hole_end, RESERVED);
    } else {
        add(&mut map, hole, hole_end, RESERVED);
    }
    map.sort_by_key(|entry| entry.start);
    map
}

fn add(map: &mut Vec<Entry>, start: u64, end: u64, kind: u32) {
    if let Some(size) = end.checked_sub(start).filter(|size| *size > 0) {
        map.push(Entry { start, size, kind });
    }
}

/// End of the RAM that starts at 0: what a kernel and an initrd are loaded into.
pub(super) fn low_memory_end(memory: &GuestMemory) -> u64 {
    let mut regions = memory.ram();
    let first = regions.find(|region| region.start_addr().raw_value() == 0);
    first.map_or(0, |region| region.len().min(layout::MMIO_HOLE_START))
}

/// All of the guest's RAM in bytes.
pub(super) fn total_size(memory: &GuestMemory) -> u64 {
    memory
        .ram()
        .fold(0, |sum, region| region.len().saturating_add(sum))
}

//! The guest's physical address space and its interrupt pins, in one place.
//!
//! ```text
//! 0x0000_0500  GDT, boot_params / start_info, page tables, command line   (boot only)
//! 0x000a_0000  legacy hole; ACPI tables, generation id and clock page lie in 0xe_0000..0x10_0000
//! 0x0010_0000  RAM, up to 3 GiB
//! 0xc000_0000  MMIO hole: ACPI registers, virtio-mmio windows
//! 0xe000_0000  MMIO hole: PCI configuration space and BARs (with PCI only)
//! 0xfec0_0000  MMIO hole: I/O APIC, local APICs
//! 0x1_0000_0000 RAM beyond 3 GiB
//! at the next 2 GiB above it: memory that comes later (virtio-mem)
//! at the next GiB above all that: memory of devices (pmem)
//! ```

use std::ops::RangeInclusive;

/// Global descriptor table used at the guest's first instruction (six entries, 0x30 bytes).
pub const GDT_START: u64 = 0x500;
/// Interrupt descriptor table at the first instruction (empty).
pub const IDT_START: u64 = 0x540;
/// PVH: `hvm_start_info`, its module list and memory map follow it.
pub const PVH_INFO_START: u64 = 0x6000;
/// Linux 64-bit protocol: `boot_params` (the zero page).
pub const ZERO_PAGE_START: u64 = 0x7000;
/// Stack pointer at the first instruction.
pub const BOOT_STACK_POINTER: u64 = 0x8ff0;
/// Identity page tables: PML4, then PDPT, then four page directories (4 GiB mapped by 2 MiB pages).
pub const PML4_START: u64 = 0x9000;
/// See [`PML4_START`].
pub const PDPTE_START: u64 = 0xa000;
/// See [`PML4_START`]; four pages.
pub const PDE_START: u64 = 0xb000;
/// The kernel command line.
pub const CMDLINE_START: u64 = 0x20000;
/// Largest command line in bytes, its NUL included (Linux on x86: COMMAND_LINE_SIZE).
pub const CMDLINE_MAX_SIZE: usize = 2048;
/// End of usable low memory (start of the legacy hole).
pub const LOW_MEMORY_END: u64 = 0x9fc00;
/// ACPI tables, RSDP first; guests without EFI look for it here too.
pub const ACPI_TABLES_START: u64 = 0xe0000;
/// End of the area for ACPI tables.
pub const ACPI_TABLES_END: u64 = GENERATION_START;
/// A page that starts with the machine's generation id; reserved.
pub const GENERATION_START: u64 = 0xfd000;
/// The clock page; reserved.
pub const CLOCK_START: u64 = 0xfe000;
/// Its size in bytes.
pub const CLOCK_SIZE: u64 = 0x1000;
/// Where a guest that restarts the old way jumps to, in real mode; reserved up to 1 MiB.
pub const RESET_VECTOR: u64 = 0xffff0;
/// Memory that a kernel is loaded to starts here.
pub const HIGH_MEMORY_START: u64 = 0x100000;
/// First address of the hole below 4 GiB that holds no RAM.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// First address above the hole: RAM goes on here.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;
/// Where memory that comes later may begin, above all that is there: the largest piece in which Linux
/// adds memory.
pub const HOTPLUG_ALIGN: u64 = 2 << 30;
/// Sleep, reset and event registers named by the FADT and by the generic event device.
pub const ACPI_REGISTERS_START: u64 = MMIO_HOLE_START;
/// Size of these in bytes. They share a page with what follows.
pub const ACPI_REGISTERS_SIZE: u64 = 0x10;
/// Registers by which vCPUs come and go.
pub const VCPU_REGISTERS_START: u64 = ACPI_REGISTERS_START + 0x10;
/// Size of these in bytes.
pub const VCPU_REGISTERS_SIZE: u64 = 0x10;
/// Registers by which PCI devices come and go.
pub const PCI_REGISTERS_START: u64 = ACPI_REGISTERS_START + 0x20;
/// Size of these in bytes.
pub const PCI_REGISTERS_SIZE: u64 = 0x20;
/// First virtio-mmio window; one every [`VIRTIO_MMIO_SIZE`] bytes.
pub const VIRTIO_MMIO_START: u64 = MMIO_HOLE_START + 0x1000;
/// Size of a virtio-mmio window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Configuration space of PCI bus 0 (ECAM): 32 devices of 8 functions of 4 KiB.
pub const PCI_ECAM_START: u64 = 0xe000_0000;
/// Size of [`PCI_ECAM_START`]'s window.
pub const PCI_ECAM_SIZE: u64 = 1 << 20;
/// Where the host bridge forwards accesses to BARs. Device n's BAR starts out in the nth piece of
/// [`PCI_BAR_SIZE`] bytes, counted from 1.
pub const PCI_WINDOW_START: u64 = 0xe100_0000;
/// Size of [`PCI_WINDOW_START`]'s window.
pub const PCI_WINDOW_SIZE: u64 = 1 << 20;
/// Size of every BAR.
pub const PCI_BAR_SIZE: u64 = 0x4000;
/// The in-kernel I/O APIC (24 pins).
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// The local APICs.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// Intel only: identity-map page and three TSS pages that KVM asks for, inside the hole.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: u64 = 0xfffb_d000;

/// I/O port of the first serial port.
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt pin of the first serial port.
pub const COM1_GSI: u32 = 4;
/// I/O port of the i8042's data register; its command register is at +4.
pub const I8042_PORT: u16 = 0x60;
/// Interrupt pin of the i8042's keyboard.
pub const I8042_GSI: u32 = 1;
/// Interrupt pin of the generic event device.
pub const GED_GSI: u32 = 5;
/// Interrupt pins for virtio-mmio devices, one each: the rest of the I/O APIC's 24.
pub const VIRTIO_GSIS: RangeInclusive<u32> = 6..=23;

/// Where memory of devices goes, in order: above 4 GiB and above all RAM, which ends at `end_of_ram` (RAM that
/// can be added later included). It starts at a multiple of 1 GiB, and each piece at one of
/// [`ALIGNMENT`](super::file_mapping::ALIGNMENT). None if 64 bits do not reach so far.
pub fn device_memory(end_of_ram: u64, sizes: impl IntoIterator<Item = u64>) -> Option<Vec<u64>> {
    let start = end_of_ram.max(MMIO_HOLE_END);
    let mut next = start.checked_next_multiple_of(1 << 30)?;
    let mut place = |size: u64| {
        let place = next;
        let end = place.checked_add(size)?;
        next = end.checked_next_multiple_of(super::file_mapping::ALIGNMENT)?;
        Some(place)
    };
    sizes.into_iter().map(&mut place).collect()
}

/// Where memory of `size` bytes of a device that comes later goes: the lowest place of those that [`device_memory`]
/// begins with which overlaps none of `taken`, address and size. `size` and those are multiples of
/// [`ALIGNMENT`](super::file_mapping::ALIGNMENT).
pub fn free_device_memory(
    end_of_ram: u64,
    taken: impl IntoIterator<Item = (u64, u64)>,
    size: u64,
) -> Option<u64> {
    let mut place = end_of_ram
        .max(MMIO_HOLE_END)
        .checked_next_multiple_of(1 << 30)?;
    let mut taken: Vec<(u64, u64)> = taken.into_iter().collect();
    taken.sort_unstable();
    for (at, len) in taken {
        if place.checked_add(size)? <= at {
            break;
        }
        place = place.max(at.checked_add(len)?);
    }
    place.checked_add(size).map(|_| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_comes_later_takes_the_lowest_place() {
        const MIB: u64 = 1 << 20;
        let start = 4 << 30;
        let place = |taken: &[(u64, u64)], size| {
            let taken = taken.iter().map(|(at, len)| (start + at * MIB, len * MIB));
            free_device_memory(128 << 20, taken, size * MIB).map(|place| (place - start) / MIB)
        };
        assert_eq!(place(&[], 2), Some(0));
        assert_eq!(place(&[(0, 4)], 2), Some(4));
        // In the gap that one has left, if it fits; in whatever order.
        assert_eq!(place(&[(8, 2), (0, 4)], 4), Some(4));
        assert_eq!(place(&[(8, 2), (0, 4)], 6), Some(10));
        assert_eq!(place(&[(2, 2)], 2), Some(0));
        assert_eq!(free_device_memory(0, [], u64::MAX), None);
        assert_eq!(free_device_memory(u64::MAX, [], 2 << 20), None);
        assert_eq!(free_device_memory(0, [(4 << 30, u64::MAX)], 2 << 20), None);
    }

    #[test]
    fn memory_of_devices_lies_above_ram() {
        const GIB: u64 = 1 << 30;
        let place = |end, sizes: &[u64]| device_memory(end, sizes.iter().copied());
        let two = [2 << 20, 1, 4 << 20];
        let at = |start: u64| Some(vec![start, start + (2 << 20), start + (4 << 20)]);
        assert_eq!(place(128 << 20, &two), at(4 * GIB));
        assert_eq!(place(4 * GIB, &two), at(4 * GIB));
        assert_eq!(place(4 * GIB + 1, &two), at(5 * GIB));
        assert_eq!(place(u64::MAX, &two), None);
        assert_eq!(place(0, &[u64::MAX]), None);
        assert_eq!(place(0, &[]), Some(Vec::new()));
    }
}

//! Kernels and machines made for tests.

use std::fs::File;
use std::io::Write;

use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{GedInfo, MachineDescription, MmioDeviceInfo};
use crate::memory::{GuestMemory, layout};

/// Where test kernels are linked, as Linux is.
pub(super) const LINKED_AT: u64 = 16 << 20;
/// Virtual address of physical address 0 in a kernel's link.
pub(super) const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

pub(super) fn memory(ranges: &[(u64, usize)]) -> GuestMemory {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(start, size)| (GuestAddress(*start), *size))
        .collect();
    GuestMemory::from_ranges(&ranges).unwrap()
}

pub(super) fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

pub(super) fn read<T: ByteValued>(memory: &GuestMemory, address: u64) -> T {
    memory.read_obj(GuestAddress(address)).unwrap()
}

/// A machine with one vCPU, `devices` virtio-mmio devices and everything else.
pub(super) fn machine(devices: u32) -> MachineDescription {
    let device = |i: u32| MmioDeviceInfo {
        base: layout::VIRTIO_MMIO_START + u64::from(i) * layout::VIRTIO_MMIO_SIZE,
        size: layout::VIRTIO_MMIO_SIZE,
        gsi: layout::VIRTIO_GSIS.start() + i,
    };
    MachineDescription {
        vcpus: 1,
        max_vcpus: 1,
        vcpu_hotplug: false,
        numa_nodes: Vec::new(),
        mmio_devices: (0..devices).map(device).collect(),
        has_pci: false,
        has_com1: true,
        has_i8042: true,
        ged: GedInfo {
            gsi: layout::GED_GSI,
            event_register: layout::ACPI_REGISTERS_START + 4,
        },
        pit: false,
    }
}

/// What goes into an ELF file.
pub(super) struct TestKernel {
    pub(super) entry: u64,
    pub(super) physical: u64,
    pub(super) content: Vec<u8>,
    pub(super) memory_size: u64,
    pub(super) notes: Vec<u8>,
    pub(super) relocations: Vec<i32>,
}

impl TestKernel {
    /// 256 bytes linked at 16 MiB, a page in memory.
    pub(super) fn new() -> Self {
        Self {
            entry: LINKED_AT,
            physical: LINKED_AT,
            content: (0..=255).collect(),
            memory_size: 4096,
            notes: Vec::new(),
            relocations: Vec::new(),
        }
    }

    /// With a PVH entry point, after a note of another kind.
    pub(super) fn with_pvh(mut self, entry: u32) -> Self {
        self.notes.extend(note(b"Linux\0", 257, &[1, 2, 3]));
        self.notes
            .extend(note(b"Xen\0", 18, &u64::from(entry).to_le_bytes()));
        self
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
        file.resize(16, 0);
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for long in [self.entry, 64, 0] {
            file.extend(long.to_le_bytes());
        }
        file.extend([0; 4]);
        for word in [64_u16, 56, 2, 64, 0, 0] {
            file.extend(word.to_le_bytes());
        }
        let content = 64 + 2 * 56;
        let length = self.content.len() as u64;
        let virtual_ = KERNEL_MAP.wrapping_add(self.physical);
        file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
        for long in [
            content,
            virtual_,
            self.physical,
            length,
            self.memory_size,
            4096,
        ] {
            file.extend(long.to_le_bytes());
        }
        file.extend([4, 0, 0, 0, 4, 0, 0, 0]);
        let notes = self.notes.len() as u64;
        for long in [content + length, 0, 0, notes, notes, 4] {
            file.extend(long.to_le_bytes());
        }
        file.extend(&self.content);
        file.extend(&self.notes);
        for word in &self.relocations {
            file.extend(word.to_le_bytes());
        }
        file
    }

    pub(super) fn file(&self) -> File {
        file(&self.bytes())
    }
}

/// An ELF note.
pub(super) fn note(name: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    note.extend((name.len() as u32).to_le_bytes());
    note.extend((descriptor.len() as u32).to_le_bytes());
    note.extend(kind.to_le_bytes());
    for part in [name, descriptor] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

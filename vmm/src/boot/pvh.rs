//! The PVH boot protocol: `hvm_start_info` and what it points to (xen/include/public/arch-x86/hvm/start_info.h).

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::Error;
use super::initrd::Initrd;
use super::memory_map::Entry;
use crate::memory::{GuestMemory, layout};

/// "xEn3" with the high bit of the "E" set.
const MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const VERSION: u32 = 1;
const MODULES_START: u64 = layout::PVH_INFO_START + 0x40;
const MEMORY_MAP_START: u64 = layout::PVH_INFO_START + 0x80;

/// Writes `hvm_start_info`, its module (the initrd) and its memory map.
pub(super) fn write_start_info(
    memory: &GuestMemory,
    initrd: Option<Initrd>,
    map: &[Entry],
    rsdp: u64,
) -> Result<(), Error> {
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::CMDLINE_START,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP_START,
        ..hvm_start_info::default()
    };
    if let Some(initrd) = initrd {
        info.nr_modules = 1;
        info.modlist_paddr = MODULES_START;
        let module = hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.size,
            ..hvm_modlist_entry::default()
        };
        write(memory, &module, MODULES_START)?;
    }
    let mut address = MEMORY_MAP_START;
    for entry in map {
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.size,
            type_: entry.kind,
            reserved: 0,
        };
        write(memory, &entry, address)?;
        address = address.saturating_add(entry.as_slice().len() as u64);
        info.memmap_entries = info.memmap_entries.saturating_add(1);
    }
    write(memory, &info, layout::PVH_INFO_START)
}

fn write<T: ByteValued>(memory: &GuestMemory, value: &T, address: u64) -> Result<(), Error> {
    memory
        .write_slice(value.as_slice(), GuestAddress(address))
        .map_err(Error::memory("hvm_start_info", address))
}

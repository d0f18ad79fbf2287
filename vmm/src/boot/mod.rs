//! Booting a kernel: from an image to the registers of the first instruction.
//!
//! [`load`] works on guest memory alone, so that all of it is tested without KVM. What it reads
//! (kernel, initrd, command line) is untrusted: each number is checked before it is used.

//!
//! | module | what |
//! |---|---|
//! | `image` | the file: an ELF kernel, or a bzImage that holds one |
//! | `elf` | segments to memory, PVH entry |
//! | `kaslr` | random addresses and the relocations that they need |
//! | `initrd`, `cmdline` | what the kernel is given |
//! | `memory_map`, `linux64`, `pvh` | what the kernel is told, by either boot protocol |
//! | `cpu_tables` | GDT and page tables of the first instruction |
//! | `acpi` | the machine's devices |

mod acpi;
mod cmdline;
pub mod cpu_tables;
mod elf;
mod error;
mod image;
mod initrd;
mod kaslr;
mod linux64;
mod memory_map;
mod pvh;
mod reset_vector;

use std::fs::File;

pub use error::Error;

use crate::memory::{GuestMemory, layout};
use elf::FreeMemory;
use image::KernelImage;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst): long mode,
    /// identity page tables, `boot_params` in RSI.
    Linux64,
    /// Xen's PVH entry: 32-bit protected mode, no paging, `hvm_start_info` in EBX.
    Pvh,
}

/// One virtio-mmio device, as ACPI describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDeviceInfo {
    /// First guest-physical address of the window; below 4 GiB.
    pub base: u64,
    /// Size of the window in bytes.
    pub size: u64,
    /// Interrupt pin of the I/O APIC (edge-triggered).
    pub gsi: u32,
}

/// The generic event device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GedInfo {
    /// Interrupt pin of the I/O APIC (edge-triggered).
    pub gsi: u32,
    /// Guest-physical address of the 4-byte register that reads as the pending events
    /// (`devices::acpi::Event`) and clears them by being read.
    pub event_register: u64,
}

/// A NUMA node of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumaNodeInfo {
    /// Its vCPUs.
    pub cpus: Vec<u8>,
    /// Its memory: first guest-physical addresses and sizes in bytes.
    pub memory: Vec<(u64, u64)>,
    /// How far each node is from it (ACPI 6.5, section 5.2.17).
    pub distances: Vec<u8>,
}

/// What the tables tell a guest about its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineDescription {
    /// Number of vCPUs at the start; their APIC ids are `0..vcpus`.
    pub vcpus: u8,
    /// How many there can be, at least `vcpus`.
    pub max_vcpus: u8,
    /// Whether their number can change.
    pub vcpu_hotplug: bool,
    /// Its NUMA nodes; none where all is equally near.
    pub numa_nodes: Vec<NumaNodeInfo>,
    /// Every virtio-mmio device in the order of the configuration.
    pub mmio_devices: Vec<MmioDeviceInfo>,
    /// Whether there is a PCI bus, as in `layout`.
    pub has_pci: bool,
    /// Whether there is a serial port at `layout::COM1_PORT`.
    pub has_com1: bool,
    /// Whether there is an i8042 at `layout::I8042_PORT`.
    pub has_i8042: bool,
    /// The generic event device.
    pub ged: GedInfo,
    /// Whether there is an i8254 timer, and the i8259 pair that its interrupt goes through.
    pub pit: bool,
}

/// Whether the kernel's virtual addresses were randomised, and why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KaslrOutcome {
    /// Relocated by this many bytes.
    Applied {
        /// Added to every virtual address of the kernel image.
        virtual_offset: u64,
        /// Added to every physical address of the kernel image.
        physical_offset: u64,
    },
    /// The image carries no relocations (a bare `vmlinux`, or a kernel built without KASLR).
    NoRelocations,
    /// The command line says `nokaslr`.
    DisabledByCommandLine,
    /// PVH enters the kernel at the address that it was linked for.
    NotWithPvh,
}

/// The registers that CORE sets on the first vCPU; everything else follows from `protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// How the kernel is entered.
    pub protocol: Protocol,
    /// Instruction pointer.
    pub rip: u64,
    /// `boot_params` with [`Protocol::Linux64`], else 0.
    pub rsi: u64,
    /// `hvm_start_info` with [`Protocol::Pvh`], else 0.
    pub rbx: u64,
    /// What became of address randomisation.
    pub kaslr: KaslrOutcome,
}

/// Loads kernel, initrd, command line and tables into `memory`, which must be fresh (all zero).
///
/// `protocol` picks how the kernel is entered. `None` picks for itself: a kernel that comes with
/// relocations is entered by Linux's 64-bit protocol at random addresses, one with a PVH note by
/// that, anything else by Linux's 64-bit protocol. `boot_args` is the command line; `nokaslr`
/// in it keeps the addresses fixed, `acpi=off` adds `virtio_mmio.device=` for every device.
///
/// # Errors
/// [`Error`] names what is wrong with which input; memory may have been written then.
pub fn load(
    memory: &GuestMemory,
    kernel: &File,
    initrd: Option<&File>,
    boot_args: &str,
    protocol: Option<Protocol>,
    machine: &MachineDescription,
) -> Result<EntryState, Error> {
    let cmdline = cmdline::compose(boot_args, machine)?;
    let image = KernelImage::open(kernel, memory_map::total_size(memory))?;
    let limits = linux64::Limits::of(image.header.as_ref());
    cmdline::write(memory, &cmdline, limits.cmdline)?;

    let pvh_entry = elf::pvh_entry(&image, &image.elf)?;
    let protocol = match protocol {
        Some(protocol) => protocol,
        None if image.relocations.is_none() && pvh_entry.is_some() => Protocol::Pvh,
        None => Protocol::Linux64,
    };
    let entry = match protocol {
        Protocol::Linux64 => image.elf.entry,
        Protocol::Pvh => pvh_entry.ok_or(Error::NoPvhEntry)?,
    };

    let low_end = memory_map::low_memory_end(memory);
    let initrd = initrd
        .map(|file| initrd::load(memory, file, low_end.min(limits.initrd_end)))
        .transpose()?;
    let free = FreeMemory {
        start: layout::HIGH_MEMORY_START,
        end: initrd.map_or(low_end, |initrd| initrd.start),
    };
    // As linked first: a kernel that does not fit there fits nowhere above.
    elf::check_placement(&image.elf, entry, free)?;

    let kaslr = load_kernel(memory, &image, protocol, &cmdline, free)?;
    let physical_offset = match kaslr {
        KaslrOutcome::Applied {
            physical_offset, ..
        } => physical_offset,
        _ => 0,
    };

    let rsdp = acpi::write(memory, machine)?;
    let map = memory_map::memory_map(memory, machine.has_pci);
    cpu_tables::write(memory, protocol)?;
    reset_vector::write(memory)?;
    let mut state = EntryState {
        protocol,
        rip: entry.saturating_add(physical_offset),
        rsi: 0,
        rbx: 0,
        kaslr,
    };
    match protocol {
        Protocol::Linux64 => {
            let relocated = matches!(kaslr, KaslrOutcome::Applied { .. });
            let header = image.header.as_ref();
            linux64::write_zero_page(memory, header, initrd, &map, rsdp, relocated)?;
            state.rsi = layout::ZERO_PAGE_START;
        }
        Protocol::Pvh => {
            pvh::write_start_info(memory, initrd, &map, rsdp)?;
            state.rbx = layout::PVH_INFO_START;
        }
    }
    Ok(state)
}

/// Puts the kernel into memory, at random addresses where possible and wanted.
fn load_kernel(
    memory: &GuestMemory,
    image: &KernelImage,
    protocol: Protocol,
    cmdline: &str,
    free: FreeMemory,
) -> Result<KaslrOutcome, Error> {
    let outcome = match &image.relocations {
        None => KaslrOutcome::NoRelocations,
        Some(_) if kaslr::disabled_by(cmdline) => KaslrOutcome::DisabledByCommandLine,
        Some(_) if protocol == Protocol::Pvh => KaslrOutcome::NotWithPvh,
        Some(relocations) => {
            let (virtual_offset, physical_offset) = kaslr::choose(&image.elf, free, cmdline)?;
            elf::load_segments(memory, image, physical_offset)?;
            kaslr::relocate(
                memory,
                &image.elf,
                relocations,
                virtual_offset,
                physical_offset,
            )?;
            return Ok(KaslrOutcome::Applied {
                virtual_offset,
                physical_offset,
            });
        }
    };
    elf::load_segments(memory, image, 0)?;
    Ok(outcome)
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

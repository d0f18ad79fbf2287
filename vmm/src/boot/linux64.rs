//! Linux's 64-bit boot protocol: the zero page (`boot_params`).
//!
//! Documentation/arch/x86/boot.rst, "64-bit Boot Protocol", and zero-page.rst.

use casemate_kernel_image::BzImage;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::Error;
use super::initrd::Initrd;
use super::kaslr;
use super::memory_map::Entry;
use crate::memory::{GuestMemory, layout};

/// Offset of the setup header in `boot_params`.
const HEADER_OFFSET: usize = 0x1f1;
/// `HdrS`.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// The protocol version assumed for a bare ELF file: 2.15 (Linux 5.5).
const DEFAULT_VERSION: u16 = 0x20f;
/// Undefined boot loader.
const LOADER_TYPE: u8 = 0xff;
const LOADED_HIGH: u8 = 1 << 0;
/// Tells the kernel that its addresses were randomised.
const KASLR_FLAG: u8 = 1 << 1;
/// Highest address of an initrd when the kernel names none (boot.rst, `initrd_addr_max`).
const DEFAULT_INITRD_ADDR_MAX: u32 = 0x7fff_ffff;

/// What a kernel's boot header, if it has one, says about its limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// First address that the initrd may not reach.
    pub(super) initrd_end: u64,
    /// Longest command line in bytes, without the NUL.
    pub(super) cmdline: usize,
}

impl Limits {
    pub(super) fn of(header: Option<&BzImage>) -> Self {
        let params = with_header(header);
        let (initrd_max, cmdline) = (params.hdr.initrd_addr_max, params.hdr.cmdline_size);
        let cmdline = usize::try_from(cmdline).unwrap_or(usize::MAX);
        Self {
            initrd_end: u64::from(initrd_max).saturating_add(1),
            cmdline: cmdline.min(layout::CMDLINE_MAX_SIZE - 1),
        }
    }
}

/// `boot_params` with the kernel's own header where there is one, else with defaults.
fn with_header(header: Option<&BzImage>) -> boot_params {
    let mut params = boot_params::default();
    match header {
        Some(image) => {
            let place = params.as_mut_slice().get_mut(HEADER_OFFSET..);
            for (to, from) in place.into_iter().flatten().zip(&image.setup_header) {
                *to = *from;
            }
        }
        None => {
            params.hdr.version = DEFAULT_VERSION;
            params.hdr.kernel_alignment = kaslr::ALIGNMENT as u32;
            params.hdr.initrd_addr_max = DEFAULT_INITRD_ADDR_MAX;
            params.hdr.cmdline_size = layout::CMDLINE_MAX_SIZE as u32 - 1;
        }
    }
    params
}

/// Writes the zero page. The command line is at its place already.
pub(super) fn write_zero_page(
    memory: &GuestMemory,
    header: Option<&BzImage>,
    initrd: Option<Initrd>,
    map: &[Entry],
    rsdp: u64,
    relocated: bool,
) -> Result<(), Error> {
    let mut params = with_header(header);
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_TYPE;
    params.hdr.loadflags = LOADED_HIGH | if relocated { KASLR_FLAG } else { 0 };
    // Pointers are ours to give; a file's header has no business naming guest memory.
    params.hdr.setup_data = 0;
    params.hdr.cmd_line_ptr = low_32(layout::CMDLINE_START);
    let initrd = initrd.unwrap_or(Initrd { start: 0, size: 0 });
    params.hdr.ramdisk_image = low_32(initrd.start);
    params.hdr.ramdisk_size = low_32(initrd.size);
    params.acpi_rsdp_addr = rsdp;

    let mut table = params.e820_table;
    let mut count = 0_u8;
    for (slot, entry) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.size,
            r#type: entry.kind,
        };
        count = count.saturating_add(1);
    }
    params.e820_table = table;
    params.e820_entries = count;
    memory
        .write_obj(params, GuestAddress(layout::ZERO_PAGE_START))
        .map_err(Error::memory("boot_params", layout::ZERO_PAGE_START))
}

/// An address or size that is below 4 GiB because it lies below the MMIO hole.
fn low_32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

//! Why a kernel could not be loaded.

use std::io;

use thiserror::Error;

/// Why a kernel could not be loaded.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel image is malformed, unsupported or unreadable.
    #[error(transparent)]
    Image(#[from] casemate_kernel_image::Error),
    /// Not a command line that a kernel could be given.
    #[error("the kernel command line (boot_args): {0}")]
    Cmdline(linux_loader::cmdline::Error),
    /// Something that is not printable ASCII.
    #[error(
        "the kernel command line (boot_args) has the character {character:?}; only printable ASCII is allowed"
    )]
    CmdlineCharacter {
        /// The first such character.
        character: char,
    },
    /// The kernel takes only shorter command lines.
    #[error("the kernel command line (boot_args) has {length} bytes; this kernel takes {limit}")]
    CmdlineTooLong {
        /// Its length in bytes, without a NUL.
        length: usize,
        /// What the kernel takes.
        limit: usize,
    },
    /// The kernel does not fit, or lies where something else must.
    #[error(
        "the kernel's segment at {start:#x}..{end:#x} is not in the guest's free memory {free_start:#x}..{free_end:#x}; give the guest more memory (mem_size_mib)"
    )]
    KernelOutsideMemory {
        /// First physical address of the segment.
        start: u64,
        /// First address after it.
        end: u64,
        /// First physical address that a kernel may use.
        free_start: u64,
        /// First address after that memory (the initrd is above it).
        free_end: u64,
    },
    /// The entry point is in no segment.
    #[error("the kernel's entry point {entry:#x} is in none of its segments")]
    EntryOutsideKernel {
        /// The entry point.
        entry: u64,
    },
    /// `protocol` says PVH and the kernel has no such entry.
    #[error("the kernel has no PVH entry point (it was built without CONFIG_PVH)")]
    NoPvhEntry,
    /// The initrd could not be read.
    #[error("reading the initrd: {0}")]
    InitrdRead(#[source] io::Error),
    /// There is nothing in the initrd.
    #[error("the initrd is empty")]
    InitrdEmpty,
    /// The initrd does not fit.
    #[error(
        "the initrd of {size} bytes does not fit in the guest's memory below {limit:#x}; give the guest more memory (mem_size_mib)"
    )]
    InitrdTooLarge {
        /// Its size in bytes.
        size: u64,
        /// End of the memory where it may lie.
        limit: u64,
    },
    /// Guest memory is missing where a table or an image must go.
    #[error("writing {what} to guest memory at {address:#x}: {source}")]
    Memory {
        /// What was being written.
        what: &'static str,
        /// Guest-physical address.
        address: u64,
        /// What the memory says.
        source: vm_memory::GuestMemoryError,
    },
    /// A relocation could not be applied.
    #[error("relocating the kernel at {address:#x}: {source}")]
    Relocate {
        /// Guest-physical address.
        address: u64,
        /// What the memory says.
        source: vm_memory::VolatileMemoryError,
    },
    /// There were no random numbers.
    #[error("getting random numbers: {0}")]
    Random(#[source] io::Error),
    /// The machine has more devices than the tables have room for.
    #[error("the ACPI tables need {size} bytes and there are {limit}: too many devices")]
    AcpiTooLarge {
        /// What they need, in bytes.
        size: u64,
        /// The room for them, in bytes.
        limit: u64,
    },
    /// A device that ACPI cannot name.
    #[error("the device at {base:#x}+{size:#x} is not below 4 GiB")]
    DeviceTooHigh {
        /// First address of the window.
        base: u64,
        /// Size of the window in bytes.
        size: u64,
    },
}

impl Error {
    /// A failure to write `what` at `address`.
    pub(super) fn memory(
        what: &'static str,
        address: u64,
    ) -> impl FnOnce(vm_memory::GuestMemoryError) -> Self {
        move |source| Self::Memory {
            what,
            address,
            source,
        }
    }
}

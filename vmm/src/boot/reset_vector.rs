//! Code at the address where a PC begins after a reset.
//!
//! A guest with hardware-reduced ACPI and without EFI restarts the old way: Linux prefers EFI's reset there
//! (`efi_reboot_required`), falls back to the BIOS's, and jumps to `ffff:0` in real mode. Without firmware there would be
//! nothing, and the guest would hang instead of rebooting.

use vm_memory::{Bytes, GuestAddress};

use super::Error;
use crate::memory::{GuestMemory, layout};

/// `mov al, 0xfe; out 0x64, al; hlt; jmp $-1`: the i8042's reset pulse.
const CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// Writes the code.
pub(super) fn write(memory: &GuestMemory) -> Result<(), Error> {
    memory
        .write_slice(&CODE, GuestAddress(layout::RESET_VECTOR))
        .map_err(Error::memory("the reset vector", layout::RESET_VECTOR))
}

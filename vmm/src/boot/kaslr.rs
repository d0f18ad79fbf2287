//! Kernel address space layout randomisation, in place of the boot stub that we skip.
//!
//! A bzImage unpacks itself inside the guest and picks a random place on the way. We load the
//! unpacked kernel, so we do the same with the relocations that its build appended:
//!
//! - the *virtual* base moves up by a random multiple of 2 MiB such that the image stays within the
//!   1 GiB that Linux reserves for it (`KERNEL_IMAGE_SIZE`), and every address in the image is
//!   adjusted;
//! - the *physical* base moves independently, also by a multiple of 2 MiB, in the low memory
//!   below the initrd and below what `mem=` leaves. Nothing in the image needs adjusting for it:
//!   the kernel computes it.
//!
//! `KASLR_FLAG` in `loadflags` then tells the kernel to randomise its memory regions and the place
//! of modules as well. `nokaslr` on the command line turns all of it off, as in the stub.

use casemate_kernel_image::{Elf, RelocationKind, Relocations};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::Error;
use super::elf::FreeMemory;
use crate::memory::GuestMemory;

/// `CONFIG_PHYSICAL_ALIGN` as distributions have it, and what the kernel's early page tables need.
pub(super) const ALIGNMENT: u64 = 0x20_0000;
/// `KERNEL_IMAGE_SIZE` of a kernel built with `CONFIG_RANDOMIZE_BASE`; modules come after it.
const KERNEL_IMAGE_SIZE: u64 = 1 << 30;

/// Whether the command line asks for fixed addresses.
pub(super) fn disabled_by(cmdline: &str) -> bool {
    cmdline
        .split_ascii_whitespace()
        .any(|word| word == "nokaslr")
}

/// Where memory ends for a kernel with this command line: a kernel beyond that would give its own
/// memory away. `None` when the command line changes the map in a way that is not followed here.
fn memory_end(cmdline: &str) -> Option<u64> {
    let mut end = u64::MAX;
    for word in cmdline.split_ascii_whitespace() {
        if word == "memmap" || word.starts_with("memmap=") {
            return None;
        }
        if let Some(size) = word.strip_prefix("mem=") {
            // The kernel heeds each of them.
            end = end.min(parse_size(size)?);
        }
    }
    Some(end)
}

/// A number as the kernel's `memparse` takes it, but for octal ones and what may follow it.
fn parse_size(text: &str) -> Option<u64> {
    let shift = match text.chars().last()?.to_ascii_uppercase() {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => 0,
    };
    let digits = if shift == 0 {
        text
    } else {
        text.get(..text.len().saturating_sub(1))?
    };
    let hexadecimal = digits.strip_prefix("0x").or(digits.strip_prefix("0X"));
    let (digits, radix) = hexadecimal.map_or((digits, 10), |digits| (digits, 16));
    // Neither an octal number nor zero, nor a sign.
    let leading = digits.chars().next()?;
    if !leading.is_digit(radix) || (radix == 10 && leading == '0') {
        return None;
    }
    u64::from_str_radix(digits, radix)
        .ok()?
        .checked_mul(1 << shift)
}

/// Picks how far to move the kernel, virtually and physically, in bytes.
pub(super) fn choose(elf: &Elf, free: FreeMemory, cmdline: &str) -> Result<(u64, u64), Error> {
    let (_, end) = elf.physical_span();
    // The link maps physical address 0 to KERNEL_MAP, so the physical end is the size used.
    let virtual_offset = pick(KERNEL_IMAGE_SIZE.saturating_sub(end), random()?);
    // Where it was linked, the kernel lies in any guest that boots at all.
    let free_end = memory_end(cmdline).map_or(0, |limit| limit.min(free.end));
    let physical_offset = pick(free_end.saturating_sub(end), random()?);
    Ok((virtual_offset, physical_offset))
}

/// One of the multiples of [`ALIGNMENT`] from 0 to `room`, chosen by `random`.
fn pick(room: u64, random: u64) -> u64 {
    // Neither can fail: the slots are at least one, and the product is at most `room`.
    let slots = (room / ALIGNMENT).saturating_add(1);
    random
        .checked_rem(slots)
        .unwrap_or(0)
        .saturating_mul(ALIGNMENT)
}

fn random() -> Result<u64, Error> {
    let mut bytes = [0; 8];
    // Up to 256 bytes come whole and uninterrupted once the pool is ready (getrandom(2)).
    match getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(8) => Ok(u64::from_ne_bytes(bytes)),
        Ok(_) => Err(Error::Random(std::io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(Error::Random(error.into())),
    }
}

/// Adjusts the kernel, loaded `physical_offset` above its link address, to run `virtual_offset`
/// above it.
pub(super) fn relocate(
    memory: &GuestMemory,
    elf: &Elf,
    relocations: &Relocations,
    virtual_offset: u64,
    physical_offset: u64,
) -> Result<(), Error> {
    let (start, end) = elf.physical_span();
    let loaded = start.saturating_add(physical_offset);
    let length = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
    // One look-up for a quarter of a million places: the kernel is in one region.
    let kernel = memory
        .get_slice(GuestAddress(loaded), length)
        .map_err(Error::memory("the relocated kernel", loaded))?;
    for relocation in relocations.iter() {
        let place = relocation.physical.saturating_sub(start);
        let failed = |source| Error::Relocate {
            address: loaded.saturating_add(place),
            source,
        };
        let place = usize::try_from(place).unwrap_or(usize::MAX);
        // Wrapping, as the stub does: what is at these places is the kernel's own affair.
        let low = virtual_offset as u32;
        match relocation.kind {
            RelocationKind::Add64 => {
                let value: u64 = kernel.read_obj(place).map_err(failed)?;
                kernel.write_obj(value.wrapping_add(virtual_offset), place)
            }
            RelocationKind::Add32 => {
                let value: u32 = kernel.read_obj(place).map_err(failed)?;
                kernel.write_obj(value.wrapping_add(low), place)
            }
            RelocationKind::Subtract32 => {
                let value: u32 = kernel.read_obj(place).map_err(failed)?;
                kernel.write_obj(value.wrapping_sub(low), place)
            }
        }
        .map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;

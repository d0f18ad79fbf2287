//! Putting the kernel's segments into guest memory, and finding its PVH entry.

use casemate_kernel_image::{Elf, FileRange, ReadAt};

use super::Error;
use super::image::KernelImage;
use crate::memory::GuestMemory;

/// Type of the note that names the PVH entry point (xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const XEN_NAME: [u8; 4] = *b"Xen\0";
const NOTE_HEADER_SIZE: u64 = 12;
/// More notes than any kernel has; reading on would only serve whoever made the file.
const MAX_NOTES: u32 = 1024;

/// Physical memory that the kernel may occupy: above what the VMM puts in low memory, below the
/// initrd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FreeMemory {
    pub(super) start: u64,
    pub(super) end: u64,
}

/// Checks that every segment, as linked, lies in `free`, and that `entry` is in one of them.
pub(super) fn check_placement(elf: &Elf, entry: u64, free: FreeMemory) -> Result<(), Error> {
    for segment in &elf.segments {
        let (start, end) = (segment.physical, segment.physical_end());
        if start < free.start || end > free.end {
            return Err(Error::KernelOutsideMemory {
                start,
                end,
                free_start: free.start,
                free_end: free.end,
            });
        }
    }
    let inside =
        |s: &casemate_kernel_image::Segment| (s.physical..s.physical_end()).contains(&entry);
    if !elf.segments.iter().any(inside) {
        return Err(Error::EntryOutsideKernel { entry });
    }
    Ok(())
}

/// Copies every segment, moved up by `offset`. What a segment has in memory beyond its bytes in the
/// file is zero already: guest memory is fresh.
pub(super) fn load_segments(
    memory: &GuestMemory,
    image: &KernelImage,
    offset: u64,
) -> Result<(), Error> {
    for segment in &image.elf.segments {
        let address = segment.physical.saturating_add(offset);
        image.copy_to(memory, address, segment.file)?;
    }
    Ok(())
}

/// The 32-bit entry point of the PVH protocol, if the kernel names one.
pub(super) fn pvh_entry(
    source: &(impl ReadAt + ?Sized),
    elf: &Elf,
) -> Result<Option<u64>, casemate_kernel_image::Error> {
    for notes in &elf.notes {
        if let Some(entry) = pvh_entry_in(source, *notes)? {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Walks one segment of notes: header (sizes of name and descriptor, type), name, descriptor,
/// each padded to four bytes. Every step moves forward by at least a header.
fn pvh_entry_in(
    source: &(impl ReadAt + ?Sized),
    notes: FileRange,
) -> Result<Option<u64>, casemate_kernel_image::Error> {
    let padded = |size: u32| u64::from(size).next_multiple_of(4);
    let mut offset = notes.offset;
    for _ in 0..MAX_NOTES {
        let name = offset.saturating_add(NOTE_HEADER_SIZE);
        if name > notes.end() {
            break;
        }
        let name_size = u32::from_le_bytes(source.array_at(offset)?);
        let size = u32::from_le_bytes(source.array_at(offset.saturating_add(4))?);
        let kind = u32::from_le_bytes(source.array_at(offset.saturating_add(8))?);
        let descriptor = name.saturating_add(padded(name_size));
        let end = descriptor.saturating_add(padded(size));
        if end > notes.end() {
            break;
        }
        if kind == XEN_ELFNOTE_PHYS32_ENTRY
            && name_size == 4
            && size >= 4
            && source.array_at::<4>(name)? == XEN_NAME
        {
            // Linux writes four or eight bytes; the address is below 4 GiB either way.
            return Ok(Some(u64::from(u32::from_le_bytes(
                source.array_at(descriptor)?,
            ))));
        }
        offset = end;
    }
    Ok(None)
}

//! The kernel image as it is loaded: an ELF file, wherever its bytes come from.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use casemate_kernel_image::{BzImage, Elf, FileRange, ImageKind, ReadAt, Relocations, identify};
use vm_memory::{Bytes, GuestAddress};

use super::Error;
use crate::memory::GuestMemory;

/// A kernel, read and checked but not yet loaded.
pub(super) struct KernelImage<'a> {
    bytes: ImageBytes<'a>,
    /// Its headers.
    pub(super) elf: Elf,
    /// What to change to move it, when it can be moved.
    pub(super) relocations: Option<Relocations>,
    /// The boot header, when the image is a bzImage.
    pub(super) header: Option<BzImage>,
}

/// Where the ELF file is.
enum ImageBytes<'a> {
    /// The kernel file is the ELF file.
    File(&'a File),
    /// It was unpacked from a bzImage.
    Unpacked(Vec<u8>),
}

impl<'a> KernelImage<'a> {
    /// Opens `kernel`. A bzImage is unpacked into the VMM's own memory, to at most `limit` bytes:
    /// this is the slow way, for a VMM run by hand; the runtime unpacks kernels once, elsewhere.
    pub(super) fn open(kernel: &'a File, limit: u64) -> Result<Self, Error> {
        match identify(kernel)? {
            ImageKind::Elf => {
                let elf = Elf::parse(kernel)?;
                Ok(Self {
                    relocations: Relocations::read(kernel, &elf)?,
                    elf,
                    bytes: ImageBytes::File(kernel),
                    header: None,
                })
            }
            ImageKind::BzImage => {
                let header = BzImage::parse(kernel)?;
                let mut bytes = Vec::new();
                header.unpack(kernel, limit, &mut bytes)?;
                let elf = Elf::parse(bytes.as_slice())?;
                Ok(Self {
                    relocations: Relocations::read(bytes.as_slice(), &elf)?,
                    elf,
                    bytes: ImageBytes::Unpacked(bytes),
                    header: Some(header),
                })
            }
        }
    }

    /// Copies a part of the file to guest memory, without a detour where the kernel allows it.
    pub(super) fn copy_to(
        &self,
        memory: &GuestMemory,
        address: u64,
        range: FileRange,
    ) -> Result<(), Error> {
        let failed = Error::memory("the kernel", address);
        match &self.bytes {
            ImageBytes::File(file) => {
                copy_file(memory, address, file, range).map_err(|error| match error {
                    CopyError::Seek(error) => {
                        Error::Image(casemate_kernel_image::Error::Read(error))
                    }
                    CopyError::Copy(error) => failed(error),
                })
            }
            ImageBytes::Unpacked(bytes) => {
                let end = usize::try_from(range.end()).ok();
                let start = usize::try_from(range.offset).ok();
                let part = start
                    .zip(end)
                    .and_then(|(start, end)| bytes.get(start..end));
                // The range was checked when the headers were parsed.
                let part = part.unwrap_or_default();
                memory
                    .write_slice(part, GuestAddress(address))
                    .map_err(failed)
            }
        }
    }
}

impl ReadAt for KernelImage<'_> {
    fn size(&self) -> io::Result<u64> {
        match &self.bytes {
            ImageBytes::File(file) => file.size(),
            ImageBytes::Unpacked(bytes) => bytes.as_slice().size(),
        }
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.bytes {
            ImageBytes::File(file) => ReadAt::read_exact_at(*file, buffer, offset),
            ImageBytes::Unpacked(bytes) => bytes.as_slice().read_exact_at(buffer, offset),
        }
    }
}

/// Why [`copy_file`] failed.
pub(super) enum CopyError {
    /// The file cannot be positioned.
    Seek(io::Error),
    /// The copy itself; a file that has become shorter is here too.
    Copy(vm_memory::GuestMemoryError),
}

/// Reads a part of `file` straight into guest memory.
pub(super) fn copy_file(
    memory: &GuestMemory,
    address: u64,
    mut file: &File,
    range: FileRange,
) -> Result<(), CopyError> {
    file.seek(SeekFrom::Start(range.offset))
        .map_err(CopyError::Seek)?;
    let length = usize::try_from(range.length).unwrap_or(usize::MAX);
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, length)
        .map_err(CopyError::Copy)
}

//! Kernel images: what is in a file that claims to be an x86-64 Linux kernel.
//!
//! A distribution ships a `bzImage`: a boot header ([`BzImage`]) and a compressed payload. The
//! payload is the kernel as an ELF file ([`Elf`]) with, for a kernel built with address
//! randomisation, a list of relocations after it ([`Relocations`]). Usually the payload is unpacked
//! inside the guest by a stub that also picks a random address; unpacking it outside ([`unpack`])
//! saves every start that time, and the VMM then does the stub's part.
//!
//! Everything here treats its input as hostile: no panic, no loop that the input can hold up, no
//! allocation whose size the input chooses freely. Callers still run [`unpack`] in a jailed
//! process, because decompressors are what they are.

mod bzimage;
mod decompress;
mod elf;
mod error;
mod relocations;
mod source;
#[cfg(test)]
mod testing;

pub use bzimage::{BzImage, unpack};
pub use decompress::Compression;
pub use elf::{Elf, FileRange, Segment};
pub use error::Error;
pub use relocations::{KERNEL_MAP, Relocation, RelocationKind, Relocations};
pub use source::ReadAt;

/// What a file is, judged by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// An ELF file: a bare `vmlinux` or an unpacked payload.
    Elf,
    /// A bzImage: boot header and compressed payload.
    BzImage,
}

/// Says what `source` is.
///
/// # Errors
/// [`Error::NotAKernel`] when it is neither; [`Error::Read`] when reading fails.
pub fn identify(source: &(impl ReadAt + ?Sized)) -> Result<ImageKind, Error> {
    let size = source.size().map_err(Error::Read)?;
    if size >= 4 && source.array_at::<4>(0)? == elf::MAGIC {
        return Ok(ImageKind::Elf);
    }
    if bzimage::has_magic(source, size)? {
        return Ok(ImageKind::BzImage);
    }
    Err(Error::NotAKernel { size })
}

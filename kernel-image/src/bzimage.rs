//! The bzImage: boot sector and setup code, then protected-mode code with the payload in it.
//!
//! Field offsets are those of Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".

use std::io::Write;

use crate::decompress::{Compression, decompress};
use crate::source::{ReadAt, Window};
use crate::{Error, elf};

/// Size of a disk sector; the header counts in these.
const SECTOR: u64 = 512;
/// Offset of `setup_sects`, the first field of the header.
const HEADER_START: u64 = 0x1f1;
/// Offset of the `HdrS` magic; the header's end is relative to it.
const MAGIC_OFFSET: u64 = 0x202;
/// Offset of the end of the last field used here (`payload_length`).
const FIELDS_END: u64 = 0x250;
/// First version of the protocol with `payload_offset` and `payload_length`.
const FIRST_VERSION_WITH_PAYLOAD: u16 = 0x208;
/// The header may not reach the e820 table of `boot_params`, which starts here.
const HEADER_LIMIT: u64 = 0x290;
/// Longest version string that is looked at.
const VERSION_STRING_MAX: u64 = 256;

/// Whether the file has the magic of a boot header.
pub(crate) fn has_magic(source: &(impl ReadAt + ?Sized), size: u64) -> Result<bool, Error> {
    Ok(size >= MAGIC_OFFSET + 4 && source.array_at::<4>(MAGIC_OFFSET)? == *b"HdrS")
}

/// The checked boot header of a bzImage.
#[derive(Clone, Debug)]
pub struct BzImage {
    /// Boot protocol version, major in the high byte.
    pub version: u16,
    /// The kernel's version string: what `uname -r` will say, then who built it and when. `None`
    /// when the header names none or it is not plain text.
    pub kernel_version: Option<String>,
    /// The header's bytes from `setup_sects` on, to be put at offset 0x1f1 of `boot_params`.
    pub setup_header: Vec<u8>,
    /// Offset of the payload in the file.
    pub payload_offset: u64,
    /// Length of the payload in bytes, its trailing size field included.
    pub payload_length: u64,
}

impl BzImage {
    /// Reads and checks the header. The payload it names lies inside `source`.
    ///
    /// # Errors
    /// Names what is wrong with the header; see [`Error`].
    pub fn parse(source: &(impl ReadAt + ?Sized)) -> Result<Self, Error> {
        let file = source.size().map_err(Error::Read)?;
        if !has_magic(source, file)? {
            return Err(Error::NotAKernel { size: file });
        }
        let version = u16::from_le_bytes(source.array_at(0x206)?);
        if version < FIRST_VERSION_WITH_PAYLOAD {
            return Err(Error::ProtocolTooOld { version });
        }
        // Zero means four, for reasons of the 1990s.
        let [setup_sectors] = source.array_at(HEADER_START)?;
        let setup_sectors = if setup_sectors == 0 { 4 } else { setup_sectors };
        let setup_size = (u64::from(setup_sectors) + 1) * SECTOR;

        let payload_offset = setup_size + u64::from(u32::from_le_bytes(source.array_at(0x248)?));
        let payload_length = u64::from(u32::from_le_bytes(source.array_at(0x24c)?));
        if payload_length == 0 || payload_offset + payload_length > file {
            return Err(Error::PayloadOutOfBounds {
                offset: payload_offset,
                length: payload_length,
                file,
            });
        }

        // The byte at 0x201 is the operand of a short jump over the header, so it says its length.
        let [jump] = source.array_at(0x201)?;
        let header_end = (MAGIC_OFFSET + u64::from(jump)).clamp(FIELDS_END, HEADER_LIMIT);
        let mut setup_header = vec![0; (header_end - HEADER_START) as usize];
        source
            .read_exact_at(&mut setup_header, HEADER_START)
            .map_err(|error| Error::reading(error, HEADER_START, header_end - HEADER_START))?;

        Ok(Self {
            version,
            kernel_version: version_string(source, setup_size.min(file))?,
            setup_header,
            payload_offset,
            payload_length,
        })
    }

    /// The release alone: what `uname -r` will say.
    pub fn release(&self) -> Option<&str> {
        self.kernel_version.as_deref()?.split(' ').next()
    }

    /// How the payload is compressed.
    ///
    /// # Errors
    /// [`Error::UnsupportedCompression`], [`Error::UnknownCompression`].
    pub fn compression(&self, source: &(impl ReadAt + ?Sized)) -> Result<Compression, Error> {
        if self.payload_length < 6 {
            return Err(Error::Truncated {
                offset: self.payload_offset,
                length: 6,
            });
        }
        Compression::detect(source.array_at(self.payload_offset)?)
    }

    /// How many bytes the payload says that it unpacks to: the kernel's build appends it (and
    /// gzip ends with it anyway).
    ///
    /// # Errors
    /// [`Error::Truncated`], [`Error::Read`].
    pub fn declared_size(&self, source: &(impl ReadAt + ?Sized)) -> Result<u64, Error> {
        let offset = (self.payload_offset + self.payload_length).saturating_sub(4);
        Ok(u64::from(u32::from_le_bytes(source.array_at(offset)?)))
    }

    /// Unpacks the payload into `output`, which gets exactly [`Self::declared_size`] bytes.
    ///
    /// `limit` bounds that size in bytes. Memory use is bounded too: by 128 MiB for the
    /// dictionary of the decompressor, whatever the payload says.
    ///
    /// # Errors
    /// Among others [`Error::DeclaredTooLarge`] before anything is unpacked, [`Error::WrongSize`]
    /// as soon as one byte too many comes out, and [`Error::BadElf`] before the first byte is
    /// written when what comes out is no ELF file for x86-64.
    pub fn unpack(
        &self,
        source: &(impl ReadAt + ?Sized),
        limit: u64,
        output: &mut impl Write,
    ) -> Result<u64, Error> {
        let compression = self.compression(source)?;
        let declared = self.declared_size(source)?;
        if declared > limit {
            return Err(Error::DeclaredTooLarge { declared, limit });
        }
        let mut end = self.payload_offset + self.payload_length;
        if compression != Compression::Gzip {
            end -= 4;
        }
        let window = Window::new(source, self.payload_offset, end);
        decompress(compression, window, declared, output, elf::check_identity)
    }
}

/// The version string; `setup_size` bounds where it may be.
fn version_string(
    source: &(impl ReadAt + ?Sized),
    setup_size: u64,
) -> Result<Option<String>, Error> {
    let pointer = u64::from(u16::from_le_bytes(source.array_at(0x20e)?));
    let start = pointer + SECTOR;
    if pointer == 0 || start >= setup_size {
        return Ok(None);
    }
    let mut bytes = vec![0; VERSION_STRING_MAX.min(setup_size - start) as usize];
    source
        .read_exact_at(&mut bytes, start)
        .map_err(|error| Error::reading(error, start, bytes.len() as u64))?;
    let Some(text) = bytes.split(|byte| *byte == 0).next() else {
        return Ok(None);
    };
    // It goes to terminals and file names: plain text or nothing.
    let plain = !text.is_empty() && text.iter().all(|b| b.is_ascii_graphic() || *b == b' ');
    Ok(plain.then(|| String::from_utf8_lossy(text).into_owned()))
}

/// Unpacks the kernel of the bzImage `source` into `output`, at most `limit` bytes; returns the
/// header and the number of bytes written. See [`BzImage::unpack`].
///
/// What comes out should then be looked at with [`crate::Elf::parse`] and
/// [`crate::Relocations::read`] before it is kept.
///
/// # Errors
/// See [`BzImage::parse`] and [`BzImage::unpack`].
pub fn unpack(
    source: &(impl ReadAt + ?Sized),
    limit: u64,
    output: &mut impl Write,
) -> Result<(BzImage, u64), Error> {
    let image = BzImage::parse(source)?;
    let written = image.unpack(source, limit, output)?;
    Ok((image, written))
}

#[cfg(test)]
mod tests;

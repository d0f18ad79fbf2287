//! What can be wrong with a kernel image.

use std::io;

use thiserror::Error;

/// Why an image was refused.
#[derive(Debug, Error)]
pub enum Error {
    /// The file could not be read.
    #[error("reading the kernel image: {0}")]
    Read(#[source] io::Error),
    /// The file ends before something that its headers name.
    #[error("the kernel image is truncated: {length} bytes at offset {offset:#x} are past its end")]
    Truncated {
        /// Where the missing bytes should be.
        offset: u64,
        /// How many bytes should be there.
        length: u64,
    },
    /// Neither an ELF file nor a bzImage.
    #[error("not a kernel: {size} bytes that are neither an ELF file nor an x86 bzImage")]
    NotAKernel {
        /// Size of the file in bytes.
        size: u64,
    },
    /// A boot protocol from before the payload had a place in the header.
    #[error(
        "the bzImage speaks boot protocol {}.{:02}, which does not say where its payload is; 2.08 (Linux 2.6.26) or later is needed",
        version >> 8, version & 0xff
    )]
    ProtocolTooOld {
        /// `version` of the header: major in the high byte.
        version: u16,
    },
    /// The payload that the header names is not all in the file.
    #[error(
        "the bzImage claims a payload of {length} bytes at offset {offset:#x}, but the file has {file} bytes"
    )]
    PayloadOutOfBounds {
        /// Offset in the file.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// Size of the file in bytes.
        file: u64,
    },
    /// A compression that is known but not supported.
    #[error(
        "the kernel's payload is compressed with {0}, which is not supported (gzip, xz, lz4 and zstd are)"
    )]
    UnsupportedCompression(&'static str),
    /// No known compression.
    #[error("the kernel's payload starts with {0:02x?}, which is no known compression")]
    UnknownCompression([u8; 6]),
    /// The payload says that it unpacks to more than allowed.
    #[error(
        "the kernel's payload claims to unpack to {declared} bytes; at most {limit} are allowed"
    )]
    DeclaredTooLarge {
        /// What the payload claims, in bytes.
        declared: u64,
        /// The caller's bound in bytes.
        limit: u64,
    },
    /// The payload unpacks to another size than it says (or never ends).
    #[error("the kernel's payload claims to unpack to {declared} bytes and gave {actual} or more")]
    WrongSize {
        /// What the payload claims, in bytes.
        declared: u64,
        /// Bytes that came out before unpacking stopped.
        actual: u64,
    },
    /// The decompressor failed.
    #[error("unpacking the kernel's {compression} payload: {source}")]
    Decompress {
        /// Name of the compression.
        compression: &'static str,
        /// What the decompressor says.
        source: io::Error,
    },
    /// The unpacked kernel could not be written.
    #[error("writing the unpacked kernel: {0}")]
    Write(#[source] io::Error),
    /// The ELF file is for something else, or malformed.
    #[error("the kernel's ELF file is not usable: {0}")]
    BadElf(&'static str),
    /// The bytes after the ELF file are no relocation lists.
    #[error("{length} bytes follow the kernel's ELF file, and they are not relocations: {reason}")]
    BadRelocations {
        /// How many bytes follow.
        length: u64,
        /// What is wrong with them.
        reason: &'static str,
    },
    /// A relocation points outside the kernel.
    #[error("relocation {index} points to {address:#x}, outside the kernel's segments")]
    RelocationOutOfBounds {
        /// Which one, counted from the end of the file.
        index: usize,
        /// The link-time virtual address that it names.
        address: u64,
    },
}

impl Error {
    /// An error of reading `length` bytes at `offset`.
    pub(crate) fn reading(error: io::Error, offset: u64, length: u64) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated { offset, length },
            _ => Self::Read(error),
        }
    }
}

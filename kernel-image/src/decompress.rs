//! Decompressing a payload, with every size bounded.

use std::io::{self, Read, Write};

use crate::Error;

/// Largest dictionary or window that a payload may ask for, in bytes. Linux's own build uses 32 MiB
/// (xz, before 6.x) to 128 MiB (zstd).
const MAX_WINDOW: u64 = 128 << 20;
/// Bytes moved at a time.
const CHUNK: usize = 128 << 10;
/// What is needed of the output to judge it.
const HEAD: usize = 64;

/// The compressions that an x86 kernel build offers and that are supported here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// DEFLATE in a gzip file.
    Gzip,
    /// LZMA2 in an xz file, usually with the x86 branch filter.
    Xz,
    /// LZ4 blocks in the legacy frame format (`lz4 -l`).
    Lz4Legacy,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// Recognises a compression by its magic.
    ///
    /// # Errors
    /// [`Error::UnsupportedCompression`] or [`Error::UnknownCompression`].
    pub fn detect(magic: [u8; 6]) -> Result<Self, Error> {
        match magic {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => Ok(Self::Xz),
            [0x02, 0x21, 0x4c, 0x18, ..] => Ok(Self::Lz4Legacy),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Self::Zstd),
            [b'B', b'Z', b'h', ..] => Err(Error::UnsupportedCompression("bzip2")),
            [0x5d, 0, 0, ..] => Err(Error::UnsupportedCompression("lzma")),
            [0x89, b'L', b'Z', b'O', ..] => Err(Error::UnsupportedCompression("lzo")),
            [0x04, 0x22, 0x4d, 0x18, ..] => Err(Error::UnsupportedCompression(
                "lz4 in the modern frame format",
            )),
            _ => Err(Error::UnknownCompression(magic)),
        }
    }

    /// The usual name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lz4Legacy => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// Decompresses `input` into `output`; exactly `declared` bytes must come out, and `check` must like
/// the first 64 of them before any is written.
pub(crate) fn decompress(
    compression: Compression,
    input: impl Read,
    declared: u64,
    output: &mut impl Write,
    check: impl FnOnce(&[u8; HEAD]) -> Result<(), Error>,
) -> Result<u64, Error> {
    let failed = |source| Error::Decompress {
        compression: compression.name(),
        source,
    };
    match compression {
        Compression::Gzip => {
            let decoder = flate2::read::GzDecoder::new(input);
            pump(compression, decoder, declared, output, check)
        }
        Compression::Xz => {
            // In KiB; the decoder counts its tables too, so leave it some room.
            let limit = u32::try_from((MAX_WINDOW >> 10) + 1024).unwrap_or(u32::MAX);
            let decoder = lzma_rust2::XzReader::new_mem_limit(input, false, limit);
            pump(compression, decoder, declared, output, check)
        }
        Compression::Lz4Legacy => {
            let decoder = lz4_flex::frame::FrameDecoder::new(input);
            pump(compression, decoder, declared, output, check)
        }
        Compression::Zstd => {
            let decoder =
                ruzstd::decoding::StreamingDecoder::new_with_max_window_size(input, MAX_WINDOW)
                    .map_err(|error| failed(io::Error::other(error)))?;
            pump(compression, decoder, declared, output, check)
        }
    }
}

/// Moves `declared` bytes, no more and no less.
fn pump(
    compression: Compression,
    decoder: impl Read,
    declared: u64,
    output: &mut impl Write,
    check: impl FnOnce(&[u8; HEAD]) -> Result<(), Error>,
) -> Result<u64, Error> {
    let failed = |source| Error::Decompress {
        compression: compression.name(),
        source,
    };
    // One byte more than declared is enough to know that it lies; nothing beyond is decoded.
    let mut decoder = decoder.take(declared.saturating_add(1));
    let mut head = [0; HEAD];
    decoder
        .read_exact(&mut head)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::BadElf("it is shorter than an ELF header"),
            _ => failed(error),
        })?;
    check(&head)?;
    output.write_all(&head).map_err(Error::Write)?;
    let mut actual = HEAD as u64;
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = match decoder.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error)),
        };
        actual = actual.saturating_add(count as u64);
        if actual > declared {
            return Err(Error::WrongSize { declared, actual });
        }
        let bytes = chunk.get(..count).unwrap_or_default();
        output.write_all(bytes).map_err(Error::Write)?;
    }
    if actual != declared {
        return Err(Error::WrongSize { declared, actual });
    }
    Ok(actual)
}

//! Reading at an offset, from a file or from memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::Error;

/// Bytes that can be read at any offset, without a shared file position.
pub trait ReadAt {
    /// Size in bytes.
    ///
    /// # Errors
    /// What the operating system says.
    fn size(&self) -> io::Result<u64>;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the bytes are not all there; else what the operating system says.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Reads `N` bytes from `offset`.
    ///
    /// # Errors
    /// [`Error::Truncated`] when the bytes are not all there, [`Error::Read`] otherwise.
    fn array_at<const N: usize>(&self, offset: u64) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.read_exact_at(&mut bytes, offset)
            .map_err(|error| Error::reading(error, offset, N as u64))?;
        Ok(bytes)
    }
}

impl ReadAt for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }
}

impl ReadAt for [u8] {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buffer.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

/// A window of a [`ReadAt`] as a stream, for the decompressors.
pub(crate) struct Window<'a, S: ?Sized> {
    source: &'a S,
    offset: u64,
    end: u64,
}

impl<'a, S: ReadAt + ?Sized> Window<'a, S> {
    /// The bytes from `offset` to `end`, which lie inside `source`.
    pub(crate) fn new(source: &'a S, offset: u64, end: u64) -> Self {
        Self {
            source,
            offset,
            end,
        }
    }
}

impl<S: ReadAt + ?Sized> io::Read for Window<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.offset)).unwrap_or(usize::MAX);
        let count = left.min(buffer.len());
        let Some(wanted) = buffer.get_mut(..count) else {
            return Ok(0);
        };
        self.source.read_exact_at(wanted, self.offset)?;
        self.offset = self.offset.saturating_add(count as u64);
        Ok(count)
    }
}

//! Discard and write-zeroes (virtio 1.2, section 5.2.6): the guest gives parts of the disk back, or
//! wants zeros there without sending them.

use std::fs::File;
use std::io::{self, IoSlice};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::pwritev;

use super::{S_IOERR, S_UNSUPP, SECTOR};

/// Ranges that one request may name. What a guest lists beyond that is an error.
pub const MAX_RANGES: u32 = 16;
/// Largest range of a discard, in sectors: 1 GiB, which the host's file system frees at once.
pub const MAX_DISCARD: u32 = 1 << 21;
/// Largest range of zeros, in sectors: 4 MiB, because a host that can do no better writes them.
pub const MAX_ZEROES: u32 = 1 << 13;
/// Bytes of one range in a request.
pub const RANGE_LEN: usize = 16;

/// Of a range's flags: the device may deallocate what it zeroes. The others are reserved.
const UNMAP: u32 = 1;

/// What to do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The guest needs the content no more.
    Discard,
    /// The guest wants zeros.
    Zeroes,
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    offset: i64,
    len: i64,
    unmap: bool,
}

impl Range {
    /// Checks one range of a request against a disk of `sectors`.
    ///
    /// # Errors
    /// The status of the request.
    pub fn parse(bytes: [u8; RANGE_LEN], kind: Kind, sectors: u64) -> Result<Self, u8> {
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        let sector = u64::from_le_bytes(sector);
        let count = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let (most, known) = match kind {
            // A discard has no use for the flag: it must not be set (section 5.2.6.2).
            Kind::Discard => (MAX_DISCARD, 0),
            Kind::Zeroes => (MAX_ZEROES, UNMAP),
        };
        if flags & !known != 0 {
            return Err(S_UNSUPP);
        }
        let end = sector.checked_add(count.into()).ok_or(S_IOERR)?;
        if count > most || end > sectors {
            return Err(S_IOERR);
        }
        let offset = sector
            .checked_mul(SECTOR)
            .and_then(|offset| i64::try_from(offset).ok());
        Ok(Self {
            offset: offset.ok_or(S_IOERR)?,
            // At most `MAX_DISCARD` sectors.
            len: i64::from(count) * SECTOR as i64,
            unmap: flags & UNMAP != 0,
        })
    }

    /// Its first byte and its length.
    pub fn place(self) -> (u64, u64) {
        // Neither is negative.
        (self.offset as u64, self.len as u64)
    }

    /// How fallocate(2) does what the guest asked for.
    pub fn mode(self, kind: Kind) -> FallocateFlags {
        // A hole reads as zeros. Without the guest's leave its blocks stay allocated.
        let how = match kind {
            Kind::Zeroes if !self.unmap => FallocateFlags::FALLOC_FL_ZERO_RANGE,
            Kind::Zeroes | Kind::Discard => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
        };
        // It never makes the file longer.
        how | FallocateFlags::FALLOC_FL_KEEP_SIZE
    }

    /// Does to `file` what the guest asked for.
    ///
    /// # Errors
    /// What the host says.
    pub fn apply(self, kind: Kind, file: &File) -> io::Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        match allocate(file, self.mode(kind), self.offset, self.len) {
            Ok(()) => Ok(()),
            Err(error) => self.without_help(kind, file, error.into()),
        }
    }

    /// What there is to do after fallocate(2) said `error`: zeros can be written too.
    ///
    /// # Errors
    /// What the host says.
    pub fn without_help(self, kind: Kind, file: &File, error: io::Error) -> io::Result<()> {
        let cannot = error.raw_os_error() == Some(libc::EOPNOTSUPP);
        match kind {
            Kind::Zeroes if cannot => self.write_zeroes(file),
            // fallocate(2) takes no empty range.
            _ if self.len == 0 => Ok(()),
            _ => Err(error),
        }
    }

    fn write_zeroes(self, file: &File) -> io::Result<()> {
        const ZEROES: &[u8] = &[0; 64 << 10];
        let (mut offset, mut left) = (self.offset, self.len);
        while left > 0 {
            // Never negative.
            let piece = (left as usize).min(ZEROES.len());
            let piece = ZEROES.get(..piece).unwrap_or_default();
            // As the other requests write, so that the policy needs no further call.
            match pwritev(file, &[IoSlice::new(piece)], offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    // At most `left`.
                    let count = count as i64;
                    offset = offset.saturating_add(count);
                    left = left.saturating_sub(count);
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Whether the host can make holes in `file`, whose end is at `len`.
pub fn is_possible(file: &File, len: u64) -> bool {
    // Behind the end there is nothing to lose. A block device that can refuses the place, one that
    // cannot refuses the operation.
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    i64::try_from(len).is_ok_and(|end| {
        !matches!(
            allocate(file, punch, end, SECTOR as i64),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS)
        )
    })
}

/// `fallocate`, whatever signals come.
fn allocate(file: &File, how: FallocateFlags, offset: i64, len: i64) -> Result<(), Errno> {
    loop {
        match fallocate(file, how, offset, len) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Seek as _, Write as _};

    #[test]
    fn writes_zeros_where_the_host_makes_none() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 300 << 10]).unwrap();
        let range = Range {
            offset: 512,
            len: 200 << 10,
            unmap: false,
        };
        range.write_zeroes(&file).unwrap();
        let mut all = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut all).unwrap();
        let zeros = 512..512 + (200 << 10);
        assert!(
            all.iter()
                .enumerate()
                .all(|(i, &byte)| byte == if zeros.contains(&i) { 0 } else { 7 })
        );
        assert_eq!(all.len(), 300 << 10);
    }
}

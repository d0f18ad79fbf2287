//! What a guest asks of its disk (virtio 1.2, section 5.2.6): copied once, checked as a copy.

use super::discard::{self, Kind, RANGE_LEN, Range};
use super::{ID_LEN, MAX_TRANSFER, S_IOERR, S_UNSUPP, SECTOR};
use crate::memory::GuestMemory;
use crate::virtio::chain::Chain;

/// Request types.
pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

/// Type, a reserved word, and the sector.
pub const HEADER_LEN: u64 = 16;

/// What a disk takes.
#[derive(Clone, Copy, Debug)]
pub struct Abilities {
    /// Its size.
    pub sectors: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether it has a cache to flush.
    pub flush: bool,
    /// Whether it takes discard and write-zeroes.
    pub discard: bool,
}

/// A request that may be served.
#[derive(Debug)]
pub enum Request {
    /// Bytes from `offset` on into all writable buffers but the last byte.
    Read { offset: u64, len: u64 },
    /// The readable buffers behind the header to the bytes from `offset` on.
    Write { offset: u64, len: u64 },
    /// What was written reaches the disk.
    Flush,
    /// The disk's serial number.
    Id,
    /// Ranges that become free, or zeros.
    Deallocate { kind: Kind, ranges: Vec<Range> },
}

impl Request {
    /// Reads and checks the request in `chain`, which has `room` for data before the status.
    ///
    /// # Errors
    /// The status of a request that is not served.
    pub fn parse(
        memory: &GuestMemory,
        chain: &Chain,
        room: u64,
        abilities: Abilities,
    ) -> Result<Self, u8> {
        let mut header = [0; HEADER_LEN as usize];
        chain.read_at(memory, 0, &mut header).map_err(|_| S_IOERR)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            T_IN => Ok(Self::Read {
                offset: place(abilities.sectors, sector, room)?,
                len: room,
            }),
            T_OUT if abilities.read_only => Err(S_IOERR),
            T_OUT => {
                let len = chain.readable_len().saturating_sub(HEADER_LEN);
                let offset = place(abilities.sectors, sector, len)?;
                Ok(Self::Write { offset, len })
            }
            T_FLUSH if abilities.flush => Ok(Self::Flush),
            T_GET_ID if room >= ID_LEN as u64 => Ok(Self::Id),
            T_GET_ID => Err(S_IOERR),
            T_DISCARD if abilities.discard => {
                deallocate(memory, chain, Kind::Discard, abilities.sectors)
            }
            T_WRITE_ZEROES if abilities.discard => {
                deallocate(memory, chain, Kind::Zeroes, abilities.sectors)
            }
            _ => Err(S_UNSUPP),
        }
    }
}

/// Where `len` bytes at `sector` lie in the file, if they are whole sectors of a disk of `sectors`. Any
/// place in the disk, its end included, is one that an `i64` holds.
fn place(sectors: u64, sector: u64, len: u64) -> Result<u64, u8> {
    let end = sector.checked_add(len / SECTOR).ok_or(S_IOERR)?;
    if !len.is_multiple_of(SECTOR) || len > MAX_TRANSFER || end > sectors {
        return Err(S_IOERR);
    }
    sector.checked_mul(SECTOR).ok_or(S_IOERR)
}

/// All ranges are checked before any is touched.
fn deallocate(
    memory: &GuestMemory,
    chain: &Chain,
    kind: Kind,
    sectors: u64,
) -> Result<Request, u8> {
    const MOST: usize = discard::MAX_RANGES as usize * RANGE_LEN;
    let len = chain.readable_len().saturating_sub(HEADER_LEN);
    let len = usize::try_from(len).map_err(|_| S_IOERR)?;
    let mut list = [0; MOST];
    let list = list.get_mut(..len).ok_or(S_IOERR)?;
    chain
        .read_at(memory, HEADER_LEN, list)
        .map_err(|_| S_IOERR)?;
    let (ranges, rest) = list.as_chunks::<RANGE_LEN>();
    if ranges.is_empty() || !rest.is_empty() {
        return Err(S_IOERR);
    }
    let ranges = ranges.iter();
    let ranges = ranges
        .map(|range| Range::parse(*range, kind, sectors))
        .collect::<Result<_, _>>()?;
    Ok(Request::Deallocate { kind, ranges })
}

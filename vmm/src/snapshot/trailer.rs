//! The last page of a memory file: whose memory it is, and what is in the file.
//!
//! All numbers are little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `CASEMATE` |
//! | 8 | 4 | which file this is: 2, the memory |
//! | 12 | 2 + 2 | version of the format: major, minor |
//! | 16 | 4 | architecture, by ELF's number |
//! | 20 | 4 | number of regions, 1 to [`MAX_REGIONS`] |
//! | 24 | 16 | id of the snapshot |
//! | 40 | 16 | of differences: id of the snapshot that they are against; else zero |
//! | 56 | 4 | 0: all of the memory; 1: differences |
//! | 60 | 4 | size of a page: 4096 |
//! | 64 | 8 | how many pages are not zero |
//! | 72 | 8 | sum of these pages' checksums, modulo 2⁶⁴: XXH64, the seed being the page's number in the file |
//! | 80 | 8 | checksum of the bitmap's pages (of none: that of no bytes) |
//! | 88 | 16 each | the regions: guest-physical address, length in bytes |
//! | … | | zero |
//! | 4088 | 8 | checksum of all before |

use super::SnapshotId;
use super::format::{self, Role, Version, checksum, id_at, preamble, u32_at, u64_at};
use super::memory::Error;

/// Size of a page, and of the trailer.
pub const PAGE: u64 = 4096;
/// Most regions that fit.
pub const MAX_REGIONS: usize = 250;

/// Most bytes of all regions together, 16 TiB: a bitmap of these has half a GiB.
pub const MAX_RAM: u64 = 16 << 40;
/// The trailer's size in bytes.
pub const SIZE: usize = PAGE as usize;
const REGIONS: usize = 88;
const REGION: usize = 16;
const SUM: usize = SIZE - 8;
const WORD: u64 = 8;

/// Guest-physical address and length in bytes.
pub type Region = (u64, u64);

/// What a memory file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// The format's version.
    pub version: Version,
    /// Whose memory it is.
    pub id: SnapshotId,
    /// Of differences: against what they are.
    pub base: Option<SnapshotId>,
    /// The regions, in the order of addresses.
    pub regions: Vec<Region>,
    /// How many pages in the file are not zero.
    pub pages: u64,
    /// Sum of their checksums.
    pub contents: u64,
    /// Checksum of the bitmap.
    pub bitmap: u64,
}

impl Trailer {
    /// Bytes of all regions: where what follows them begins.
    pub fn ram(&self) -> u64 {
        total(&self.regions)
    }

    /// Bytes of the bitmap, in whole pages.
    pub fn bitmap_size(&self) -> u64 {
        self.base.map_or(0, |_| bitmap_size(&self.regions))
    }

    /// Bytes of the whole file.
    pub fn file_size(&self) -> u64 {
        // `check_regions` leaves room for these.
        self.ram()
            .saturating_add(self.bitmap_size())
            .saturating_add(PAGE)
    }

    /// The page. Of regions that [`check_regions`] has passed.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SIZE);
        bytes.extend_from_slice(&preamble(Role::Memory));
        // At most MAX_REGIONS.
        bytes.extend_from_slice(&(self.regions.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&self.id.to_bytes());
        let base = self.base.map_or([0; 16], SnapshotId::to_bytes);
        bytes.extend_from_slice(&base);
        bytes.extend_from_slice(&u32::from(self.base.is_some()).to_le_bytes());
        bytes.extend_from_slice(&(PAGE as u32).to_le_bytes());
        for number in [self.pages, self.contents, self.bitmap] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for (start, length) in &self.regions {
            bytes.extend_from_slice(&start.to_le_bytes());
            bytes.extend_from_slice(&length.to_le_bytes());
        }
        bytes.resize(SUM, 0);
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// What the page says.
    ///
    /// # Errors
    /// When it is no trailer, or damaged, or one that this program does not know.
    pub fn decode(page: &[u8; SIZE]) -> Result<Self, Error> {
        let version = format::identify(page, Role::Memory).map_err(|error| match error {
            format::Error::NoSnapshot => Error::NoTrailer,
            other => Error::Format(other),
        })?;
        Self::read(page, version).ok_or(Error::Trailer)
    }

    fn read(page: &[u8; SIZE], version: Version) -> Option<Self> {
        let sum = u64_at(page, SUM)?;
        if checksum(page.get(..SUM)?) != sum || u64::from(u32_at(page, 60)?) != PAGE {
            return None;
        }
        let count = u32_at(page, 20)? as usize;
        let length = count.checked_mul(REGION)?;
        let regions = page.get(REGIONS..SUM)?.get(..length)?;
        let regions: Vec<Region> = regions
            .chunks_exact(REGION)
            .filter_map(|bytes| Some((u64_at(bytes, 0)?, u64_at(bytes, 8)?)))
            .collect();
        check_regions(&regions).ok()?;
        let base = id_at(page, 40)?;
        Some(Self {
            version,
            id: id_at(page, 24)?,
            base: match u32_at(page, 56)? {
                0 => None,
                1 => Some(base),
                _ => return None,
            },
            regions,
            pages: u64_at(page, 64)?,
            contents: u64_at(page, 72)?,
            bitmap: u64_at(page, 80)?,
        })
    }
}

/// Bytes of all regions. Of those that [`check_regions`] has passed.
pub fn total(regions: &[Region]) -> u64 {
    let lengths = regions.iter().map(|(_, length)| *length);
    lengths.fold(0, u64::saturating_add)
}

/// 64-bit words of the bitmap of a region.
pub fn words(length: u64) -> u64 {
    (length / PAGE).div_ceil(u64::BITS.into())
}

/// Bytes of the regions' bitmaps, one behind the other, in whole pages.
fn bitmap_size(regions: &[Region]) -> u64 {
    let words = regions.iter().map(|(_, length)| words(*length));
    let bytes = words
        .fold(0, u64::saturating_add)
        .saturating_mul(WORD)
        .div_ceil(PAGE);
    bytes.saturating_mul(PAGE)
}

/// Regions are whole pages, in the order of addresses, do not overlap, and a file can hold them.
///
/// # Errors
/// When that is not so.
pub fn check_regions(regions: &[Region]) -> Result<(), Error> {
    let unfit = || Error::Unfit(regions.to_vec());
    if regions.is_empty() || regions.len() > MAX_REGIONS {
        return Err(Error::Count(regions.len()));
    }
    let (mut end, mut bytes) = (0, 0_u64);
    for &(start, length) in regions {
        let aligned = start.is_multiple_of(PAGE) && length.is_multiple_of(PAGE);
        if !aligned || length == 0 || start < end {
            return Err(unfit());
        }
        end = start.checked_add(length).ok_or_else(unfit)?;
        bytes = bytes.checked_add(length).ok_or_else(unfit)?;
    }
    if bytes > MAX_RAM {
        return Err(unfit());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trailer(base: Option<SnapshotId>) -> Trailer {
        Trailer {
            version: format::VERSION,
            id: SnapshotId::from_bytes([7; 16]),
            base,
            regions: vec![(0, 0x3000), (1 << 32, 0x1000)],
            pages: 3,
            contents: u64::MAX,
            bitmap: 5,
        }
    }

    fn page(trailer: &Trailer) -> [u8; SIZE] {
        trailer.encode().try_into().unwrap()
    }

    fn sealed(mut page: [u8; SIZE]) -> [u8; SIZE] {
        let sum = checksum(&page[..SUM]).to_le_bytes();
        page[SUM..].copy_from_slice(&sum);
        page
    }

    #[test]
    fn what_was_written_is_read() {
        for base in [None, Some(SnapshotId::from_bytes([9; 16]))] {
            let trailer = trailer(base);
            assert_eq!(Trailer::decode(&page(&trailer)).unwrap(), trailer);
        }
        let most = Trailer {
            regions: (0..250).map(|region| (region * 0x2000, 0x1000)).collect(),
            ..trailer(None)
        };
        assert_eq!(Trailer::decode(&page(&most)).unwrap(), most);
    }

    #[test]
    fn sizes_follow_from_the_regions() {
        let mut diff = trailer(Some(SnapshotId::from_bytes([9; 16])));
        assert_eq!((diff.ram(), diff.file_size()), (0x4000, 0x6000));
        // 32768 pages have a bit each in a page.
        diff.regions = vec![(0, 128 << 20)];
        assert_eq!(diff.bitmap_size(), PAGE);
        diff.regions.push((1 << 32, 4096));
        assert_eq!(diff.bitmap_size(), 2 * PAGE);
        diff.base = None;
        assert_eq!(diff.file_size(), (128 << 20) + 2 * PAGE);
    }

    #[test]
    fn no_bit_may_be_another() {
        let whole = page(&trailer(None));
        for offset in 0..SIZE {
            for bit in 0..8 {
                let mut flipped = whole;
                flipped[offset] ^= 1 << bit;
                assert!(Trailer::decode(&flipped).is_err(), "{offset}: {bit}");
            }
        }
    }

    #[test]
    fn what_is_written_is_not_believed() {
        let whole = page(&trailer(None));
        for (offset, number) in [
            (20, &[0, 0, 0, 0][..]),       // no regions
            (20, &[251, 0, 0, 0]),         // more than fit
            (20, &[255, 255, 255, 255]),   //
            (20, &[3, 0, 0, 0]),           // one of no bytes
            (56, &[2, 0, 0, 0]),           // neither all nor differences
            (60, &[0, 32, 0, 0]),          // pages of 8 KiB
            (88, &[1]),                    // not at a page
            (97, &[1]),                    // not of whole pages: 0x3100
            (103, &[0x80]),                // 2^63 bytes, over the next
            (104, &[0, 0x20, 0, 0, 0]),    // over the one before
            (116, &[0xff; 4]),             // beyond 64 bits
            (112, &[0, 0, 0, 0, 0, 0x10]), // 16 TiB, and more before
        ] {
            let mut changed = whole;
            changed[offset..offset + number.len()].copy_from_slice(number);
            let error = Trailer::decode(&sealed(changed)).unwrap_err();
            assert!(matches!(error, Error::Trailer), "{offset}: {error}");
        }
        let mut later = whole;
        later[12] = 2;
        let error = Trailer::decode(&later).unwrap_err().to_string();
        assert!(error.contains("v2.0.0"), "{error}");
        later[0] = 0;
        assert!(matches!(Trailer::decode(&later), Err(Error::NoTrailer)));
    }
}

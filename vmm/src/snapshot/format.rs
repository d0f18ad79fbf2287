//! The state file: sections of bytes, each with a kind, an index, a version and a checksum.
//!
//! All numbers are little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `CASEMATE` |
//! | 8 | 4 | which file this is: 1, the state |
//! | 12 | 2 + 2 | version of the format: major, minor |
//! | 16 | 4 | architecture, by ELF's number: 62 is x86-64 |
//! | 20 | 4 | number of sections, *n* |
//! | 24 | 16 | id of the snapshot |
//! | 40 | 8 | length of the file |
//! | 48 | 28 *n* | the table. Of each section: kind (4), index (4), version (4), length (8), checksum (8) |
//! | 48 + 28 *n* | 8 | checksum of all before |
//! | 56 + 28 *n* | | the sections' bytes, one behind the other, and nothing behind the last |
//!
//! Sections are in ascending order of kind, then index; no two have both the same. A checksum is XXH64 with
//! seed 0.
//!
//! # What is compatible
//!
//! A file is read by every program that knows its major version. A minor version adds what an older program
//! may leave out without harm: a section of a new kind, or a JSON field that has a default. Everything else,
//! such as a section without which the machine would be another, or a field that means something else, is a
//! new major version, and a program refuses those that it does not know, older ones included unless its notes
//! say otherwise. The version of a section is for its reader: the same kind, written differently.
//!
//! # What the file is not trusted with
//!
//! [`read`] allocates by the length that the file really has, [`MAX_STATE`] at most; [`decode`] by what it was
//! given. No number in the file sizes anything.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use thiserror::Error;
use twox_hash::XxHash64;

use super::SnapshotId;

/// What both files say that they are.
pub(super) const MAGIC: [u8; 8] = *b"CASEMATE";
/// Largest state file in bytes. A machine of 32 vCPUs has a few hundred KiB.
pub const MAX_STATE: u64 = 64 << 20;
/// The version that this program writes; it reads all of this major version.
pub const VERSION: Version = Version { major: 1, minor: 0 };
/// The architecture of this program's machines: EM_X86_64 of ELF.
pub(super) const ARCHITECTURE: u32 = 62;

/// Bytes before the table.
const HEADER: usize = 48;
/// Bytes of a section in the table.
const ENTRY: usize = 28;
/// Bytes of a checksum.
const CHECKSUM: usize = 8;

/// A version of the format. Both files of a snapshot have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Another one is another format.
    pub major: u16,
    /// A higher one has more in it.
    pub minor: u16,
}

/// As Firecracker shows its own: `v1.0.0`.
impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "v{}.{}.0", self.major, self.minor)
    }
}

/// Which of a snapshot's files one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Role {
    /// The state.
    State = 1,
    /// The memory.
    Memory = 2,
    /// The working set, made of sections as the state is.
    WorkingSet = 3,
}

/// A part of a machine's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Whose state it is.
    pub kind: u32,
    /// Which of several of that kind.
    pub index: u32,
    /// How it is written.
    pub version: u32,
    /// What its owner says.
    pub payload: Vec<u8>,
}

/// Why a state file is refused.
#[derive(Debug, Error)]
pub enum Error {
    /// Something else.
    #[error("it is no snapshot of Casemate's")]
    NoSnapshot,
    /// The other of the two files.
    #[error("it is the memory file of a snapshot: give that of the state")]
    MemoryFile,
    /// Not a file of its own length.
    #[error("it is not a regular file")]
    NotAFile,
    /// A later program wrote it.
    #[error(
        "its format is {0}, newer than the {VERSION} that this program knows: use a newer program"
    )]
    Newer(Version),
    /// A program wrote it before there was compatibility with this one.
    #[error(
        "its format is {0}, older than the {VERSION} that this program knows: use the program that wrote it"
    )]
    Older(Version),
    /// Of a machine that this program has not.
    #[error("it is of another architecture ({}): this program has x86-64", architecture(*.0))]
    Architecture(u32),
    /// Its end is missing.
    #[error("it is cut off: it has {has} bytes and needs {needs}")]
    CutOff {
        /// Bytes that there are.
        has: u64,
        /// Bytes that it says that it has.
        needs: u64,
    },
    /// Something follows.
    #[error("it has {has} bytes, {} more than its sections take", .has.saturating_sub(*.needs))]
    Trailing {
        /// Bytes that there are.
        has: u64,
        /// Bytes that it says that it has.
        needs: u64,
    },
    /// The header or the table is not what was written.
    #[error("its header or its table is damaged")]
    Header,
    /// The table is whole and cannot be.
    #[error("its sections have {sections} bytes by the table, and the file has room for {room}")]
    Lengths {
        /// All sections together.
        sections: u128,
        /// Bytes behind the table.
        room: u64,
    },
    /// The bytes of a section are not what was written.
    #[error("section {position} (kind {kind}, index {index}) is damaged")]
    Damaged {
        /// Which, counted from 1.
        position: usize,
        /// Its kind.
        kind: u32,
        /// Its index.
        index: u32,
    },
    /// A section stands behind one that it belongs before.
    #[error("section {position} (kind {kind}, index {index}) is in the wrong place")]
    Order {
        /// Which, counted from 1.
        position: usize,
        /// Its kind.
        kind: u32,
        /// Its index.
        index: u32,
    },
    /// There is a section more than once.
    #[error("section {position} (kind {kind}, index {index}) is there twice")]
    Twice {
        /// Which, counted from 1.
        position: usize,
        /// Its kind.
        kind: u32,
        /// Its index.
        index: u32,
    },
    /// More than a machine has.
    #[error("it has {0} bytes, more than the {MAX_STATE} that a state may have")]
    TooLarge(u64),
    /// The host does not read it.
    #[error("cannot read it: {0}")]
    Read(#[source] io::Error),
}

fn architecture(number: u32) -> String {
    match number {
        62 => "x86-64".to_owned(),
        183 => "aarch64".to_owned(),
        243 => "RISC-V".to_owned(),
        other => format!("number {other} of ELF"),
    }
}

/// The checksum of both files.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

/// The bytes of a state file. The sections are in ascending order of kind and index.
///
/// # Errors
/// When they are not, or are more than [`MAX_STATE`].
pub fn encode(id: SnapshotId, sections: &[Section]) -> Result<Vec<u8>, Error> {
    encode_as(Role::State, id, sections)
}

/// The same for another file made of sections.
pub(super) fn encode_as(
    role: Role,
    id: SnapshotId,
    sections: &[Section],
) -> Result<Vec<u8>, Error> {
    check_order(sections.iter().map(|section| (section.kind, section.index)))?;
    let payloads: u128 = sections.iter().map(|each| each.payload.len() as u128).sum();
    let fixed = table_end(sections.len() as u64).saturating_add(CHECKSUM as u64);
    let all = payloads.saturating_add(fixed.into());
    let length = u64::try_from(all).unwrap_or(u64::MAX);
    if length > MAX_STATE {
        return Err(Error::TooLarge(length));
    }
    let count = u32::try_from(sections.len()).map_err(|_| Error::TooLarge(length))?;
    // At most MAX_STATE.
    let mut bytes = Vec::with_capacity(length as usize);
    bytes.extend_from_slice(&preamble(role));
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&id.to_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    for section in sections {
        for number in [section.kind, section.index, section.version] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let length = section.payload.len() as u64;
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&checksum(&section.payload).to_le_bytes());
    }
    let sum = checksum(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    for section in sections {
        bytes.extend_from_slice(&section.payload);
    }
    Ok(bytes)
}

/// What a state file says.
///
/// # Errors
/// See [`Error`].
pub fn decode(bytes: &[u8]) -> Result<(SnapshotId, Vec<Section>), Error> {
    let (_, id, sections) = decode_as(Role::State, bytes)?;
    Ok((id, sections))
}

/// What a file made of sections says, its version first.
fn decode_as(role: Role, bytes: &[u8]) -> Result<(Version, SnapshotId, Vec<Section>), Error> {
    let has = bytes.len() as u64;
    let version = identify(bytes, role)?;
    let header = Header::read(bytes).ok_or(Error::CutOff {
        has,
        needs: (HEADER + CHECKSUM) as u64,
    })?;
    let table_end = table_end(header.sections.into());
    let cut_off = || {
        let needs = header.length.max(table_end.saturating_add(CHECKSUM as u64));
        Error::CutOff { has, needs }
    };
    let end = usize::try_from(table_end).map_err(|_| cut_off())?;
    let sum = u64_at(bytes, end).ok_or_else(cut_off)?;
    let (whole, payloads) = bytes.split_at_checked(end).ok_or_else(cut_off)?;
    if checksum(whole) != sum {
        return Err(Error::Header);
    }
    // The header is what was written, and what does not fit to it came later.
    let needs = header.length;
    match has.cmp(&needs) {
        std::cmp::Ordering::Less => return Err(Error::CutOff { has, needs }),
        std::cmp::Ordering::Greater => return Err(Error::Trailing { has, needs }),
        std::cmp::Ordering::Equal => {}
    }
    let payloads = payloads.get(CHECKSUM..).ok_or_else(cut_off)?;
    let table = whole.get(HEADER..).ok_or(Error::Header)?;
    let sections = read_sections(table, payloads)?;
    Ok((version, header.id, sections))
}

/// The sections of a table that is whole.
fn read_sections(table: &[u8], payloads: &[u8]) -> Result<Vec<Section>, Error> {
    let entries = || table.chunks_exact(ENTRY).filter_map(Entry::read);
    check_order(entries().map(|entry| (entry.kind, entry.index)))?;
    let sections: u128 = entries().map(|entry| u128::from(entry.length)).sum();
    let room = payloads.len() as u64;
    let lengths = || Error::Lengths { sections, room };
    if sections != room.into() {
        return Err(lengths());
    }
    let mut rest = payloads;
    let mut read = Vec::with_capacity(table.len() / ENTRY);
    for (index, entry) in entries().enumerate() {
        let length = usize::try_from(entry.length).map_err(|_| lengths())?;
        let (payload, behind) = rest.split_at_checked(length).ok_or_else(lengths)?;
        rest = behind;
        if checksum(payload) != entry.checksum {
            return Err(Error::Damaged {
                position: index.saturating_add(1),
                kind: entry.kind,
                index: entry.index,
            });
        }
        read.push(Section {
            kind: entry.kind,
            index: entry.index,
            version: entry.version,
            payload: payload.to_vec(),
        });
    }
    Ok(read)
}

/// Reads a state file by pread(2): `file` is used from its beginning, wherever it stands.
///
/// # Errors
/// See [`Error`].
pub fn read(file: &File) -> Result<(SnapshotId, Vec<Section>), Error> {
    let (_, id, sections) = read_as(Role::State, file)?;
    Ok((id, sections))
}

/// Reads a file made of sections, its version first.
pub(super) fn read_as(
    role: Role,
    file: &File,
) -> Result<(Version, SnapshotId, Vec<Section>), Error> {
    let metadata = file.metadata().map_err(Error::Read)?;
    if !metadata.is_file() {
        return Err(Error::NotAFile);
    }
    let has = metadata.len();
    // First what it is: a memory file is longer than a state may be, and that is not what is wrong with it.
    let beginning = read_exactly(file, has.min(HEADER as u64))?;
    identify(&beginning, role)?;
    if has > MAX_STATE {
        return Err(Error::TooLarge(has));
    }
    decode_as(role, &read_exactly(file, has)?)
}

/// The first `count` bytes, which the file had a moment ago.
fn read_exactly(file: &File, count: u64) -> Result<Vec<u8>, Error> {
    let length = usize::try_from(count).map_err(|_| Error::TooLarge(count))?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0).map_err(Error::Read)?;
    Ok(bytes)
}

/// The first 20 bytes of both files.
pub(super) fn preamble(role: Role) -> [u8; 20] {
    let mut bytes = [0; 20];
    let version = VERSION.major.to_le_bytes().into_iter();
    let version = version.chain(VERSION.minor.to_le_bytes());
    let all = MAGIC.into_iter().chain((role as u32).to_le_bytes());
    let all = all.chain(version).chain(ARCHITECTURE.to_le_bytes());
    for (place, byte) in bytes.iter_mut().zip(all) {
        *place = byte;
    }
    bytes
}

/// Checks what both files begin with, in the order in which one must know it to go on.
pub(super) fn identify(bytes: &[u8], role: Role) -> Result<Version, Error> {
    let known = bytes.iter().zip(&MAGIC).all(|(byte, magic)| byte == magic);
    if !known {
        return Err(Error::NoSnapshot);
    }
    let cut_off = || Error::CutOff {
        has: bytes.len() as u64,
        needs: (HEADER + CHECKSUM) as u64,
    };
    let number = u32_at(bytes, 8).ok_or_else(cut_off)?;
    if number != role as u32 {
        return Err(match role {
            Role::State if number == Role::Memory as u32 => Error::MemoryFile,
            _ => Error::NoSnapshot,
        });
    }
    let major = u16_at(bytes, 12).ok_or_else(cut_off)?;
    let minor = u16_at(bytes, 14).ok_or_else(cut_off)?;
    let version = Version { major, minor };
    match major.cmp(&VERSION.major) {
        std::cmp::Ordering::Greater => return Err(Error::Newer(version)),
        std::cmp::Ordering::Less => return Err(Error::Older(version)),
        std::cmp::Ordering::Equal => {}
    }
    match u32_at(bytes, 16).ok_or_else(cut_off)? {
        ARCHITECTURE => Ok(version),
        other => Err(Error::Architecture(other)),
    }
}

/// Where the table of so many sections ends.
fn table_end(sections: u64) -> u64 {
    sections
        .saturating_mul(ENTRY as u64)
        .saturating_add(HEADER as u64)
}

fn check_order(names: impl Iterator<Item = (u32, u32)>) -> Result<(), Error> {
    let mut last = None;
    for (position, (kind, index)) in (1_usize..).zip(names) {
        if last == Some((kind, index)) {
            return Err(Error::Twice {
                position,
                kind,
                index,
            });
        }
        if last > Some((kind, index)) {
            return Err(Error::Order {
                position,
                kind,
                index,
            });
        }
        last = Some((kind, index));
    }
    Ok(())
}

/// What is in the header but in no preamble.
struct Header {
    sections: u32,
    id: SnapshotId,
    length: u64,
}

impl Header {
    fn read(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            sections: u32_at(bytes, 20)?,
            id: id_at(bytes, 24)?,
            length: u64_at(bytes, 40)?,
        })
    }
}

/// A section in the table.
struct Entry {
    kind: u32,
    index: u32,
    version: u32,
    length: u64,
    checksum: u64,
}

impl Entry {
    fn read(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            kind: u32_at(bytes, 0)?,
            index: u32_at(bytes, 4)?,
            version: u32_at(bytes, 8)?,
            length: u64_at(bytes, 12)?,
            checksum: u64_at(bytes, 20)?,
        })
    }
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    array_at(bytes, offset).map(u16::from_le_bytes)
}

pub(super) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array_at(bytes, offset).map(u32::from_le_bytes)
}

pub(super) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    array_at(bytes, offset).map(u64::from_le_bytes)
}

pub(super) fn id_at(bytes: &[u8], offset: usize) -> Option<SnapshotId> {
    array_at(bytes, offset).map(SnapshotId::from_bytes)
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;

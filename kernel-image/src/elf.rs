//! The kernel's ELF file: which bytes go where (ELF-64 Object File Format, x86-64 psABI).

use crate::Error;
use crate::source::ReadAt;

/// First bytes of every ELF file.
pub(crate) const MAGIC: [u8; 4] = *b"\x7fELF";
const HEADER_SIZE: u64 = 64;
const PROGRAM_HEADER_SIZE: u64 = 56;
const SECTION_HEADER_SIZE: u64 = 64;
/// A Linux kernel has about five; many more are no kernel but an attack on whoever walks them.
const MAX_PROGRAM_HEADERS: u16 = 64;

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const SHT_NOBITS: u32 = 8;

/// A loadable segment. Its file range lies inside the file, and neither of its address ranges wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where its bytes are in the file.
    pub file: FileRange,
    /// Physical address that it was linked for.
    pub physical: u64,
    /// Virtual address that it was linked for.
    pub virtual_: u64,
    /// Size in memory in bytes, at least that in the file; the rest is zero.
    pub memory_size: u64,
}

/// A range of bytes that lies inside the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRange {
    /// Offset of the first byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// The headers of an ELF file, checked against the file's size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// Entry point; in a Linux kernel a physical address.
    pub entry: u64,
    /// What to load, in the order of the file; none of them is empty.
    pub segments: Vec<Segment>,
    /// Segments of notes.
    pub notes: Vec<FileRange>,
    /// End of everything that the headers name: what follows in the file was appended.
    pub end: u64,
}

/// Checks that these are the first bytes of a 64-bit little-endian x86-64 program.
pub(crate) fn check_identity(header: &[u8; HEADER_SIZE as usize]) -> Result<(), Error> {
    let word = |offset| u16::from_le_bytes(field(header, offset));
    if field(header, 0) != MAGIC {
        return Err(Error::BadElf("it has no ELF magic"));
    }
    if field(header, 4) != [CLASS_64] {
        return Err(Error::BadElf("it is not a 64-bit file"));
    }
    if field(header, 5) != [LITTLE_ENDIAN] {
        return Err(Error::BadElf("it is not little-endian"));
    }
    if !matches!(word(16), ET_EXEC | ET_DYN) {
        return Err(Error::BadElf("it is not an executable"));
    }
    if word(18) != EM_X86_64 {
        return Err(Error::BadElf("it is not for x86-64"));
    }
    Ok(())
}

impl Elf {
    /// Reads and checks the headers.
    ///
    /// # Errors
    /// [`Error::BadElf`] and [`Error::Truncated`] say what is wrong.
    pub fn parse(source: &(impl ReadAt + ?Sized)) -> Result<Self, Error> {
        let size = source.size().map_err(Error::Read)?;
        let header: [u8; HEADER_SIZE as usize] = source.array_at(0)?;
        check_identity(&header)?;
        let count = u16::from_le_bytes(field(&header, 56));
        if u64::from(u16::from_le_bytes(field(&header, 54))) != PROGRAM_HEADER_SIZE {
            return Err(Error::BadElf("its program headers have an odd size"));
        }
        if count == 0 {
            return Err(Error::BadElf("it has no program headers"));
        }
        if count > MAX_PROGRAM_HEADERS {
            return Err(Error::BadElf("it has too many program headers"));
        }
        let table = file_range(
            u64::from_le_bytes(field(&header, 32)),
            u64::from(count) * PROGRAM_HEADER_SIZE,
            size,
        )?;
        let mut elf = Self {
            entry: u64::from_le_bytes(field(&header, 24)),
            segments: Vec::new(),
            notes: Vec::new(),
            end: HEADER_SIZE.max(table.end()),
        };
        for index in 0..u64::from(count) {
            let offset = table.offset + index * PROGRAM_HEADER_SIZE;
            elf.add_program_header(&source.array_at(offset)?, size)?;
        }
        if elf.segments.is_empty() {
            return Err(Error::BadElf("it has nothing to load"));
        }
        elf.add_sections(source, &header, size)?;
        Ok(elf)
    }

    fn add_program_header(
        &mut self,
        header: &[u8; PROGRAM_HEADER_SIZE as usize],
        size: u64,
    ) -> Result<(), Error> {
        let long = |offset| u64::from_le_bytes(field(header, offset));
        let kind = u32::from_le_bytes(field(header, 0));
        if kind != PT_LOAD && kind != PT_NOTE {
            return Ok(());
        }
        let file = file_range(long(8), long(32), size)?;
        self.end = self.end.max(file.end());
        if kind == PT_NOTE {
            self.notes.push(file);
            return Ok(());
        }
        let segment = Segment {
            file,
            virtual_: long(16),
            physical: long(24),
            memory_size: long(40),
        };
        if segment.memory_size < file.length {
            return Err(Error::BadElf(
                "a segment is larger in the file than in memory",
            ));
        }
        if segment.physical.checked_add(segment.memory_size).is_none()
            || segment.virtual_.checked_add(segment.memory_size).is_none()
        {
            return Err(Error::BadElf("a segment wraps around the address space"));
        }
        if segment.memory_size > 0 {
            self.segments.push(segment);
        }
        Ok(())
    }

    /// Sections matter for one thing: where the file ends and what was appended begins.
    fn add_sections(
        &mut self,
        source: &(impl ReadAt + ?Sized),
        header: &[u8; HEADER_SIZE as usize],
        size: u64,
    ) -> Result<(), Error> {
        let offset = u64::from_le_bytes(field(header, 40));
        let count = u16::from_le_bytes(field(header, 60));
        if offset == 0 || count == 0 {
            return Ok(());
        }
        if u64::from(u16::from_le_bytes(field(header, 58))) != SECTION_HEADER_SIZE {
            return Err(Error::BadElf("its section headers have an odd size"));
        }
        let table = file_range(offset, u64::from(count) * SECTION_HEADER_SIZE, size)?;
        self.end = self.end.max(table.end());
        for index in 0..u64::from(count) {
            let section: [u8; SECTION_HEADER_SIZE as usize] =
                source.array_at(table.offset + index * SECTION_HEADER_SIZE)?;
            if u32::from_le_bytes(field(&section, 4)) == SHT_NOBITS {
                continue;
            }
            let range = file_range(
                u64::from_le_bytes(field(&section, 24)),
                u64::from_le_bytes(field(&section, 32)),
                size,
            )?;
            self.end = self.end.max(range.end());
        }
        Ok(())
    }

    /// The lowest physical address of a segment and the end of the highest.
    pub fn physical_span(&self) -> (u64, u64) {
        let start = self.segments.iter().map(|s| s.physical).min().unwrap_or(0);
        let ends = self.segments.iter().map(Segment::physical_end);
        (start, ends.max().unwrap_or(0))
    }
}

impl Segment {
    /// First physical address after the segment.
    pub fn physical_end(&self) -> u64 {
        // Checked not to wrap when it was parsed.
        self.physical.saturating_add(self.memory_size)
    }
}

impl FileRange {
    /// Offset of the first byte after the range.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// `N` bytes of `header` at `offset`. Offsets are constants of this file, inside the array.
fn field<const N: usize>(header: &[u8], offset: usize) -> [u8; N] {
    header
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

fn file_range(offset: u64, length: u64, size: u64) -> Result<FileRange, Error> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(FileRange { offset, length }),
        _ => Err(Error::Truncated { offset, length }),
    }
}

#[cfg(test)]
mod tests;

//! The relocations that Linux's build appends to a kernel's ELF file (arch/x86/tools/relocs.c).
//!
//! ```text
//! 0, places of 64-bit addresses …, 0, places of inverse 32-bit …, 0, places of 32-bit addresses …
//! ```
//!
//! Each is a 32-bit number, sign-extended to a link-time virtual address. The lists are read from
//! the end of the file backwards; each ends at its zero. Kernels since 6.15 have no inverse
//! list, which was for per-CPU data linked at address zero.

use crate::source::ReadAt;
use crate::{Elf, Error};

/// Virtual address that the kernel's link maps physical address 0 to (`__START_KERNEL_map`).
pub const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Debian's generic kernel has about 2 MiB of relocations.
const MAX_BYTES: u64 = 16 << 20;
const ENTRY: u64 = 4;

/// What is at a place and how it changes when the kernel moves up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelocationKind {
    /// A 32-bit address: the distance is added.
    Add32,
    /// A 32-bit distance from a fixed place to an address that moves: subtracted.
    Subtract32,
    /// A 64-bit address: the distance is added.
    Add64,
}

/// One place that changes when the kernel moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relocation {
    /// How.
    pub kind: RelocationKind,
    /// Physical address of the place, as linked. It and the bytes after it that change lie
    /// between the kernel's first and last loaded byte.
    pub physical: u64,
}

impl RelocationKind {
    /// Size of what changes, in bytes.
    pub fn width(self) -> u64 {
        match self {
            Self::Add32 | Self::Subtract32 => 4,
            Self::Add64 => 8,
        }
    }
}

/// The relocations of one kernel, all of them checked to lie inside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relocations {
    entries: Vec<Relocation>,
}

impl Relocations {
    /// Reads what follows the ELF file `elf` in `source`. `None` when nothing follows, or zeros only.
    ///
    /// # Errors
    /// [`Error::BadRelocations`] when what follows is something else,
    /// [`Error::RelocationOutOfBounds`] when one of them points outside the kernel.
    pub fn read(source: &(impl ReadAt + ?Sized), elf: &Elf) -> Result<Option<Self>, Error> {
        let size = source.size().map_err(Error::Read)?;
        let length = size.saturating_sub(elf.end);
        let bad = |reason| Error::BadRelocations { length, reason };
        if length > MAX_BYTES {
            return Err(bad("they would be more than 16 MiB"));
        }
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| bad("too many"))?];
        source
            .read_exact_at(&mut bytes, elf.end)
            .map_err(|error| Error::reading(error, elf.end, length))?;
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if length % ENTRY != 0 {
            return Err(bad("their size is no multiple of four"));
        }
        if words(&bytes).next() != Some(0) {
            return Err(bad("they do not begin with a zero"));
        }
        let lists = words(&bytes).filter(|word| *word == 0).count();
        let kinds: &[RelocationKind] = match lists {
            3 => &[
                RelocationKind::Add32,
                RelocationKind::Subtract32,
                RelocationKind::Add64,
            ],
            2 => &[RelocationKind::Add32, RelocationKind::Add64],
            _ => return Err(bad("they are not two or three lists")),
        };
        Self::collect(&bytes, kinds, elf).map(Some)
    }

    /// Sorts the words in `bytes`, from the last to the first, into the lists of `kinds`.
    fn collect(bytes: &[u8], kinds: &[RelocationKind], elf: &Elf) -> Result<Self, Error> {
        let (start, end) = elf.physical_span();
        let mut kinds = kinds.iter().copied();
        let mut kind = kinds.next();
        let mut entries = Vec::with_capacity(words(bytes).len());
        for (index, word) in words(bytes).rev().enumerate() {
            if word == 0 {
                kind = kinds.next();
                continue;
            }
            let Some(kind) = kind else { break };
            let address = i64::from(word).cast_unsigned();
            let physical = address
                .checked_sub(KERNEL_MAP)
                .filter(|place| *place >= start && place.saturating_add(kind.width()) <= end)
                .ok_or(Error::RelocationOutOfBounds { index, address })?;
            entries.push(Relocation { kind, physical });
        }
        Ok(Self { entries })
    }

    /// Every relocation, in the order in which the kernel's own stub applies them.
    pub fn iter(&self) -> impl Iterator<Item = Relocation> + '_ {
        self.entries.iter().copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

fn words(bytes: &[u8]) -> impl DoubleEndedIterator<Item = i32> + ExactSizeIterator {
    let (words, _) = bytes.as_chunks();
    words.iter().map(|word| i32::from_le_bytes(*word))
}

#[cfg(test)]
mod tests;

//! The memory file: how much of it is a guest's memory, and its pages.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::uio::pread;

use super::Error;

/// What memory comes in.
pub const PAGE: usize = 4096;
/// Most regions that the last page has room for.
const MAX_REGIONS: u32 = 250;

/// Why a file is not served.
#[derive(Debug, PartialEq, Eq)]
pub struct NotMemory(&'static str);

impl NotMemory {
    /// The same with the file's name.
    pub fn of(self, path: &Path) -> Error {
        Error::NotMemory {
            path: path.to_owned(),
            why: self.0,
        }
    }
}

/// A memory file that is served.
#[derive(Debug)]
pub struct Source {
    file: File,
    ram: u64,
}

/// Opens the file; nothing of it is read.
pub fn open(path: &Path) -> Result<(File, u64), Error> {
    let failed = |source| Error::Open {
        path: path.to_owned(),
        source,
    };
    // A pipe must be refused, not waited for.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = file.map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(NotMemory("it is not a regular file").of(path));
    }
    Ok((file, metadata.len()))
}

impl Source {
    /// Looks how much of the file, which is so long, is memory: of Casemate's, what its last page says
    /// (docs/snapshot-format.md), of others all.
    pub fn read((file, len): (File, u64)) -> Result<Self, NotMemory> {
        const UNREADABLE: NotMemory = NotMemory("its last page cannot be read");
        let mut page = [0; PAGE];
        let before = len.checked_sub(PAGE as u64);
        let before = before.ok_or(NotMemory("it is shorter than a page"))?;
        let offset = i64::try_from(before).map_err(|_| UNREADABLE)?;
        let count = pread(&file, &mut page, offset).map_err(|_| UNREADABLE)?;
        if count != PAGE {
            return Err(UNREADABLE);
        }
        let ram = match trailer(&page)? {
            // Differences have bitmaps between them; all of the memory has nothing there.
            Some(ram) if ram == before => ram,
            Some(_) => return Err(NotMemory("it is cut off, or something was appended")),
            None if len.is_multiple_of(PAGE as u64) => len,
            None => {
                return Err(NotMemory(
                    "it is no memory file: its length is not whole pages",
                ));
            }
        };
        Ok(Self { file, ram })
    }

    /// How many bytes of it are memory: whole pages.
    pub fn ram(&self) -> u64 {
        self.ram
    }

    /// Reads the page at `offset`, of which [`Source::ram`] has all.
    pub fn page(&self, offset: u64, page: &mut [u8; PAGE]) -> Result<(), Error> {
        let place = i64::try_from(offset).map_err(|_| Error::CutOff(offset))?;
        let mut read = 0;
        while let Some(rest) = page.get_mut(read..).filter(|rest| !rest.is_empty()) {
            let at = place.saturating_add(i64::try_from(read).unwrap_or(0));
            match pread(&self.file, rest, at) {
                Ok(0) => return Err(Error::CutOff(offset.saturating_add(PAGE as u64))),
                Ok(count) => read = read.saturating_add(count),
                Err(Errno::EINTR) => {}
                Err(source) => return Err(Error::Read { offset, source }),
            }
        }
        Ok(())
    }
}

/// Bytes of memory before a page that ends one of our files; none if the page ends another kind of file.
fn trailer(page: &[u8; PAGE]) -> Result<Option<u64>, NotMemory> {
    let u32_at = |at: usize| {
        let bytes = page.get(at..at.saturating_add(4));
        bytes
            .and_then(|b| b.try_into().ok())
            .map(u32::from_le_bytes)
    };
    let u64_at = |at: usize| {
        let bytes = page.get(at..at.saturating_add(8));
        bytes
            .and_then(|b| b.try_into().ok())
            .map(u64::from_le_bytes)
    };
    if !page.starts_with(b"CASEMATE") || u32_at(8) != Some(2) {
        return Ok(None);
    }
    if u32_at(56) != Some(0) {
        return Err(NotMemory(
            "it holds only what has changed since another snapshot: merge it into that one's memory file first",
        ));
    }
    let damaged = NotMemory("its last page is damaged");
    let count = u32_at(20).filter(|count| (1..=MAX_REGIONS).contains(count));
    let Some(count) = count else {
        return Err(damaged);
    };
    // From byte 88 on, address and length of each region.
    let mut places = (96_usize..).step_by(16).take(count as usize);
    let total = places.try_fold(0_u64, |sum, at| sum.checked_add(u64_at(at)?));
    match total {
        Some(total) if total.is_multiple_of(PAGE as u64) => Ok(Some(total)),
        _ => Err(damaged),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    fn read(pages: u64, trailer: Option<&[u8]>) -> Result<u64, NotMemory> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages * 4096).unwrap();
        if let Some(trailer) = trailer {
            file.write_all_at(trailer, (pages - 1) * 4096).unwrap();
        }
        Source::read((file, pages * 4096)).map(|source| source.ram())
    }

    fn ours(differences: u32, lengths: &[u64]) -> Vec<u8> {
        let mut page = vec![0; 4096];
        page[..8].copy_from_slice(b"CASEMATE");
        page[8] = 2;
        page[20..24].copy_from_slice(&(lengths.len() as u32).to_le_bytes());
        page[56..60].copy_from_slice(&differences.to_le_bytes());
        for (at, length) in (96..).step_by(16).zip(lengths) {
            if at + 8 <= 4096 {
                page[at..at + 8].copy_from_slice(&length.to_le_bytes());
            }
        }
        page
    }

    #[test]
    fn the_last_page_says_how_much_is_memory() {
        assert_eq!(read(3, Some(&ours(0, &[4096, 4096]))), Ok(8192));
        // Firecracker's have none.
        assert_eq!(read(3, None), Ok(3 * 4096));
        for (pages, trailer, words) in [
            (3, ours(1, &[4096, 4096]), "merge it"),
            (3, ours(0, &[4096]), "cut off"),
            (3, ours(0, &[4096, 8192]), "cut off"),
            (3, ours(0, &[]), "damaged"),
            (3, ours(0, &[4095, 4097, 1]), "damaged"),
            (3, ours(0, &[u64::MAX, 4096]), "damaged"),
            (3, ours(0, &vec![4096; 300]), "damaged"),
        ] {
            let NotMemory(why) = read(pages, Some(&trailer)).unwrap_err();
            assert!(why.contains(words), "{words}: {why}");
        }
    }

    #[test]
    fn a_file_that_is_cut_off_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        file.write_all_at(&[7; 4096], 4096).unwrap();
        let source = Source::read((file.try_clone().unwrap(), 8192)).unwrap();
        let mut page = [0; PAGE];
        source.page(4096, &mut page).unwrap();
        assert_eq!(page, [7; PAGE]);
        file.set_len(4100).unwrap();
        assert!(matches!(
            source.page(4096, &mut page),
            Err(Error::CutOff(8192))
        ));
    }
}

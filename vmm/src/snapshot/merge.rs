//! Puts differences into the memory file that they are against.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::SnapshotId;
use super::memory::{Error, PAGE, ZEROES, bitmap, page_checksum, trailer, verify};
use super::trailer::{SIZE, Trailer};

/// Makes `base`, a file of all of the memory, that of the snapshot whose differences are in `diff`, and says which
/// snapshot that is.
///
/// A merge that ends half way leaves a file that nobody takes for a whole one, and that nothing makes whole
/// again: work on a copy, or be sure of the host.
///
/// # Errors
/// When the files do not belong together or are damaged, with nothing done; or when the host refuses.
pub fn merge(base: &File, diff: &File) -> Result<SnapshotId, Error> {
    let changes = verify(diff)?;
    let against = changes.base.ok_or(Error::NoDifferences(changes.id))?;
    let mut whole = trailer(base)?;
    if let Some(other) = whole.base {
        return Err(Error::Differences(other));
    }
    if whole.id != against {
        return Err(Error::OtherBase {
            expected: against,
            found: whole.id,
        });
    }
    if whole.regions != changes.regions {
        return Err(Error::OtherRegions {
            expected: changes.regions,
            found: whole.regions,
        });
    }
    let dirty = bitmap(diff, &changes)?;
    let end = whole.ram();
    // First of all, and on the disk first: from here on it is neither the one nor the other.
    write(base, end, &[0; SIZE])?;
    base.sync_data().map_err(failed(end))?;
    for number in numbers(&changes, &dirty) {
        copy(number, base, diff, &mut whole)?;
    }
    whole.id = changes.id;
    whole.version = changes.version;
    write(base, end, &whole.encode())?;
    Ok(whole.id)
}

/// Numbers in the file of the pages whose bit is set.
fn numbers(trailer: &Trailer, dirty: &[Vec<u64>]) -> impl Iterator<Item = u64> {
    let mut next = 0_u64;
    let regions = trailer.regions.iter().map(move |(_, length)| {
        let start = next;
        next = next.saturating_add(length / PAGE);
        start..next
    });
    regions.zip(dirty).flat_map(|(region, words)| {
        let words = region.clone().step_by(u64::BITS as usize).zip(words);
        let numbers = words.flat_map(|(first, word)| {
            let bits = (0..u64::BITS).filter(move |bit| word >> bit & 1 == 1);
            bits.map(move |bit| first.saturating_add(bit.into()))
        });
        // Bits of no page are none.
        numbers.filter(move |number| region.contains(number))
    })
}

/// Takes a page over, and keeps the sums right.
fn copy(number: u64, base: &File, diff: &File, whole: &mut Trailer) -> Result<(), Error> {
    let offset = number.saturating_mul(PAGE);
    let (mut old, mut new) = ([0; SIZE], [0; SIZE]);
    for (file, page) in [(base, &mut old), (diff, &mut new)] {
        file.read_exact_at(page, offset)
            .map_err(|source| Error::Read { offset, source })?;
    }
    if old != ZEROES {
        whole.pages = whole.pages.saturating_sub(1);
        whole.contents = whole.contents.wrapping_sub(page_checksum(number, &old));
    }
    if new != ZEROES {
        whole.pages = whole.pages.saturating_add(1);
        whole.contents = whole.contents.wrapping_add(page_checksum(number, &new));
        return write(base, offset, &new);
    }
    if old != ZEROES {
        return erase(base, offset);
    }
    Ok(())
}

/// Makes a page a hole; where the file system has none, zeroes.
fn erase(file: &File, offset: u64) -> Result<(), Error> {
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let at = i64::try_from(offset).map_err(|_| failed(offset)(Errno::EFBIG.into()))?;
    match fallocate(file, hole, at, SIZE as i64) {
        Ok(()) => Ok(()),
        Err(Errno::EOPNOTSUPP) => write(file, offset, &ZEROES),
        Err(error) => Err(failed(offset)(error.into())),
    }
}

fn write(file: &File, offset: u64, bytes: &[u8]) -> Result<(), Error> {
    file.write_all_at(bytes, offset).map_err(failed(offset))
}

fn failed(offset: u64) -> impl Fn(io::Error) -> Error {
    move |source| Error::Write { offset, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

    use super::*;
    use crate::memory::touched::Untouched;
    use crate::memory::{GuestMemory, Options, allocate_regions, dirty};
    use crate::snapshot::memory::{check, write as save, write_diff};

    const REGIONS: [(u64, u64); 2] = [(0, 130 * PAGE), (4 << 30, 70 * PAGE)];
    const IDS: [SnapshotId; 3] = [
        SnapshotId::from_bytes([1; 16]),
        SnapshotId::from_bytes([2; 16]),
        SnapshotId::from_bytes([3; 16]),
    ];

    fn machine() -> GuestMemory {
        let options = Options {
            track_dirty_pages: true,
            ..Options::default()
        };
        allocate_regions(&REGIONS, options).unwrap()
    }

    fn poke(memory: &GuestMemory, page: u64, byte: u8) {
        let address = match page.checked_sub(130) {
            None => page * PAGE,
            Some(high) => (4 << 30) + high * PAGE,
        };
        let bytes = [byte; PAGE as usize];
        memory.write_slice(&bytes, GuestAddress(address)).unwrap();
    }

    fn whole(memory: &GuestMemory, id: SnapshotId) -> File {
        let file = tempfile::tempfile().unwrap();
        save(memory, Untouched::Mapped, &file, id).unwrap();
        file
    }

    /// What has changed since the last time.
    fn changes(memory: &GuestMemory, id: SnapshotId, base: SnapshotId) -> File {
        let dirty: Vec<_> = memory.iter().map(|each| dirty::of(each).take()).collect();
        let file = tempfile::tempfile().unwrap();
        write_diff(memory, Untouched::Mapped, &file, id, base, &dirty).unwrap();
        file
    }

    /// Whether both files say the same of themselves, and it is true.
    fn same(one: &File, other: &File) -> bool {
        verify(one).unwrap() == verify(other).unwrap()
    }

    #[test]
    fn differences_make_the_later_memory() {
        let memory = machine();
        for page in [0, 1, 64, 129, 130, 199] {
            poke(&memory, page, 7);
        }
        let base = whole(&memory, IDS[0]);
        let blocks = base.metadata().unwrap().blocks();
        memory
            .iter()
            .for_each(|region| drop(dirty::of(region).take()));
        poke(&memory, 0, 0); // a hole now
        poke(&memory, 1, 8);
        poke(&memory, 65, 9);
        poke(&memory, 66, 0); // as before
        poke(&memory, 199, 7); // as before
        let first = changes(&memory, IDS[1], IDS[0]);
        poke(&memory, 65, 0);
        poke(&memory, 130, 0);
        poke(&memory, 198, 1);
        let second = changes(&memory, IDS[2], IDS[1]);
        assert_eq!(merge(&base, &first).unwrap(), IDS[1]);
        assert_eq!(merge(&base, &second).unwrap(), IDS[2]);
        assert!(same(&base, &whole(&memory, IDS[2])));
        check(&base, IDS[2], &REGIONS).unwrap();
        assert!(base.metadata().unwrap().blocks() <= blocks);
    }

    #[test]
    fn files_that_do_not_belong_together_stay_as_they_are() {
        let memory = machine();
        poke(&memory, 3, 7);
        let base = whole(&memory, IDS[0]);
        let diff = changes(&memory, IDS[2], IDS[1]);
        let small = GuestMemory::from_ranges(&[(GuestAddress(0), 8192)]).unwrap();
        let smaller = tempfile::tempfile().unwrap();
        let bits = [vec![3]];
        write_diff(&small, Untouched::Mapped, &smaller, IDS[1], IDS[0], &bits).unwrap();
        let before = verify(&base).unwrap();
        for (diff, expected) in [
            (&diff, "is against that of snapshot 0202"),
            (&base, "holds all of the memory"),
            (&smaller, "0x2000 bytes at 0x0"),
        ] {
            let error = merge(&base, diff).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = merge(&diff, &smaller).unwrap_err();
        assert!(matches!(error, Error::Differences(_)), "{error}");
        // A page of the differences that is not what was written.
        let diff = changes(&memory, IDS[1], IDS[0]);
        diff.write_all_at(&[1], 9 * PAGE).unwrap();
        assert!(matches!(merge(&base, &diff), Err(Error::Contents(_))));
        assert_eq!(verify(&base).unwrap(), before);
    }

    #[test]
    fn half_a_merge_is_nothing() {
        let memory = machine();
        let base = whole(&memory, IDS[0]);
        poke(&memory, 5, 1);
        let diff = changes(&memory, IDS[1], IDS[0]);
        // May be read, and is written to.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&base));
        let read_only = File::open(path).unwrap();
        assert!(matches!(merge(&read_only, &diff), Err(Error::Write { .. })));
        check(&base, IDS[0], &REGIONS).unwrap();
        // As if it had ended with the first page.
        write(&base, verify(&base).unwrap().ram(), &[0; SIZE]).unwrap();
        assert!(matches!(trailer(&base), Err(Error::NoTrailer)));
        assert!(merge(&base, &diff).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn any_differences_make_the_later_memory(
            before in proptest::collection::vec((0..200_u64, any::<u8>()), 0..20),
            after in proptest::collection::vec((0..200_u64, 0..3_u8), 0..20),
        ) {
            let memory = machine();
            before.iter().for_each(|(page, byte)| poke(&memory, *page, *byte));
            let base = whole(&memory, IDS[0]);
            after.iter().for_each(|(page, byte)| poke(&memory, *page, *byte));
            merge(&base, &changes(&memory, IDS[1], IDS[0])).unwrap();
            prop_assert!(same(&base, &whole(&memory, IDS[1])));
        }
    }
}

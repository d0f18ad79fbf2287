//! Puts a snapshot's memory file and what has changed since together.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::SnapshotId;
use super::memory::{Error, PAGE, bitmap, page_checksum, pages, trailer, verify};
use super::trailer::Trailer;
use super::writer::set_length;
use crate::memory::dirty;

/// Makes `new` the memory file of the snapshot whose differences are in `diff`, from `base`, all of the memory that they are
/// against, and says which snapshot that is. What was in `new` is gone.
///
/// # Errors
/// When the files do not belong together or are damaged, or when the host refuses. `new` is no memory file then.
pub fn merge(base: &File, diff: &File, new: &File) -> Result<SnapshotId, Error> {
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
    set_length(new, 0)?;
    set_length(new, whole.file_size())?;
    let mut changed = Changed::new(&changes, &dirty);
    pages(base, 0, end, |number, page| {
        if !changed.has(number) {
            return write(new, number, page);
        }
        // So a page of the base that is not what was written still shows in the sum.
        whole.pages = whole.pages.saturating_sub(1);
        whole.contents = whole.contents.wrapping_sub(page_checksum(number, page));
        Ok(())
    })?;
    let mut changed = Changed::new(&changes, &dirty);
    pages(diff, 0, end, |number, page| {
        if !changed.has(number) {
            return Ok(());
        }
        whole.pages = whole.pages.saturating_add(1);
        whole.contents = whole.contents.wrapping_add(page_checksum(number, page));
        write(new, number, page)
    })?;
    whole.id = changes.id;
    whole.version = changes.version;
    write(new, end / PAGE, &whole.encode())?;
    Ok(whole.id)
}

/// Numbers in the file of the pages whose bit is set, to be asked for in ascending order.
struct Changed<I: Iterator<Item = u64>>(std::iter::Peekable<I>);

impl<'a> Changed<Box<dyn Iterator<Item = u64> + 'a>> {
    fn new(trailer: &'a Trailer, dirty: &'a [Vec<u64>]) -> Self {
        let numbers: Box<dyn Iterator<Item = u64>> = Box::new(numbers(trailer, dirty));
        Self(numbers.peekable())
    }

    fn has(&mut self, number: u64) -> bool {
        while self.0.next_if(|next| *next < number).is_some() {}
        self.0.next_if_eq(&number).is_some()
    }
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
        let numbers = words.flat_map(|(first, word)| dirty::numbers(first, *word));
        // Bits of no page are none.
        numbers.filter(move |number| region.contains(number))
    })
}

fn write(file: &File, number: u64, bytes: &[u8]) -> Result<(), Error> {
    let offset = number.saturating_mul(PAGE);
    let failed = |source: io::Error| Error::Write { offset, source };
    file.write_all_at(bytes, offset).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::memory::touched::Untouched;
    use crate::memory::{GuestMemory, Options, allocate_regions};
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
        let dirty = dirty::take_all(memory);
        let file = tempfile::tempfile().unwrap();
        write_diff(memory, Untouched::Mapped, &file, id, base, &dirty).unwrap();
        file
    }

    fn merged(base: &File, diff: &File) -> Result<(File, SnapshotId), Error> {
        let new = tempfile::tempfile().unwrap();
        new.write_all_at(&[9; 9000], 0).unwrap(); // gone
        merge(base, diff, &new).map(|id| (new, id))
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
        dirty::take_all(&memory);
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
        let (later, id) = merged(&base, &first).unwrap();
        assert_eq!(id, IDS[1]);
        let (latest, id) = merged(&later, &second).unwrap();
        assert_eq!(id, IDS[2]);
        assert!(same(&latest, &whole(&memory, IDS[2])));
        check(&latest, IDS[2], &REGIONS).unwrap();
        check(&base, IDS[0], &REGIONS).unwrap();
        assert!(latest.metadata().unwrap().blocks() <= blocks);
    }

    #[test]
    fn files_that_do_not_belong_together_are_refused() {
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
            let error = merged(&base, diff).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = merged(&diff, &smaller).unwrap_err();
        assert!(matches!(error, Error::Differences(_)), "{error}");
        // A page of the differences that is not what was written.
        let diff = changes(&memory, IDS[1], IDS[0]);
        diff.write_all_at(&[1], 9 * PAGE).unwrap();
        assert!(matches!(merged(&base, &diff), Err(Error::Contents(_))));
        assert_eq!(verify(&base).unwrap(), before);
    }

    #[test]
    fn half_a_merge_is_nothing() {
        let memory = machine();
        let base = whole(&memory, IDS[0]);
        let diff = changes(&memory, IDS[1], IDS[0]);
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert!(merge(&base, &diff, &full).is_err());
        // Of a base that is damaged too, it shows.
        poke(&memory, 5, 1);
        let base = whole(&memory, IDS[0]);
        dirty::take_all(&memory);
        poke(&memory, 5, 2);
        let diff = changes(&memory, IDS[1], IDS[0]);
        base.write_all_at(&[7], 5 * PAGE).unwrap();
        let (new, _) = merged(&base, &diff).unwrap();
        assert!(matches!(verify(&new), Err(Error::Contents(_))));
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
            let (new, _) = merged(&base, &changes(&memory, IDS[1], IDS[0])).unwrap();
            prop_assert!(same(&new, &whole(&memory, IDS[1])));
        }
    }
}

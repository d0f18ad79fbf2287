use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::Arc;

use super::tests::{HIGH, ID, MIB, OTHER, REGIONS, contents, fill, machine, poke, refused, saved};
use super::{PAGE, bitmap, map, trailer, verify, write_diff};
use crate::memory::touched::Untouched;
use crate::memory::{Options, allocate_regions};

/// Words of a bitmap for each of [`REGIONS`].
fn bits(low: &[u64], high: &[u64]) -> Vec<Vec<u64>> {
    let bitmap = |pages: &[u64], words: usize| {
        let mut bitmap = vec![0; words];
        for page in pages {
            bitmap[*page as usize / 64] |= 1 << (page % 64);
        }
        bitmap
    };
    vec![bitmap(low, 16), bitmap(high, 8)]
}

#[test]
fn differences_are_the_pages_that_have_changed() {
    let memory = machine(Options::default());
    fill(&memory);
    let (base, _) = saved(&memory);
    poke(&memory, 0, &[0; 5]); // is zero now
    poke(&memory, 70 * PAGE, b"new");
    poke(&memory, HIGH, b"HIGH");
    poke(&memory, 2 * MIB, b"not told");
    let dirty = bits(&[0, 70, 71], &[0, 511]);
    let file = Arc::new(tempfile::tempfile().unwrap());
    let written = write_diff(&memory, Untouched::Mapped, &file, OTHER, ID, &dirty).unwrap();
    // Page 511 of the other region is as it was.
    assert_eq!((written.ram, written.pages), (6 * MIB, 3));
    let found = verify(&file).unwrap();
    assert_eq!((found.id, found.base), (OTHER, Some(ID)));
    assert_eq!(bitmap(&file, &found).unwrap(), dirty);
    assert_eq!(file.metadata().unwrap().len(), 6 * MIB + 2 * PAGE);
    assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
    let error = refused(&file, OTHER, &REGIONS);
    assert!(error.contains(&format!("since snapshot {ID}")), "{error}");
    assert!(bitmap(&base, &trailer(&base).unwrap()).unwrap().is_empty());
    // Put over the base they are the memory.
    poke(&memory, 2 * MIB, &[0; 8]);
    let mut page = [0; PAGE as usize];
    for number in [0, 70, 71, 1024, 1535] {
        file.read_exact_at(&mut page, number * PAGE).unwrap();
        base.write_all_at(&page, number * PAGE).unwrap();
    }
    let merged = map(&base, &REGIONS, Options::default()).unwrap();
    assert!(contents(&merged) == contents(&memory));
}

#[test]
fn no_bit_of_the_bitmap_may_be_another() {
    let memory = machine(Options::default());
    let file = tempfile::tempfile().unwrap();
    let dirty = bits(&[3], &[]);
    write_diff(&memory, Untouched::Mapped, &file, OTHER, ID, &dirty).unwrap();
    for offset in 6 * MIB..6 * MIB + PAGE {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
        let error = verify(&file).unwrap_err().to_string();
        assert!(error.contains("its bitmap"), "{error}");
        file.write_all_at(&byte, offset).unwrap();
    }
    verify(&file).unwrap();
}

#[test]
fn bitmaps_fit_to_their_regions() {
    let regions = [(0, 65 * PAGE)];
    let memory = allocate_regions(&regions, Options::default()).unwrap();
    poke(&memory, 64 * PAGE, b"x");
    let file = tempfile::tempfile().unwrap();
    let diff = |dirty: &[Vec<u64>]| write_diff(&memory, Untouched::Mapped, &file, OTHER, ID, dirty);
    for wrong in [
        &[][..],
        &[vec![]],
        &[vec![0]],
        &[vec![0; 3]],
        &[vec![0; 2], vec![0; 2]],
    ] {
        assert!(diff(wrong).is_err(), "{wrong:?}");
    }
    // Bits of pages that are none are left out.
    assert_eq!(diff(&[vec![u64::MAX; 2]]).unwrap().pages, 1);
    let found = trailer(&file).unwrap();
    assert_eq!(bitmap(&file, &found).unwrap(), [vec![u64::MAX, 1]]);
}

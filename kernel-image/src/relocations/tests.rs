use proptest::prelude::*;

use super::*;
use crate::testing;

/// Link-time virtual address of the kernel's byte `offset`, as a list has it.
fn place(offset: i32) -> i32 {
    0x8100_0000_u32.cast_signed() + offset
}

fn read(lists: &[i32]) -> Result<Option<Relocations>, Error> {
    let mut file = testing::elf(&[0; 64], 128);
    let elf = Elf::parse(file.as_slice()).unwrap();
    for word in lists {
        file.extend(word.to_le_bytes());
    }
    Relocations::read(file.as_slice(), &elf)
}

#[test]
fn three_lists_backwards() {
    let lists = [0, place(0), place(8), 0, place(16), 0, place(20), place(24)];
    let found: Vec<_> = read(&lists).unwrap().unwrap().iter().collect();
    let expected = [
        (RelocationKind::Add32, 24),
        (RelocationKind::Add32, 20),
        (RelocationKind::Subtract32, 16),
        (RelocationKind::Add64, 8),
        (RelocationKind::Add64, 0),
    ]
    .map(|(kind, offset)| Relocation {
        kind,
        physical: 0x100_0000 + offset,
    });
    assert_eq!(found, expected);
}

#[test]
fn two_lists_without_inverse() {
    let found: Vec<_> = read(&[0, place(0), 0, place(20)])
        .unwrap()
        .unwrap()
        .iter()
        .collect();
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].kind, RelocationKind::Add32);
    assert_eq!(found[1].kind, RelocationKind::Add64);
}

#[test]
fn empty_lists_and_padding_are_none() {
    assert_eq!(read(&[]).unwrap(), None);
    assert_eq!(read(&[0, 0, 0]).unwrap(), None);
    assert_eq!(read(&[0; 100]).unwrap(), None);
}

#[test]
fn other_tails_are_refused() {
    for tail in [
        &[1][..],
        &[place(0), 0, 0],
        &[0, 1, 0, 0, 0],
        &[0, place(0)],
    ] {
        let error = read(tail).unwrap_err();
        assert!(matches!(error, Error::BadRelocations { .. }), "{error}");
    }
}

#[test]
fn a_tail_that_is_too_long_is_refused_unread() {
    let mut file = testing::elf(&[0; 64], 128);
    let elf = Elf::parse(file.as_slice()).unwrap();
    file.resize(file.len() + 16 * 1024 * 1024 + 4, 0);
    let error = Relocations::read(file.as_slice(), &elf).unwrap_err();
    assert!(matches!(error, Error::BadRelocations { .. }), "{error}");
}

#[test]
fn places_outside_the_kernel_are_refused() {
    // Before it, past it, straddling its end by one byte (8-byte and 4-byte), not a kernel address.
    for (list, word) in [
        (1, place(-1)),
        (1, place(128)),
        (1, place(121)),
        (4, place(125)),
        (4, 0x1000),
        (4, i32::MIN),
        (4, -1),
    ] {
        let mut lists = vec![0, place(0), 0, 0, place(8)];
        lists[list] = word;
        let error = read(&lists).unwrap_err();
        assert!(
            matches!(error, Error::RelocationOutOfBounds { .. }),
            "{error}"
        );
    }
    assert!(read(&[0, place(120), 0, 0, place(124)]).is_ok());
}

proptest! {
    #[test]
    fn any_tail_is_bounded(words in prop::collection::vec(
        prop_oneof![Just(0), 0_i32..140, any::<i32>()], 0..64)
    ) {
        let words: Vec<i32> = words
            .into_iter()
            .map(|word| if (1..140).contains(&word) { place(word) } else { word })
            .collect();
        if let Ok(Some(relocations)) = read(&words) {
            for relocation in relocations.iter() {
                prop_assert!(relocation.physical >= 0x100_0000);
                prop_assert!(relocation.physical + relocation.kind.width() <= 0x100_0080);
            }
        }
    }
}

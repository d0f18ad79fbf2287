use proptest::prelude::*;

use super::*;
use crate::testing;

fn reason(file: &[u8]) -> String {
    Elf::parse(file).unwrap_err().to_string()
}

fn patched(patches: &[(usize, &[u8])]) -> Vec<u8> {
    let mut file = testing::elf(&[0x90; 32], 64);
    for (offset, bytes) in patches {
        file[*offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    file
}

#[test]
fn reads_segments() {
    let elf = Elf::parse(patched(&[]).as_slice()).unwrap();
    assert_eq!(elf.entry, 0x100_0000);
    assert_eq!(elf.segments.len(), 1);
    assert_eq!(elf.segments[0].file.length, 32);
    assert_eq!(elf.physical_span(), (0x100_0000, 0x100_0040));
    assert_eq!(elf.end, 152);
}

#[test]
fn every_truncation_is_refused() {
    let file = patched(&[]);
    for length in 0..file.len() {
        assert!(Elf::parse(&file[..length]).is_err(), "{length} bytes");
    }
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let long = |value: u64| value.to_le_bytes();
    assert!(reason(&patched(&[(4, &[1])])).contains("64-bit"));
    assert!(reason(&patched(&[(5, &[2])])).contains("little-endian"));
    assert!(reason(&patched(&[(16, &[1, 0])])).contains("executable"));
    assert!(reason(&patched(&[(18, &[183, 0])])).contains("x86-64"));
    assert!(reason(&patched(&[(56, &[0xff, 0xff])])).contains("too many"));
    assert!(reason(&patched(&[(56, &[0, 0])])).contains("no program headers"));
    assert!(reason(&patched(&[(32, &long(u64::MAX))])).contains("truncated"));
    // p_offset, p_filesz, p_paddr, p_memsz of the only program header.
    assert!(reason(&patched(&[(72, &long(u64::MAX))])).contains("truncated"));
    assert!(reason(&patched(&[(96, &long(33)), (104, &long(99))])).contains("truncated"));
    assert!(reason(&patched(&[(104, &long(31))])).contains("larger in the file"));
    assert!(reason(&patched(&[(88, &long(u64::MAX - 8))])).contains("wraps"));
    assert!(reason(&patched(&[(104, &long(u64::MAX))])).contains("wraps"));
    assert!(reason(&patched(&[(64, &[9])])).contains("nothing to load"));
    // Section headers: 65535 of them past the end of the file, or of an odd size.
    assert!(reason(&patched(&[(40, &long(64)), (60, &[0xff, 0xff])])).contains("truncated"));
    assert!(
        reason(&patched(&[(40, &long(64)), (58, &[1, 0]), (60, &[1, 0])])).contains("odd size")
    );
}

proptest! {
    #[test]
    fn no_header_panics(
        patches in prop::collection::vec((0_usize..120, any::<u8>()), 0..40),
        tail in 0_usize..64,
    ) {
        let mut file = testing::elf(&[0x90; 32], 64);
        file.extend(std::iter::repeat_n(0xff, tail));
        for (offset, value) in patches {
            file[offset] = value;
        }
        if let Ok(elf) = Elf::parse(file.as_slice()) {
            prop_assert!(elf.end <= file.len() as u64);
            let _ = crate::Relocations::read(file.as_slice(), &elf);
        }
    }
}

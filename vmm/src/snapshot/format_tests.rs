use std::os::unix::fs::FileExt as _;

use proptest::prelude::*;

use super::*;

const ID: SnapshotId = SnapshotId::from_bytes(*b"0123456789abcdef");

fn section(kind: u32, index: u32, payload: &[u8]) -> Section {
    Section {
        kind,
        index,
        version: kind.wrapping_add(7),
        payload: payload.to_vec(),
    }
}

fn sections() -> Vec<Section> {
    vec![
        section(1, 0, b"{\"vcpus\":2}"),
        section(2, 0, b"registers of the first"),
        section(2, 1, b"registers of another.."),
        section(9, u32::MAX, b""),
        section(u32::MAX, 3, &[0; 40]),
    ]
}

fn encoded() -> Vec<u8> {
    encode(ID, &sections()).unwrap()
}

/// Where the payloads of [`sections`] begin.
const PAYLOADS: usize = HEADER + 5 * ENTRY + CHECKSUM;

/// `bytes` with another number in the header or the table, and a checksum that fits.
fn with(mut bytes: Vec<u8>, offset: usize, number: &[u8]) -> Vec<u8> {
    bytes[offset..offset + number.len()].copy_from_slice(number);
    seal(bytes)
}

fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let count = u32_at(&bytes, 20).unwrap() as usize;
    let end = HEADER + count * ENTRY;
    if end + CHECKSUM <= bytes.len() {
        let sum = checksum(&bytes[..end]).to_le_bytes();
        bytes[end..end + CHECKSUM].copy_from_slice(&sum);
    }
    bytes
}

fn refused(bytes: &[u8]) -> String {
    let error = decode(bytes).expect_err("should be refused").to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

#[test]
fn what_was_written_is_read() {
    for written in [vec![], vec![section(0, 0, b"")], sections()] {
        let bytes = encode(ID, &written).unwrap();
        assert_eq!(decode(&bytes).unwrap(), (ID, written.clone()));
        assert_eq!(read(&file(&bytes)).unwrap(), (ID, written));
    }
}

/// Another version of this program must find the same there.
#[test]
fn every_byte_has_its_place() {
    let bytes = encode(ID, &[section(1, 2, b"abc")]).unwrap();
    let mut expected = b"CASEMATE\x01\0\0\0\x01\0\0\0\x3e\0\0\0\x01\0\0\0".to_vec();
    expected.extend_from_slice(b"0123456789abcdef\x57\0\0\0\0\0\0\0");
    expected.extend_from_slice(b"\x01\0\0\0\x02\0\0\0\x08\0\0\0\x03\0\0\0\0\0\0\0");
    // XXH64 of "abc", from its reference implementation.
    expected.extend_from_slice(&0x44bc_2cf5_ad77_0999_u64.to_le_bytes());
    assert_eq!(bytes[..76], expected);
    assert_eq!(bytes[84..], *b"abc");
    assert_eq!(VERSION.to_string(), "v1.0.0");
}

#[test]
fn no_byte_of_the_header_may_be_another() {
    let bytes = encoded();
    for offset in 0..PAYLOADS {
        for other in 1..=255 {
            let mut flipped = bytes.clone();
            flipped[offset] ^= other;
            // The minor version alone is no reason to refuse a file, and the checksum is.
            refused(&flipped);
        }
    }
}

#[test]
fn no_bit_of_a_section_may_be_another() {
    let bytes = encoded();
    for offset in PAYLOADS..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[offset] ^= 1 << bit;
            assert!(refused(&flipped).contains("is damaged"));
        }
    }
    let mut flipped = bytes;
    flipped[PAYLOADS + b"{\"vcpus\":2}".len()] ^= 1;
    assert_eq!(refused(&flipped), "section 2 (kind 2, index 0) is damaged");
}

#[test]
fn no_byte_may_be_missing() {
    let bytes = encoded();
    for length in 0..bytes.len() {
        let expected = format!("cut off: it has {length} bytes and needs ");
        let error = refused(&bytes[..length]);
        assert!(error.contains(&expected), "{error}");
        assert_eq!(
            read(&file(&bytes[..length])).unwrap_err().to_string(),
            error
        );
        if length >= HEADER {
            assert!(error.ends_with(&format!(" {}", bytes.len())), "{error}");
        }
    }
}

#[test]
fn nothing_may_follow() {
    for more in [1, 28, 4096] {
        let mut bytes = encoded();
        bytes.resize(bytes.len() + more, 0);
        let error = refused(&bytes);
        assert!(error.contains(&format!(", {more} more than")), "{error}");
    }
}

#[test]
fn what_it_is_not_is_said() {
    let bytes = encoded();
    for (offset, number, expected) in [
        (0, &b"X"[..], "no snapshot of Casemate's"),
        (8, &[2, 0], "memory file"),
        (8, &[3, 0], "no snapshot of Casemate's"),
        (12, &[2, 0, 9, 0], "format is v2.9.0, newer than the v1.0.0"),
        (12, &[0, 0], "format is v0.0.0, older than the v1.0.0"),
        (16, &[183], "another architecture (aarch64)"),
        (16, &[0, 1], "another architecture (number 256 of ELF)"),
    ] {
        // Whether or not the checksum is right: another version may have it elsewhere.
        let mut flipped = bytes.clone();
        flipped[offset..offset + number.len()].copy_from_slice(number);
        for bytes in [flipped.clone(), seal(flipped)] {
            let error = refused(&bytes);
            assert!(error.contains(expected), "{expected:?} in {error:?}");
        }
    }
    assert!(refused(b"PK\x03\x04").contains("no snapshot"));
}

#[test]
fn a_later_minor_version_is_read() {
    let bytes = with(encoded(), 14, &[0xff, 0xff]);
    assert_eq!(decode(&bytes).unwrap(), (ID, sections()));
    assert_eq!(decode_as(Role::State, &bytes).unwrap().0.minor, u16::MAX);
}

#[test]
fn sections_have_one_order() {
    let all = sections();
    for (first, second) in [(0, 1), (1, 2), (2, 4), (0, 4)] {
        let mut swapped = all.clone();
        swapped.swap(first, second);
        let error = encode(ID, &swapped).unwrap_err().to_string();
        assert!(error.contains("in the wrong place"), "{error}");
        // In the table alone, with a checksum that fits.
        let mut bytes = encoded();
        let at = |section: usize| HEADER + section * ENTRY;
        let entry = bytes[at(first)..at(first) + ENTRY].to_vec();
        bytes.copy_within(at(second)..at(second) + ENTRY, at(first));
        let bytes = with(bytes, at(second), &entry);
        let error = refused(&bytes);
        assert!(error.contains("in the wrong place"), "{error}");
    }
}

#[test]
fn no_section_is_there_twice() {
    let mut twice = sections();
    twice[2] = twice[1].clone();
    let error = encode(ID, &twice).unwrap_err().to_string();
    assert_eq!(error, "section 3 (kind 2, index 0) is there twice");
    // The second of kind 2 says that it is the first.
    let bytes = with(encoded(), HEADER + 2 * ENTRY + 4, &[0]);
    assert_eq!(refused(&bytes), error);
}

/// Sections that are equally long change places, and nothing else does.
#[test]
fn a_section_is_not_taken_for_another() {
    let mut bytes = encoded();
    let first = PAYLOADS + sections()[0].payload.len();
    let len = sections()[1].payload.len();
    let payload = bytes[first..first + len].to_vec();
    bytes.copy_within(first + len..first + 2 * len, first);
    bytes[first + len..first + 2 * len].copy_from_slice(&payload);
    assert!(refused(&bytes).contains("section 2 (kind 2, index 0) is damaged"));
}

const BOUNDARIES: [u64; 12] = [
    0,
    1,
    u32::MAX as u64,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    (1 << 63) + 1,
    u64::MAX / 2,
    u64::MAX - 56,
    u64::MAX - 48,
    u64::MAX - 1,
    u64::MAX,
];

#[test]
fn lengths_are_not_believed() {
    let bytes = encoded();
    for number in BOUNDARIES.map(u64::to_le_bytes) {
        refused(&with(bytes.clone(), 40, &number));
        for section in 0..5 {
            let changed = with(bytes.clone(), HEADER + section * ENTRY + 12, &number);
            // That of the empty section is right.
            if changed != bytes {
                let error = refused(&changed);
                assert!(error.contains("by the table"), "{error}");
            }
        }
    }
    // All of them: their sum is more than 64 bits hold.
    let mut all = bytes.clone();
    for section in 0..5 {
        all = with(all, HEADER + section * ENTRY + 12, &u64::MAX.to_le_bytes());
    }
    let error = refused(&all);
    assert!(error.contains("have 92233720368547758075 bytes"), "{error}");
    for count in [0, 1, 4, 6, 1000, u32::MAX / 28, u32::MAX - 1, u32::MAX] {
        refused(&with(bytes.clone(), 20, &count.to_le_bytes()));
    }
    // Two lengths whose sum is right.
    let twice = with(bytes, HEADER + ENTRY + 12, &21_u64.to_le_bytes());
    let twice = with(twice, HEADER + 2 * ENTRY + 12, &23_u64.to_le_bytes());
    assert!(refused(&twice).contains("is damaged"));
}

#[test]
fn what_is_too_large_is_not_read() {
    let bytes = encoded();
    let large = file(&bytes);
    large.set_len(MAX_STATE + 1).unwrap();
    let error = read(&large).unwrap_err().to_string();
    assert!(error.contains("67108865 bytes, more than"), "{error}");
    // A memory file of any size is told from that.
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(1 << 40).unwrap();
    assert!(matches!(read(&memory), Err(Error::NoSnapshot)));
    let fits = MAX_STATE as usize - HEADER - ENTRY - CHECKSUM;
    let one = |length| encode(ID, &[section(1, 1, &vec![1; length])]);
    assert_eq!(one(fits).unwrap().len() as u64, MAX_STATE);
    assert!(matches!(one(fits + 1), Err(Error::TooLarge(_))));
}

#[test]
fn what_is_no_file_is_not_read() {
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(read(&null), Err(Error::NotAFile)));
    let directory = File::open("/").unwrap();
    assert!(matches!(read(&directory), Err(Error::NotAFile)));
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&path, encoded()).unwrap();
    let write_only = File::options().write(true).open(path.path()).unwrap();
    assert!(matches!(read(&write_only), Err(Error::Read(_))));
}

proptest! {
    #[test]
    fn any_sections_come_back(
        id: [u8; 16],
        sections in proptest::collection::btree_map(
            any::<(u32, u32)>(),
            (any::<u32>(), proptest::collection::vec(any::<u8>(), 0..300)),
            0..20,
        ),
    ) {
        let id = SnapshotId::from_bytes(id);
        let sections: Vec<_> = sections
            .into_iter()
            .map(|((kind, index), (version, payload))| Section { kind, index, version, payload })
            .collect();
        let bytes = encode(id, &sections).unwrap();
        prop_assert_eq!(decode(&bytes).unwrap(), (id, sections));
    }

    /// Whatever is written over it, and whatever the checksum says.
    #[test]
    fn nothing_else_is_read(
        offset in 0..PAYLOADS,
        bytes in proptest::collection::vec(any::<u8>(), 1..64),
    ) {
        let mut changed = encoded();
        let end = changed.len().min(offset + bytes.len());
        changed[offset..end].copy_from_slice(&bytes[..end - offset]);
        prop_assume!(changed != encoded());
        prop_assert!(decode(&changed).is_err());
        if let Ok((_, sections)) = decode(&seal(changed)) {
            let bytes: usize = sections.iter().map(|section| section.payload.len()).sum();
            prop_assert!(bytes <= encoded().len());
        }
    }

    #[test]
    fn anything_at_all_is_looked_at(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(&bytes);
        for (byte, ours) in bytes.iter_mut().zip(encoded()).take(20) {
            *byte = ours;
        }
        let _ = decode(&bytes);
    }
}

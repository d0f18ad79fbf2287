//! No number in a snapshot's file makes its reader allocate more than the file is long, or nearly: this
//! process counts what is allocated.
#![allow(unsafe_code, reason = "an allocator that counts has no safe form")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicUsize, Ordering};

use casemate_vmm::snapshot::{Section, SnapshotId, format, memory};

/// Bytes that were ever allocated.
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: all is done by the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller's words are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's words are passed on.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Fixed offsets of docs/snapshot-format.md.
const COUNT: usize = 20;
const LENGTH: usize = 40;
const TABLE: usize = 48;
const ENTRY: usize = 28;
const LENGTH_IN_ENTRY: usize = 12;

const NUMBERS: [u64; 8] = [
    1 << 20,
    1 << 31,
    u32::MAX as u64,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 4096,
    u64::MAX,
];

fn allocated_by(work: impl FnOnce()) -> usize {
    let before = ALLOCATED.load(Ordering::SeqCst);
    work();
    ALLOCATED.load(Ordering::SeqCst) - before
}

/// Puts the checksum of the header and the table right.
fn seal(bytes: &mut [u8], sections: usize) {
    let end = TABLE + sections * ENTRY;
    let sum = twox_hash::XxHash64::oneshot(0, &bytes[..end]).to_le_bytes();
    bytes[end..end + 8].copy_from_slice(&sum);
}

fn states() -> Vec<Vec<u8>> {
    const SECTIONS: usize = 3;
    let id = SnapshotId::from_bytes([1; 16]);
    let section = |index| Section {
        kind: 1,
        index,
        version: 1,
        payload: vec![7; 1000],
    };
    let sections: Vec<_> = (0..SECTIONS as u32).map(section).collect();
    let whole = format::encode(id, &sections).unwrap();
    let mut all = vec![whole.clone()];
    let mut change = |offset: usize, number: &[u8]| {
        let mut bytes = whole.clone();
        bytes[offset..offset + number.len()].copy_from_slice(number);
        all.push(bytes.clone());
        seal(&mut bytes, SECTIONS);
        all.push(bytes);
    };
    for number in NUMBERS {
        change(LENGTH, &number.to_le_bytes());
        change(COUNT, &number.to_le_bytes()[..4]);
        for section in 0..SECTIONS {
            let offset = TABLE + section * ENTRY + LENGTH_IN_ENTRY;
            change(offset, &number.to_le_bytes());
        }
    }
    // Very many sections of nothing.
    let empty = |index| Section {
        payload: Vec::new(),
        ..section(index)
    };
    all.push(format::encode(id, &(0..5000).map(empty).collect::<Vec<_>>()).unwrap());
    all
}

/// One test: others would be counted, too.
#[test]
fn nothing_is_allocated_by_the_word_of_a_file() {
    for bytes in states() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        // What is decoded is a copy; a section has a few bytes more than its line in the table.
        let decoded = allocated_by(|| drop(format::decode(&bytes)));
        assert!(decoded <= 2 * bytes.len(), "{decoded} for {}", bytes.len());
        let read = allocated_by(|| drop(format::read(&file)));
        assert!(read <= 3 * bytes.len(), "{read} for {}", bytes.len());
    }
    let large = tempfile::tempfile().unwrap();
    large.set_len(1 << 40).unwrap();
    assert!(allocated_by(|| drop(format::read(&large))) < 4096);
    memory_files();
}

fn memory_files() {
    let id = SnapshotId::from_bytes([1; 16]);
    let page = |number: u64, regions: u32| {
        let mut page = vec![0; 4096];
        page[..20].copy_from_slice(b"CASEMATE\x02\0\0\0\x01\0\0\0\x3e\0\0\0");
        page[20..24].copy_from_slice(&regions.to_le_bytes());
        page[56] = 1; // differences: there would be a bitmap
        page[60..64].copy_from_slice(&4096_u32.to_le_bytes());
        page[96..104].copy_from_slice(&number.to_le_bytes());
        let sum = twox_hash::XxHash64::oneshot(0, &page[..4088]).to_le_bytes();
        page[4088..].copy_from_slice(&sum);
        page
    };
    let file = tempfile::tempfile().unwrap();
    let look = |file: &File| {
        allocated_by(|| {
            assert!(memory::check(file, id, &[(0, 4096)]).is_err());
            assert!(memory::verify(file).is_err());
        })
    };
    for number in NUMBERS.into_iter().chain([16 << 40, (16 << 40) - 4096]) {
        for regions in [1, 250, u32::MAX] {
            let number = number / 4096 * 4096;
            file.write_all_at(&page(number, regions), 4096).unwrap();
            let allocated = look(&file);
            // A page, the regions it has room for, and the words of an error.
            assert!(allocated < 65536, "{allocated} for {number}");
        }
    }
}

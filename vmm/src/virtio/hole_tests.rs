//! The hole below 4 GiB, where a guest has registers and no memory: neither a ring nor a buffer lies there, and nothing
//! is written beside it.

use vm_memory::{Bytes as _, GuestAddress};

use super::balloon::{Balloon, BalloonOptions};
use super::chain::Chain;
use super::device::{Event, VirtioDevice};
use super::entropy::Entropy;
use super::queue::{Error, Queue, QueueState};
use super::testing::{DATA, Driver, INDIRECT, NEXT, Rig, WRITE};
use crate::memory::layout::{
    ACPI_REGISTERS_START, IOAPIC_START, KVM_IDENTITY_MAP, KVM_TSS, LAPIC_START, MMIO_HOLE_END,
    MMIO_HOLE_START, PCI_ECAM_SIZE, PCI_ECAM_START, PCI_REGISTERS_START, PCI_WINDOW_SIZE,
    PCI_WINDOW_START, VCPU_REGISTERS_START, VIRTIO_MMIO_SIZE, VIRTIO_MMIO_START,
};
use crate::memory::{self, GuestMemory};

/// Bytes beside the hole that are looked at.
const EDGE: u64 = 0x4000;
const SIZE: u16 = 16;

/// A guest's memory below the hole and above it.
fn memory() -> GuestMemory {
    memory::allocate(MMIO_HOLE_START + (16 << 20)).unwrap()
}

/// Where `len` bytes at a multiple of `align` reach into the hole: over its edges, and at all that is in it.
fn places(len: u64, align: u64) -> Vec<u64> {
    let below = (MMIO_HOLE_START - len) / align * align;
    let last = (MMIO_HOLE_END - len) / align * align;
    let mut places = vec![
        below + align,
        MMIO_HOLE_START - align,
        MMIO_HOLE_START,
        last,
        MMIO_HOLE_END - align,
    ];
    places.extend([
        ACPI_REGISTERS_START,
        VCPU_REGISTERS_START,
        PCI_REGISTERS_START,
        VIRTIO_MMIO_START,
        VIRTIO_MMIO_START + 7 * VIRTIO_MMIO_SIZE,
        PCI_ECAM_START,
        PCI_ECAM_START + PCI_ECAM_SIZE - align,
        PCI_WINDOW_START,
        PCI_WINDOW_START + PCI_WINDOW_SIZE - align,
        IOAPIC_START,
        LAPIC_START,
        KVM_IDENTITY_MAP,
        KVM_TSS,
    ]);
    // Without a byte of the hole it would be none of them.
    places.retain(|place| place + len > MMIO_HOLE_START && *place < MMIO_HOLE_END);
    places
}

#[test]
fn no_ring_lies_in_the_hole() {
    let memory = memory();
    let good = Driver::new(&memory, 0, SIZE).state;
    let check = |state: &QueueState| Queue::new(0, state, SIZE, true, &memory);
    let n = u64::from(SIZE);
    type Part = (u64, u64, fn(&mut QueueState) -> &mut u64);
    let parts: [Part; 3] = [
        (n * 16, 16, |state| &mut state.descriptors),
        (n * 2 + 6, 2, |state| &mut state.available),
        (n * 8 + 6, 4, |state| &mut state.used),
    ];
    for (len, align, part) in parts {
        for place in places(len, align) {
            let mut state = good;
            *part(&mut state) = place;
            let error = check(&state).err();
            assert!(
                matches!(error, Some(Error::OutOfMemory { .. })),
                "{place:#x}"
            );
        }
        // Right beside it they may.
        for place in [(MMIO_HOLE_START - len) / align * align, MMIO_HOLE_END] {
            let mut state = good;
            *part(&mut state) = place;
            assert!(check(&state).is_ok(), "{place:#x}");
        }
    }
}

/// What comes of a chain that `make` describes.
fn pop(memory: &GuestMemory, make: impl Fn(&Driver)) -> Result<bool, Error> {
    let mut driver = Driver::new(memory, 0, SIZE);
    make(&driver);
    driver.set_available_index(0);
    driver.offer(0);
    driver.queue(SIZE, true).pop(memory, &mut Chain::default())
}

#[test]
fn no_buffer_and_no_table_of_them_lies_in_the_hole() {
    let memory = memory();
    let over_all_of_it = (MMIO_HOLE_END - MMIO_HOLE_START) as u32 + 2;
    for flags in [0, WRITE] {
        for len in [1, 2, 4096, 0x1_0001, over_all_of_it] {
            let direct = |place| {
                pop(&memory, |d| {
                    d.describe(0, DATA, 4, NEXT | flags, 1);
                    d.describe(1, place, len, flags, 0);
                })
            };
            let indirect = |place| {
                pop(&memory, |d| {
                    d.describe(0, DATA, 32, INDIRECT, 0);
                    d.describe_at(DATA, 0, DATA, 4, NEXT | flags, 1);
                    d.describe_at(DATA, 1, place, len, flags, 0);
                })
            };
            for place in places(len.into(), 1) {
                for result in [direct(place), indirect(place)] {
                    let Err(Error::Chain { source, .. }) = result else {
                        panic!("{place:#x}+{len:#x}: {result:?}");
                    };
                    let text = source.to_string();
                    assert!(text.contains("not guest memory"), "{text}");
                }
            }
            let beside = MMIO_HOLE_START - u64::from(len);
            assert!(direct(beside).unwrap() && indirect(beside).unwrap());
        }
    }
    for place in places(32, 1) {
        let result = pop(&memory, |d| {
            // As far as it is memory, it says that it ends there.
            let bytes = [[0; 8], 1_u64.to_le_bytes()].concat();
            let _ = memory.write_slice(&bytes, GuestAddress(place));
            d.describe(0, place, 32, INDIRECT, 0);
        });
        // Its first descriptor may lie in memory, and be the last one.
        let reaches = place + 16 > MMIO_HOLE_START && place < MMIO_HOLE_END;
        assert_eq!(result.is_err(), reaches, "{place:#x}");
    }
}

/// Both edges of the hole, marked.
fn mark(memory: &GuestMemory) {
    for start in [MMIO_HOLE_START - EDGE, MMIO_HOLE_END] {
        let bytes = [7; EDGE as usize];
        memory.write_slice(&bytes, GuestAddress(start)).unwrap();
    }
}

fn is_marked(memory: &GuestMemory) -> bool {
    [MMIO_HOLE_START - EDGE, MMIO_HOLE_END].iter().all(|start| {
        let mut bytes = [0; EDGE as usize];
        memory.read_slice(&mut bytes, GuestAddress(*start)).unwrap();
        bytes == [7; EDGE as usize]
    })
}

#[test]
fn a_device_that_is_given_the_hole_writes_nothing_beside_it() {
    for place in places(64, 1) {
        let mut rig = Rig::on(memory(), Entropy::default(), 0, SIZE);
        mark(&rig.memory);
        // Memory before it, whose turn would come first.
        rig.drivers[0].add(&[(DATA, 64, true), (place, 64, true)]);
        assert!(rig.handle(Event::Queue(0)).is_err(), "{place:#x}");
        assert!(is_marked(&rig.memory), "{place:#x}");
        assert_eq!(rig.drivers[0].get(DATA, 64), [0; 64]);
        assert_eq!((rig.drivers[0].used(), rig.signal.count()), (None, 0));
    }
}

/// Pages of the balloon are no buffers: their numbers are checked elsewhere.
#[test]
fn pages_of_the_hole_go_in_no_balloon() {
    let options = BalloonOptions {
        amount_mib: 0,
        deflate_on_oom: false,
        stats_polling_interval_s: 0,
        free_page_hinting: false,
        free_page_reporting: false,
    };
    let balloon = Balloon::new(options).unwrap();
    let features = balloon.traits().features;
    let mut rig = Rig::on(memory(), balloon, features, SIZE);
    mark(&rig.memory);
    for place in places(4096, 4096) {
        // With the pages at the edge where that makes one run, which is refused as a whole.
        let number = (place / 4096) as u32;
        for list in [vec![number], vec![number - 1, number, number + 1]] {
            let bytes: Vec<u8> = list.iter().flat_map(|n: &u32| n.to_le_bytes()).collect();
            rig.drivers[0].put(DATA, &bytes);
            rig.drivers[0].add(&[(DATA, bytes.len() as u32, false)]);
            rig.kick(0);
            assert!(rig.drivers[0].used().is_some());
        }
    }
    // The hole's first and last pages were among them, each with a page of memory as its neighbour.
    assert!(is_marked(&rig.memory));
}

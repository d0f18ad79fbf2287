//! Blocks that come and go, and what is seen of them.

use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, Permissions};

use super::*;
use crate::memory::{GuestMemory, add_hotplug, iovec};

const MIB: u64 = 1 << 20;
const START: u64 = 4 << 30;

fn memory() -> GuestMemory {
    let ram = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    add_hotplug(&ram, 64 * MIB, 2 * MIB).unwrap()
}

fn is_memory(memory: &GuestMemory, address: u64, len: u64) -> bool {
    let found = memory.check_range(GuestAddress(address), len as usize, Permissions::Write);
    let mut pieces = iovec::IoVecBuffer::default();
    let segment = iovec::Segment {
        address: GuestAddress(address),
        len: len as u32,
    };
    let filled = pieces.fill(memory, &[segment], 0, len, Permissions::Read);
    assert_eq!(filled.is_ok(), found, "{address:#x}+{len:#x}");
    found
}

#[test]
fn unplugged_memory_is_none() {
    let memory = memory();
    let region = memory.hotplug().unwrap();
    assert_eq!((region.start(), region.plugged_size()), (START, 0));
    assert!(is_memory(&memory, 0xf_fff0, 16));
    assert!(!is_memory(&memory, START, 1));
    assert!(memory.write_obj(7u8, GuestAddress(START)).is_err());
    assert!(memory.read_obj::<u8>(GuestAddress(START)).is_err());

    region.plug(1..3).unwrap();
    let (first, end) = (START + 2 * MIB, START + 6 * MIB);
    assert_eq!(region.plugged_size(), 4 * MIB);
    assert!(is_memory(&memory, first, 4 * MIB));
    for (address, len) in [
        (first - 1, 1),
        (first - 1, 2),
        (end - 1, 2),
        (end, 1),
        (first, 4 * MIB + 1),
        (START, 64 * MIB),
        (START + 64 * MIB, 1),
    ] {
        assert!(!is_memory(&memory, address, len), "{address:#x}+{len:#x}");
    }
    // One buffer over both blocks.
    memory
        .write_obj(u64::MAX, GuestAddress(START + 4 * MIB - 4))
        .unwrap();
    memory.write_obj(9u8, GuestAddress(end - 1)).unwrap();
    // A clone that was made before sees the same.
    let other = memory.clone();
    region.unplug(1..2).unwrap();
    assert!(!is_memory(&other, START + 4 * MIB - 4, 8));
    assert_eq!(
        other
            .read_obj::<u32>(GuestAddress(START + 4 * MIB))
            .unwrap(),
        u32::MAX
    );
}

#[test]
fn what_was_unplugged_is_gone() {
    let memory = memory();
    let region = memory.hotplug().unwrap();
    region.plug(region.all()).unwrap();
    memory
        .write_slice(&vec![7; 4 << 20], GuestAddress(START))
        .unwrap();
    region.unplug(0..1).unwrap();
    region.plug(0..1).unwrap();
    let at = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
    assert_eq!((at(START), at(START + 2 * MIB)), (0, 7));
    region.unplug(region.all()).unwrap();
    assert_eq!(region.plugged_size(), 0);
    assert_eq!(region.state(region.all()), State::Unplugged);
    region.unplug(region.all()).unwrap();
    assert_eq!(region.plugged_size(), 0);
}

/// What KVM finds when the guest writes there: EFAULT, not a page for free.
#[test]
fn the_kernel_writes_to_no_unplugged_block() {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsRawFd as _;
    let memory = memory();
    let region = memory.hotplug().unwrap();
    region.plug(0..1).unwrap();
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let (address, _) = region.host_range(0..2).unwrap();
    let mut read_to = |block: usize| {
        writer.write_all(&[7]).unwrap();
        // SAFETY: the kernel writes one byte within the mapping, or fails.
        let count = unsafe { libc::read(reader.as_raw_fd(), address.byte_add(block << 21), 1) };
        if count < 0 {
            let error = io::Error::last_os_error().raw_os_error();
            reader.read_exact(&mut [0]).unwrap();
            return error;
        }
        None
    };
    assert_eq!(read_to(0), None);
    assert_eq!(read_to(1), Some(libc::EFAULT));
    region.unplug(0..1).unwrap();
    assert_eq!(read_to(0), Some(libc::EFAULT));
    // SAFETY: a byte of the mapping, which can always be read.
    assert_eq!(unsafe { address.cast::<u8>().read_volatile() }, 0);
}

#[test]
fn blocks_that_go_count_as_written() {
    let pages = DirtyPages::tracking(8 << 20);
    let region = HotplugRegion::new(START, 8 * MIB, 2 * MIB, pages).unwrap();
    region.plug(region.all()).unwrap();
    region.unplug(1..2).unwrap();
    let taken = dirty::of(&region.mapping).take();
    assert_eq!(taken[..8], [0; 8]);
    assert_eq!(taken[8..16], [u64::MAX; 8]);
    assert_eq!(taken[16..], [0; 16]);
}

#[test]
fn block_numbers_are_checked() {
    let memory = memory();
    let region = memory.hotplug().unwrap();
    assert_eq!(region.blocks(START, 32), Some(0..32));
    assert_eq!(region.blocks(START + 62 * MIB, 1), Some(31..32));
    for (address, count) in [
        (START, 0),
        (START, 33),
        (START, u16::MAX),
        (START + MIB, 1),
        (START + 62 * MIB, 2),
        (START + 64 * MIB, 1),
        (START - 2 * MIB, 1),
        (0, 1),
        (u64::MAX, 1),
        (u64::MAX - 2 * MIB + 1, 2),
        (0u64.wrapping_sub(2 * MIB), u16::MAX),
    ] {
        assert_eq!(region.blocks(address, count), None, "{address:#x}, {count}");
    }
}

#[test]
fn a_region_has_whole_blocks_and_not_too_many() {
    for (start, len, block) in [
        (START, 0, 2 * MIB),
        (START, 3 * MIB, 2 * MIB),
        (START + MIB, 4 * MIB, 2 * MIB),
        (START, 6 * MIB, 3 * MIB),
        (START, 4096, 2048),
        (START, (MAX_BLOCKS + 1) * 4096, 4096),
        (u64::MAX - 4095, 8192, 4096),
    ] {
        let region = HotplugRegion::new(start, len, block, DirtyPages::default());
        assert!(region.is_err(), "{start:#x}+{len:#x} by {block:#x}");
    }
}

#[test]
fn every_block_may_be_a_mapping_of_its_own() {
    let region = HotplugRegion::new(START, MAX_BLOCKS * 4096, 4096, DirtyPages::default()).unwrap();
    for block in (0..MAX_BLOCKS as usize).step_by(2) {
        region.plug(block..block + 1).unwrap();
    }
    assert_eq!(region.plugged_size(), MAX_BLOCKS / 2 * 4096);
    assert_eq!(region.state(0..2), State::Mixed);
    region.unplug(region.all()).unwrap();
}

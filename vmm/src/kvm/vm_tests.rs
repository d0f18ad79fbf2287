//! The host's KVM itself, with a guest of a few bytes.

use std::fs::OpenOptions;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use super::*;
use crate::boot::{EntryState, KaslrOutcome, Protocol};
use crate::kvm::cpuid::MachineCpuid;
use crate::kvm::{Access, Exit};
use crate::memory;

const CODE: u64 = 0x10_0000;
/// Where the guest writes.
const TARGET: u64 = 0x15_0000;

struct Nothing;

impl Access for Nothing {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

fn machine(track_dirty_pages: bool) -> (Vm, Vcpu, GuestMemory) {
    let device = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let mut vm = Vm::new(device.expect("these tests need /dev/kvm")).unwrap();
    let options = memory::Options {
        track_dirty_pages,
        ..memory::Options::default()
    };
    let memory = memory::allocate_with(2 << 20, options).unwrap();
    vm.set_memory(&memory, 36).unwrap();
    vm.create_irqchip(false).unwrap();
    let cpuid = MachineCpuid::new(&vm.supported_cpuid().unwrap(), 1, vm.has_tsc_deadline());
    let vcpu = vm.create_vcpus(1).unwrap().pop().unwrap();
    vcpu.set_features(&cpuid.of_vcpu(0).unwrap()).unwrap();
    (vm, vcpu, memory)
}

/// The numbers of the pages that the log of the only region names.
fn pages(log: &[Vec<u64>]) -> Vec<u64> {
    let [log] = log else { panic!("{log:?}") };
    let bits = (0..).zip(log).flat_map(|(at, word)| {
        (0..64).filter_map(move |bit| (word >> bit & 1 == 1).then_some(at * 64 + bit))
    });
    bits.collect()
}

#[test]
fn what_the_guest_writes_is_in_kvms_log_and_what_we_write_in_ours() {
    let (vm, mut vcpu, memory) = machine(true);
    // mov [TARGET], eax; out 0x10, al; and once more
    let mut code = Vec::new();
    for _ in 0..2 {
        code.push(0xa3);
        code.extend((TARGET as u32).to_le_bytes());
        code.extend([0xe6, 0x10]);
    }
    memory.write_slice(&code, GuestAddress(CODE)).unwrap();
    vcpu.set_entry(&EntryState {
        protocol: Protocol::Pvh,
        rip: CODE,
        rsi: 0,
        rbx: 0,
        kaslr: KaslrOutcome::NotWithPvh,
    })
    .unwrap();
    let reader = vm.state_reader([], false).unwrap();
    let log = || reader.dirty_log(&memory).unwrap();
    let region = memory.iter().next().unwrap();
    assert_eq!(pages(&[dirty::of(region).take()]), [CODE >> 12]);
    let mut run = || loop {
        match vcpu.run(&Nothing) {
            Exit::Served => break,
            Exit::Kicked => {}
            exit => panic!("{exit:?}"),
        }
    };
    run();
    assert!(pages(&log()).contains(&(TARGET >> 12)));
    assert!(pages(&log()).is_empty(), "taken");
    run();
    assert_eq!(pages(&log()), [TARGET >> 12], "again");
    assert!(pages(&[dirty::of(region).take()]).is_empty(), "not by us");
}

#[test]
fn a_memory_that_is_not_tracked_has_no_log() {
    let (vm, _vcpu, memory) = machine(false);
    let reader = vm.state_reader([], false).unwrap();
    let error = reader.dirty_log(&memory).unwrap_err().to_string();
    assert!(error.contains("track_dirty_pages"), "{error}");
}

/// Every one is where it was asked to be, and none is left: the numbers and the places are used again.
#[test]
fn files_come_and_go() {
    let (mut vm, _vcpu, _memory) = machine(false);
    let mapping = |len| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        Arc::new(FileMapping::new(&Arc::new(file), len, false).unwrap())
    };
    let (start, large) = (4 << 30, 2 << 20);
    for _ in 0..3 {
        // With padding, which is a piece of its own.
        let first = mapping(4096);
        vm.map_file(Arc::clone(&first), start, 36).unwrap();
        vm.map_file(mapping(large), start + large, 36).unwrap();
        let mut found: Vec<_> = vm.mapped_files().collect();
        found.sort_unstable();
        assert_eq!(found, [(start, large), (start + large, large)]);
        // Over both of them: KVM refuses, and nothing of it stays.
        vm.map_file(mapping(2 * large), start, 36).unwrap_err();
        assert_eq!(vm.mapped_files().count(), 2);
        assert!(vm.map_file(mapping(large), 1 << 36, 36).is_err());
        vm.unmap_file(start + large).unwrap();
        vm.unmap_file(start).unwrap();
        vm.unmap_file(start).unwrap();
        assert_eq!(Arc::strong_count(&first), 1);
        assert_eq!((vm.mapped_files().count(), vm.next_slot), (0, 5));
    }
}

//! vCPU threads on the host's KVM, with a guest of a few bytes in real mode's successor: 64-bit
//! ring 0, entered as a kernel is.

use std::fs::OpenOptions;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::boot::{EntryState, KaslrOutcome, Protocol};
use crate::bus::BusDevice;
use crate::kvm::cpuid::MachineCpuid;
use crate::kvm::{Vm, install_kick_handler};
use crate::memory::{self, GuestMemory};

const CODE: u64 = 0x10_0000;

/// Counts writes and remembers their widths.
#[derive(Default)]
struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

impl BusDevice for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0x40 + offset as u8);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.to_vec()));
    }
}

struct Guest {
    thread: VcpuThread,
    ends: Arc<EndSignal>,
    recorder: Arc<Recorder>,
    memory: GuestMemory,
    _vm: Vm,
}

/// A guest that starts with `code` in 32-bit protected mode without paging.
fn start(code: &[u8]) -> Guest {
    install_kick_handler().unwrap();
    let device = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let mut vm = Vm::new(device.expect("these tests need /dev/kvm")).unwrap();
    let memory = memory::allocate(2 << 20).unwrap();
    vm.set_memory(&memory, 36).unwrap();
    vm.create_irqchip(false).unwrap();
    let cpuid = vm.supported_cpuid().unwrap();
    let cpuid = MachineCpuid::new(&cpuid, 1, vm.has_tsc_deadline());
    let vcpu = vm.create_vcpus(1).unwrap().pop().unwrap();
    vcpu.set_features(&cpuid.of_vcpu(0).unwrap()).unwrap();
    vm.set_gsi_routing(false).unwrap();
    memory.write_slice(code, GuestAddress(CODE)).unwrap();
    let entry = EntryState {
        protocol: Protocol::Pvh,
        rip: CODE,
        rsi: 0,
        rbx: 0x1234,
        kaslr: KaslrOutcome::NotWithPvh,
    };
    vcpu.set_entry(&entry).unwrap();
    let recorder = Arc::new(Recorder::default());
    let mut buses = Buses {
        ports: Bus::new(),
        mmio: Bus::new(),
        metrics: Arc::default(),
    };
    buses.ports.insert(0x10, 0x10, recorder.clone()).unwrap();
    buses
        .mmio
        .insert(0xc000_0000, 0x1000, recorder.clone())
        .unwrap();
    let ends = Arc::new(EndSignal::new().unwrap());
    let thread = VcpuThread::start(vcpu, Arc::new(buses), Arc::clone(&ends), || Ok(()));
    Guest {
        thread: thread.unwrap(),
        ends,
        recorder,
        memory,
        _vm: vm,
    }
}

impl Guest {
    #[track_caller]
    fn wait(&self, what: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !what(self) {
            assert!(started.elapsed() < Duration::from_secs(10), "timed out");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn counter(&self) -> u32 {
        self.memory.read_obj(GuestAddress(0x5000)).unwrap()
    }
}

/// `inc dword [0x5000]; jmp -8`: counts for good.
const COUNT: [u8; 8] = [0xff, 0x05, 0x00, 0x50, 0x00, 0x00, 0xeb, 0xf8];
/// `ud2` without an interrupt table.
const TRIPLE_FAULT: [u8; 2] = [0x0f, 0x0b];

#[test]
fn nothing_runs_before_the_command_and_pausing_stops_it() {
    let guest = start(&COUNT);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.counter(), 0);
    for _ in 0..50 {
        let before = guest.counter();
        guest.thread.resume();
        guest.wait(|guest| guest.counter() != before);
        guest.thread.pause();
        // The pause is not acknowledged: it has been obeyed when the counter stands still.
        guest.wait(|guest| {
            let before = guest.counter();
            std::thread::sleep(Duration::from_millis(2));
            guest.counter() == before
        });
    }
    guest.thread.resume();
    // Dropping it while it runs joins the thread.
    drop(guest);
}

#[test]
fn a_kick_is_never_lost() {
    let guest = start(&COUNT);
    for _ in 0..2000 {
        guest.thread.resume();
        guest.thread.pause();
    }
    guest.wait(|guest| {
        let before = guest.counter();
        std::thread::sleep(Duration::from_millis(5));
        guest.counter() == before
    });
}

#[test]
fn accesses_reach_the_buses() {
    let guest = start(&[
        0xb0, 0x41, // mov al, 0x41
        0xe6, 0x10, // out 0x10, al
        0xe5, 0x14, // in eax, 0x14
        0x66, 0xe7, 0x12, // out 0x12, ax
        0xa1, 0x04, 0x00, 0x00, 0xc0, // mov eax, [0xc0000004]
        0xa3, 0x08, 0x00, 0x00, 0xc0, // mov [0xc0000008], eax
        0x88, 0x1d, 0x01, 0x00, 0x00, 0xc0, // mov [0xc0000001], bl
        0x0f, 0x0b, // ud2
    ]);
    guest.thread.resume();
    guest.wait(|guest| guest.ends.announced().is_some());
    let writes = guest.recorder.0.lock().unwrap();
    assert_eq!(
        *writes,
        [
            (0, vec![0x41]),
            (2, vec![0x44, 0x44]),
            (8, vec![0x44; 4]),
            (1, vec![0x34]),
        ]
    );
}

#[test]
fn string_accesses_come_one_by_one() {
    let guest = start(&[
        0xbf, 0x00, 0x60, 0x00, 0x00, // mov edi, 0x6000
        0xb9, 0x05, 0x00, 0x00, 0x00, // mov ecx, 5
        0xba, 0x14, 0x00, 0x00, 0x00, // mov edx, 0x14
        0xf3, 0x66, 0x6d, // rep insw
        0xbe, 0x00, 0x60, 0x00, 0x00, // mov esi, 0x6000
        0xb9, 0x05, 0x00, 0x00, 0x00, // mov ecx, 5
        0xf3, 0x66, 0x6f, // rep outsw
        0x0f, 0x0b, // ud2
    ]);
    guest.thread.resume();
    guest.wait(|guest| guest.ends.announced().is_some());
    let writes = guest.recorder.0.lock().unwrap();
    assert_eq!(*writes, vec![(4, vec![0x44, 0x44]); 5]);
}

#[test]
fn a_triple_fault_is_a_crash_that_says_where_it_can() {
    let guest = start(&TRIPLE_FAULT);
    guest.thread.resume();
    guest.wait(|guest| guest.ends.announced().is_some());
    let Some(End::Crashed(why)) = guest.ends.announced() else {
        panic!("{:?}", guest.ends.announced());
    };
    assert!(why.contains("triple fault"), "{why}");
    // On AMD KVM knows it no more, and nothing must be made up.
    let knows_where = why.contains(", rip 0x100000");
    assert!(knows_where || !why.contains(", rip "), "{why}");
}

use super::*;
use crate::bus::BusDevice;
use crate::pci::PciBus;
use crate::pci::bus::{BarWindow, Ecam};
use crate::virtio::testing::{DATA, Driver, NEXT, memory};
use crate::virtio::transport::testing::Echo;
use crate::virtio::worker::DeviceWorker;
use proptest::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

const SLOT: usize = 3;

struct Sent(Mutex<Sender<(u64, u32)>>);

impl MsiSender for Sent {
    fn send(&self, address: u64, data: u32) {
        let _ = self.0.lock().unwrap().send((address, data));
    }
}

pub(super) struct Machine {
    transport: Arc<PciTransport>,
    bus: Arc<PciBus>,
    sent: Receiver<(u64, u32)>,
    pub(super) driver: Driver,
    starts: Arc<AtomicUsize>,
    stops: Arc<AtomicUsize>,
}

impl Machine {
    pub(super) fn new() -> Self {
        Self::with_worker(|worker| {
            // It ends with the test's process, as in the machine.
            std::thread::spawn(move || worker.run());
        })
    }

    fn with_worker(then: impl FnOnce(DeviceWorker)) -> Self {
        let memory = memory();
        let (sender, sent) = channel();
        let device = Echo::default();
        let (starts, stops) = (Arc::clone(&device.starts), Arc::clone(&device.stops));
        let driver = Driver::new(&memory, 0, 8);
        let transport = PciTransport::new(
            &device,
            memory,
            SLOT,
            Doorbells::new(1).unwrap(),
            Arc::new(Sent(Mutex::new(sender))),
        );
        let bus = Arc::new(PciBus::new());
        bus.insert(SLOT, transport.clone());
        let mut worker = DeviceWorker::new().unwrap();
        worker
            .add(Arc::clone(transport.endpoint()), Box::new(device))
            .unwrap();
        then(worker);
        let machine = Self {
            transport,
            bus,
            sent,
            driver,
            starts,
            stops,
        };
        // Memory space and bus master.
        machine.config_write(4, &[6]);
        machine
    }

    fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        let at = (SLOT as u64) << 15 | offset;
        Ecam(Arc::clone(&self.bus)).read(at, &mut data);
        data
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        let at = (SLOT as u64) << 15 | offset;
        Ecam(Arc::clone(&self.bus)).write(at, data);
    }

    /// The capability with this id and, if it is virtio's, of this type.
    fn capability(&self, id: u8, kind: u8) -> u64 {
        let mut at = u64::from(self.config::<1>(0x34)[0]);
        while at != 0 {
            let [found, next, _, its_kind] = self.config(at);
            if found == id && (id != CAP_VENDOR || its_kind == kind) {
                return at;
            }
            at = next.into();
        }
        panic!("no capability {id:#x}, type {kind}");
    }

    pub(super) fn bar(&self, offset: u64, data: &[u8]) {
        let at = home(SLOT) - layout::PCI_WINDOW_START + offset;
        BarWindow(Arc::clone(&self.bus)).write(at, data);
    }

    pub(super) fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        let at = home(SLOT) - layout::PCI_WINDOW_START + offset;
        BarWindow(Arc::clone(&self.bus)).read(at, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    pub(super) fn status(&self) -> u64 {
        self.read(0x14, 1)
    }

    fn set_status(&self, value: u8) {
        self.bar(0x14, &[value]);
    }

    /// Vector 0 for the configuration, vector 1 for queue 0.
    pub(super) fn enable_msix(&self) {
        for vector in 0..2_u32 {
            let entry = TABLE + u64::from(vector) * 16;
            self.bar(entry, &0xfee0_0000_u64.to_le_bytes());
            self.bar(entry + 8, &(0x30 + vector).to_le_bytes());
            self.bar(entry + 12, &[0; 4]);
        }
        let control = self.capability(CAP_MSIX, 0) + 2;
        self.config_write(control, &[0, MSIX_ENABLE]);
    }

    fn negotiate(&self) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(1);
        self.set_status(3);
        self.bar(0x08, &1_u32.to_le_bytes());
        self.bar(0x0c, &1_u32.to_le_bytes());
        self.bar(0x08, &0_u32.to_le_bytes());
        self.bar(0x0c, &0_u32.to_le_bytes());
        self.set_status(11);
        assert_eq!(self.status(), 11);
    }

    fn configure(&self) {
        let state = self.driver.state;
        self.bar(0x10, &0_u16.to_le_bytes());
        self.bar(0x16, &0_u16.to_le_bytes());
        self.bar(0x18, &state.size.to_le_bytes());
        self.bar(0x1a, &1_u16.to_le_bytes());
        self.bar(0x20, &(state.descriptors as u32).to_le_bytes());
        self.bar(0x24, &((state.descriptors >> 32) as u32).to_le_bytes());
        self.bar(0x28, &state.available.to_le_bytes());
        self.bar(0x30, &state.used.to_le_bytes());
    }

    pub(super) fn start(&self) {
        self.negotiate();
        self.configure();
        self.bar(0x1c, &1_u16.to_le_bytes());
        assert_eq!(self.read(0x1c, 2), 1);
        self.set_status(15);
    }

    pub(super) fn ring(&self) {
        self.bar(doorbells_offset(SLOT), &[0, 0]);
    }

    /// Waits for the device thread.
    pub(super) fn used(&mut self) -> (u32, u32) {
        for _ in 0..10_000 {
            if let Some(used) = self.driver.used() {
                return used;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        panic!("the device used nothing");
    }

    /// The next interrupt; waits for the device thread.
    pub(super) fn interrupt(&self) -> u32 {
        let (address, data) = self.sent.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(address, 0xfee0_0000);
        data
    }
}

#[test]
fn introduces_itself() {
    let machine = Machine::new();
    assert_eq!(machine.config(0), [0xf4, 0x1a, 0x44, 0x10], "entropy");
    assert!(
        machine.config::<1>(8)[0] >= 1,
        "revision of a modern device"
    );
    for (kind, offset, size) in [
        (TYPE_COMMON, 0, 0x38_u32),
        (TYPE_ISR, 0x100, 1),
        (TYPE_DEVICE, 0x400, 5),
        (TYPE_NOTIFY, 0x2000 + 3 * 0x80, 4),
    ] {
        let at = machine.capability(CAP_VENDOR, kind);
        assert_eq!(machine.config::<1>(at + 4), [0], "BAR 0");
        assert_eq!(u32::from_le_bytes(machine.config(at + 8)), offset);
        assert_eq!(u32::from_le_bytes(machine.config(at + 12)), size);
    }
    let notify = machine.capability(CAP_VENDOR, TYPE_NOTIFY);
    assert_eq!(machine.config(notify + 16), [4, 0, 0, 0]);
    let msix = machine.capability(CAP_MSIX, 0);
    assert_eq!(machine.config(msix + 2), [1, 0], "two vectors");
    assert_eq!(u32::from_le_bytes(machine.config(msix + 4)), 0x1000);
    assert_eq!(u32::from_le_bytes(machine.config(msix + 8)), 0x1800);

    machine.bar(0x00, &1_u32.to_le_bytes());
    assert_eq!(machine.read(0x04, 4), 1, "VERSION_1");
    assert_eq!(machine.read(0x12, 2), 1, "queues");
    assert_eq!((machine.read(0x18, 2), machine.read(0x1e, 2)), (16, 0));
    assert_eq!(machine.read(0x10, 2), 0xffff);
    machine.bar(0x16, &1_u16.to_le_bytes());
    assert_eq!(machine.read(0x18, 2), 0, "no such queue");
    assert_eq!(machine.read(0x1a, 2), 0xffff);
    assert_eq!(machine.read(0x400, 4), 0x0403_0201);
    assert_eq!(machine.read(0x403, 8), 0x0504);
}

#[test]
fn runs_resets_and_runs_again() {
    let mut machine = Machine::new();
    machine.enable_msix();
    for round in 1..=3 {
        machine.start();
        assert_eq!(machine.status(), 15);
        assert_eq!(machine.starts.load(Ordering::SeqCst), round);
        for _ in 0..20 {
            machine.driver.add(&[(DATA, 1, true)]);
            machine.ring();
            machine.used();
            assert_eq!(machine.interrupt(), 0x31);
        }
        assert_eq!(machine.read(0x100, 1), 0, "no ISR with MSI-X");

        // More in flight than is looked at in one turn.
        for _ in 0..8 {
            machine.driver.add(&[(DATA, 1, true)]);
        }
        machine.ring();
        machine.set_status(0);
        assert_eq!(machine.stops.load(Ordering::SeqCst), round);
        assert_eq!(machine.status(), 0);
        assert_eq!(machine.read(0x10, 2), 0xffff, "vectors are forgotten");
        while machine.sent.try_recv().is_ok() {}
        // After the reset, nothing touches the rings or interrupts.
        let memory = machine.driver.memory.clone();
        machine.driver = Driver::new(&memory, 0, 8);
        let state = machine.driver.state;
        machine.driver.put(state.available, &[0; 32]);
        machine.driver.put(state.used, &[0; 80]);
        machine.ring();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(machine.driver.used(), None);
        assert!(machine.sent.try_recv().is_err());
    }
}

#[test]
fn a_queue_that_is_wrong_needs_a_reset_and_gets_over_it() {
    let mut machine = Machine::new();
    machine.enable_msix();
    let wrong: [(u64, &[u8]); 5] = [
        (0x18, &[0, 0]),
        (0x18, &[32, 0]),
        (0x18, &[3, 0]),
        (0x20, &[1, 0, 0, 0]),
        (0x2c, &[7, 0, 0, 0]),
    ];
    for (offset, value) in wrong {
        machine.negotiate();
        machine.configure();
        machine.bar(offset, value);
        machine.bar(0x1c, &[1, 0]);
        machine.set_status(15);
        assert_eq!(machine.status(), 15 | 64, "{offset:#x} = {value:?}");
        assert_eq!(machine.interrupt(), 0x30, "of the configuration");
    }
    machine.start();
    machine.driver.add(&[(DATA, 1, true)]);
    machine.ring();
    machine.used();
}

#[test]
fn a_broken_ring_needs_a_reset_and_gets_over_it() {
    let mut machine = Machine::new();
    machine.enable_msix();
    machine.start();
    machine.driver.describe(0, DATA, 1, NEXT, 0);
    machine.driver.offer(0);
    machine.ring();
    assert_eq!(machine.interrupt(), 0x30);
    assert_eq!(machine.status(), 15 | 64);
    assert_eq!(machine.stops.load(Ordering::SeqCst), 1);
    let memory = machine.driver.memory.clone();
    machine.driver = Driver::new(&memory, 0, 8);
    let state = machine.driver.state;
    machine.driver.put(state.available, &[0; 32]);
    machine.start();
    assert_eq!(machine.status(), 15);
    machine.driver.add(&[(DATA, 1, true)]);
    machine.ring();
    machine.used();
}

#[test]
fn a_masked_interrupt_comes_when_it_is_let_through() {
    let mut machine = Machine::new();
    machine.enable_msix();
    machine.start();
    let control = machine.capability(CAP_MSIX, 0) + 2;
    let (mask, unmask): (Vec<_>, Vec<_>) = [
        ((false, TABLE + 28, 1), (false, TABLE + 28, 0)),
        (
            (true, control, u32::from(MSIX_ENABLE | MSIX_MASK) << 8),
            (true, control, u32::from(MSIX_ENABLE) << 8),
        ),
        // Not a bus master any more, and again.
        ((true, 4, 2), (true, 4, 6)),
    ]
    .into_iter()
    .unzip();
    let write = |machine: &Machine, (config, offset, value): (bool, u64, u32)| {
        if config {
            machine.config_write(offset, &value.to_le_bytes()[..2]);
        } else {
            machine.bar(offset, &value.to_le_bytes());
        }
    };
    for (mask, unmask) in mask.into_iter().zip(unmask) {
        write(&machine, mask);
        for _ in 0..3 {
            machine.driver.add(&[(DATA, 1, true)]);
            machine.ring();
            machine.used();
        }
        assert!(machine.sent.try_recv().is_err(), "{mask:?}");
        write(&machine, unmask);
        assert_eq!(machine.interrupt(), 0x31);
        assert!(machine.sent.try_recv().is_err());
        assert_eq!(machine.read(PENDING, 8), 0);
    }
}

#[test]
fn a_driver_without_msix_polls() {
    let mut machine = Machine::new();
    machine.start();
    machine.driver.add(&[(DATA, 1, true)]);
    machine.ring();
    machine.used();
    // It comes a moment after what it tells of.
    while machine.read(0x100, 1) != 1 {
        std::thread::yield_now();
    }
    assert_eq!(machine.read(0x100, 1), 0, "reading clears");
    assert!(machine.sent.try_recv().is_err());
}

#[test]
fn the_device_is_reached_through_configuration_space() {
    let machine = Machine::new();
    let at = machine.capability(CAP_VENDOR, TYPE_PCI);
    let access = |bar: u8, offset: u32, length: u32| {
        machine.config_write(at + 4, &[bar]);
        machine.config_write(at + 8, &offset.to_le_bytes());
        machine.config_write(at + 12, &length.to_le_bytes());
    };
    access(0, 0x14, 1);
    machine.config_write(at + 16, &[1]);
    assert_eq!(machine.config(at + 16), [1]);
    assert_eq!(machine.status(), 1);
    access(0, 0x400, 4);
    assert_eq!(machine.config(at + 16), [1, 2, 3, 4]);
    // Another BAR; widths that differ; not aligned; not there; too wide.
    for (bar, offset, length) in [
        (1, 0x400, 4),
        (0, 0x400, 2),
        (0, 0x402, 4),
        (0, u32::MAX, 4),
        (0, u32::MAX - 3, 4),
        (0, 0x400, 8),
        (0, 0x400, 0),
        (0, 0x400, u32::MAX),
    ] {
        access(bar, offset, length);
        machine.config_write(at + 16, &[0xff; 4]);
        assert_eq!(
            machine.config(at + 16),
            [0; 4],
            "{bar} {offset:#x} {length}"
        );
    }
    assert_eq!(machine.status(), 1);
}

#[test]
fn a_bar_that_moves_takes_its_doorbells_along() {
    let mut machine = Machine::new();
    machine.start();
    let other = home(20) - layout::PCI_WINDOW_START;
    machine.config_write(0x10, &(home(20) as u32).to_le_bytes());
    assert_eq!(machine.status(), 0xff, "nobody there");
    let window = BarWindow(Arc::clone(&machine.bus));
    machine.driver.add(&[(DATA, 1, true)]);
    window.write(other + doorbells_offset(SLOT), &[0, 0]);
    machine.used();
    // Where the doorbells of slot 20 would be there are none of this function's.
    assert_eq!(machine.transport.endpoint().notifiers().len(), 1);
    window.write(other + doorbells_offset(20), &[0, 0]);
    // Onto RAM, onto the APICs, to the end: answered by nobody.
    for bar in [
        0_u32,
        0xfee0_0000,
        0xffff_c000,
        layout::PCI_ECAM_START as u32,
    ] {
        machine.config_write(0x10, &bar.to_le_bytes());
        assert_eq!(machine.status(), 0xff);
    }
    // Not decoded.
    machine.config_write(0x10, &(home(SLOT) as u32).to_le_bytes());
    assert_eq!(machine.status(), 15);
    machine.config_write(4, &[4]);
    assert_eq!(machine.status(), 0xff);
}

#[test]
fn doorbells_of_different_slots_never_meet() {
    for slot in 1..crate::pci::SLOTS {
        for place in 1..crate::pci::SLOTS {
            let moved = home(place) + doorbells_offset(slot);
            for other in (1..crate::pci::SLOTS).filter(|other| *other != slot) {
                assert!(moved.abs_diff(doorbells(other)) >= DOORBELLS_OF_SLOT);
            }
        }
        assert!(doorbells_offset(slot) + DOORBELLS_OF_SLOT <= layout::PCI_BAR_SIZE);
    }
    let all_queues = crate::virtio::queue::MAX_QUEUES * DOORBELL_SIZE;
    assert!(all_queues as u64 <= DOORBELLS_OF_SLOT);
}

/// A driver takes a structure without a byte for a mistake.
#[test]
fn a_device_without_configuration_has_no_structure_for_it() {
    let device = crate::virtio::transport::testing::Wide::<2>;
    let doorbells = Doorbells::new(2).unwrap();
    let (sender, _) = channel();
    let sender = Arc::new(Sent(Mutex::new(sender)));
    let transport = PciTransport::new(&device, memory(), SLOT, doorbells, sender);
    let (mut kinds, mut at) = (Vec::new(), 0x34);
    loop {
        let mut next = [0];
        transport.config_read(at, &mut next);
        let [next] = next;
        if next == 0 {
            break;
        }
        let mut header = [0; 4];
        transport.config_read(next.into(), &mut header);
        kinds.push((header[0], header[3]));
        at = usize::from(next) + 1;
    }
    assert!(!kinds.contains(&(CAP_VENDOR, TYPE_DEVICE)), "{kinds:?}");
    assert!(kinds.contains(&(CAP_VENDOR, TYPE_NOTIFY)), "{kinds:?}");
}

#[test]
fn odd_accesses_read_zero_and_write_nothing() {
    let machine = Machine::new();
    machine.start();
    let width = |offset: u64| match offset {
        0x00 | 0x04 | 0x08 | 0x0c => Some(4),
        0x10 | 0x12 | 0x16..=0x1e => offset.is_multiple_of(2).then_some(2),
        0x14 | 0x15 => Some(1),
        _ => None,
    };
    for len in [1, 2, 3, 4, 5, 8] {
        for offset in (0..common::SIZE).chain([0x38, 0x3c, 0x3a, 0x80, 0x101, 0x3ff]) {
            let address = (0x20..0x38).contains(&offset)
                && (len == 4 && offset.is_multiple_of(4) || len == 8 && offset.is_multiple_of(8));
            if width(offset) == Some(len) || address {
                continue;
            }
            assert_eq!(machine.read(offset, len), 0, "{offset:#x}+{len}");
            machine.bar(offset, &vec![0; len]);
        }
    }
    // Doorbells that are not there, or contradict themselves.
    for (offset, data) in [
        (0, &[1, 0][..]),
        (4, &[1, 0]),
        (4, &[0, 0]),
        (0, &[0; 4]),
        (1, &[0]),
    ] {
        machine.bar(doorbells_offset(SLOT) + offset, data);
    }
    machine.bar(0x1c, &[0, 0]);
    assert_eq!((machine.status(), machine.read(0x1c, 2)), (15, 1));
}

#[test]
fn a_guest_without_a_device_thread_does_not_hang() {
    let machine = Machine::with_worker(drop);
    machine.enable_msix();
    machine.start();
    assert_eq!(machine.status(), 15 | 64);
    machine.set_status(0);
    assert_eq!(machine.status(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is written where, the function answers, and a reset makes it as new.
    #[test]
    fn any_access_is_harmless(
        accesses in prop::collection::vec(
            (
                any::<bool>(),
                prop_oneof![0..0x120_u64, 0xff0..0x1900_u64, 0x2000..0x2300_u64, any::<u64>()],
                0..9_usize,
                prop_oneof![0..16_u64, any::<u64>()],
            ),
            1..200,
        ),
        negotiated: bool,
    ) {
        let machine = Machine::new();
        if negotiated {
            machine.negotiate();
        }
        let (ecam, window) = (Ecam(Arc::clone(&machine.bus)), BarWindow(Arc::clone(&machine.bus)));
        for (config, offset, len, value) in accesses {
            let bytes = value.to_le_bytes();
            let mut data = [0; 8];
            let (device, base): (&dyn BusDevice, u64) = if config {
                (&ecam, (SLOT as u64) << 15)
            } else {
                (&window, home(SLOT) - layout::PCI_WINDOW_START)
            };
            device.write(offset.wrapping_add(base), &bytes[..len]);
            device.read(offset.wrapping_add(base), &mut data[..len]);
        }
        machine.config_write(4, &[6]);
        machine.config_write(0x10, &(home(SLOT) as u32).to_le_bytes());
        let starts = machine.starts.load(Ordering::SeqCst);
        machine.start();
        prop_assert_eq!(machine.status(), 15);
        prop_assert_eq!(machine.starts.load(Ordering::SeqCst), starts + 1);
    }
}

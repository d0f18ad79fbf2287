use super::*;
use crate::virtio::testing::{DATA, Driver, NEXT, memory};
use crate::virtio::transport::testing::Echo;
use crate::virtio::worker::DeviceWorker;
use proptest::prelude::*;
use std::sync::atomic::AtomicUsize;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

struct Machine {
    transport: Arc<MmioTransport>,
    irq: EventFd,
    driver: Driver,
    starts: Arc<AtomicUsize>,
    stops: Arc<AtomicUsize>,
}

impl Machine {
    fn new() -> Self {
        let memory = memory();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let device = Echo::default();
        let (starts, stops) = (Arc::clone(&device.starts), Arc::clone(&device.stops));
        let driver = Driver::new(&memory, 0, 8);
        let transport = MmioTransport::new(&device, memory, irq.try_clone().unwrap()).unwrap();
        let mut worker = DeviceWorker::new().unwrap();
        worker
            .add(Arc::clone(transport.endpoint()), Box::new(device))
            .unwrap();
        // It ends with the test's process, as in the machine.
        std::thread::spawn(move || worker.run());
        Self {
            transport,
            irq,
            driver,
            starts,
            stops,
        }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn negotiate(&self) {
        self.write(0x70, 0);
        assert_eq!(self.read(0x70), 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.write(0x24, 1);
        self.write(0x20, 1);
        self.write(0x24, 0);
        self.write(0x20, 1 << 29);
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11);
    }

    fn configure(&self) {
        let state = self.driver.state;
        self.write(0x30, 0);
        self.write(0x38, u32::from(state.size));
        for (offset, address) in [
            (0x80, state.descriptors),
            (0x90, state.available),
            (0xa0, state.used),
        ] {
            self.write(offset, address as u32);
            self.write(offset + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
        assert_eq!(self.read(0x44), 1);
    }

    fn start(&self) {
        self.negotiate();
        self.configure();
        self.write(0x70, 15);
    }

    /// Waits for the device thread.
    fn used(&mut self) -> (u32, u32) {
        for _ in 0..10_000 {
            if let Some(used) = self.driver.used() {
                return used;
            }
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
        panic!("the device used nothing");
    }
}

#[test]
fn introduces_itself() {
    let machine = Machine::new();
    assert_eq!(machine.read(0), MAGIC);
    assert_eq!(machine.read(4), 2);
    assert_eq!(machine.read(8), 4);
    machine.write(0x14, 1);
    assert_eq!(machine.read(0x10), 1, "VERSION_1");
    assert_eq!(machine.read(0x34), 16);
    machine.write(0x30, 1);
    assert_eq!(machine.read(0x34), 0);
    assert_eq!(machine.read(0xb0), u32::MAX);
    assert_eq!(machine.read(0x100), 0x0403_0201);
    let mut data = [0xee; 8];
    machine.transport.read(0x103, &mut data);
    assert_eq!(data, [4, 5, 0, 0, 0, 0, 0, 0]);
    machine.transport.read(u64::MAX, &mut data);
    assert_eq!(data, [0; 8]);
}

#[test]
fn runs_resets_and_runs_again() {
    let mut machine = Machine::new();
    for round in 1..=3 {
        machine.start();
        assert_eq!(machine.read(0x70), 15);
        assert_eq!(machine.starts.load(Ordering::SeqCst), round);
        for _ in 0..20 {
            machine.driver.add(&[(DATA, 1, true)]);
            machine.write(0x50, 0);
            machine.used();
        }
        assert!(machine.irq.read().is_ok());
        assert_eq!(machine.read(0x60), 1);
        machine.write(0x64, 1);
        assert_eq!(machine.read(0x60), 0);

        // More in flight than is looked at in one turn.
        for _ in 0..8 {
            machine.driver.add(&[(DATA, 1, true)]);
        }
        machine.write(0x50, 0);
        machine.write(0x70, 0);
        assert_eq!(machine.stops.load(Ordering::SeqCst), round);
        assert_eq!((machine.read(0x70), machine.read(0x60)), (0, 0));
        // After the reset, nothing touches the rings.
        let memory = machine.driver.memory.clone();
        machine.driver = Driver::new(&memory, 0, 8);
        let state = machine.driver.state;
        machine.driver.put(state.available, &[0; 32]);
        machine.driver.put(state.used, &[0; 80]);
        machine.write(0x50, 0);
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(machine.driver.used(), None);
    }
}

#[test]
fn a_queue_that_is_wrong_needs_a_reset_and_gets_over_it() {
    let mut machine = Machine::new();
    for (offset, value) in [(0x38, 0), (0x38, 32), (0x38, 3), (0x80, 1), (0x94, 7)] {
        machine.negotiate();
        machine.configure();
        machine.write(0x44, 0);
        machine.write(offset, value);
        machine.write(0x44, 1);
        machine.write(0x70, 15);
        assert_eq!(machine.read(0x70), 15 | 64, "{offset:#x} = {value}");
        assert_eq!(machine.read(0x60), 2);
        assert!(machine.irq.read().is_ok());
    }
    machine.start();
    machine.driver.add(&[(DATA, 1, true)]);
    machine.write(0x50, 0);
    machine.used();
}

#[test]
fn a_broken_ring_needs_a_reset_and_gets_over_it() {
    let mut machine = Machine::new();
    machine.start();
    machine.driver.describe(0, DATA, 1, NEXT, 0);
    machine.driver.offer(0);
    machine.write(0x50, 0);
    for _ in 0..10_000 {
        if machine.read(0x70) == 15 | 64 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
    assert_eq!(machine.read(0x70), 15 | 64);
    assert_eq!(machine.stops.load(Ordering::SeqCst), 1);
    let memory = machine.driver.memory.clone();
    machine.driver = Driver::new(&memory, 0, 8);
    let state = machine.driver.state;
    machine.driver.put(state.available, &[0; 32]);
    machine.start();
    assert_eq!(machine.read(0x70), 15);
    machine.driver.add(&[(DATA, 1, true)]);
    machine.write(0x50, 0);
    machine.used();
}

#[test]
fn odd_accesses_read_zero_and_write_nothing() {
    let machine = Machine::new();
    machine.start();
    for len in [0, 1, 2, 3, 5, 8] {
        for offset in 0..0x100 {
            let mut data = vec![0xff; len];
            machine.transport.read(offset, &mut data);
            assert!(data.iter().all(|&byte| byte == 0));
            machine.transport.write(offset, &vec![0; len]);
        }
    }
    for offset in [0x71, 0x6e, 0x43, u64::MAX - 2, 0x1000] {
        machine.transport.write(offset, &[0; 4]);
    }
    machine.write(0x70, 0x100);
    machine.write(0x50, 1);
    machine.write(0x50, u32::MAX);
    assert_eq!(machine.read(0x70), 15);
}

#[test]
fn a_guest_without_a_device_thread_does_not_hang() {
    let device = Echo::default();
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let transport = MmioTransport::new(&device, memory(), irq).unwrap();
    let mut worker = DeviceWorker::new().unwrap();
    worker
        .add(Arc::clone(transport.endpoint()), Box::new(device))
        .unwrap();
    drop(worker);
    let machine = Machine {
        transport,
        ..Machine::new()
    };
    machine.start();
    assert_eq!(machine.read(0x70), 15 | 64);
    machine.write(0x70, 0);
    assert_eq!(machine.read(0x70), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is written where, the window answers, and a reset makes it as new.
    #[test]
    fn any_access_is_harmless(
        accesses in prop::collection::vec(
            (prop_oneof![0..0x110u64, any::<u64>()], 0..9usize, prop_oneof![0..16u64, any::<u64>()]),
            1..200,
        ),
        negotiated: bool,
    ) {
        let machine = Machine::new();
        if negotiated {
            machine.negotiate();
        }
        for (offset, len, value) in accesses {
            let bytes = value.to_le_bytes();
            machine.transport.write(offset, &bytes[..len]);
            let mut data = [0; 8];
            machine.transport.read(offset, &mut data[..len]);
        }
        let starts = machine.starts.load(Ordering::SeqCst);
        machine.start();
        prop_assert_eq!(machine.read(0x70), 15);
        prop_assert_eq!(machine.starts.load(Ordering::SeqCst), starts + 1);
    }
}

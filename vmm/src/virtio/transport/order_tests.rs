//! What a driver does in another order than the one of section 3.1, over MMIO and over PCI.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::registers::{self, Attached, Registers};
use super::testing::Echo;
use crate::memory::{GuestMemory, layout};
use crate::virtio::device::VirtioDevice;
use crate::virtio::queue::QueueState;
use crate::virtio::testing::{DATA, Driver, memory};
use crate::virtio::worker::DeviceWorker;

const ATTACH: [fn(&dyn VirtioDevice, &GuestMemory) -> Attached; 2] =
    [registers::mmio, registers::pci];
const SIZE: u16 = 8;

struct Machine {
    registers: Arc<dyn Registers>,
    memory: GuestMemory,
    driver: Driver,
    starts: Arc<AtomicUsize>,
}

/// The same device in each kind of window.
fn machines() -> impl Iterator<Item = Machine> {
    ATTACH.into_iter().map(|attach| {
        let memory = memory();
        let device = Echo::default();
        let starts = Arc::clone(&device.starts);
        let (registers, endpoint) = attach(&device, &memory);
        let mut worker = DeviceWorker::new().unwrap();
        worker.add(endpoint, Box::new(device)).unwrap();
        // It ends with the test's process, as in the machine.
        std::thread::spawn(move || worker.run());
        registers.reach();
        let driver = Driver::new(&memory, 0, SIZE);
        Machine {
            registers,
            memory,
            driver,
            starts,
        }
    })
}

fn areas(state: &QueueState) -> [u64; 3] {
    [state.descriptors, state.available, state.used]
}

impl Machine {
    /// Writes each of these to the status register, and says what it shows then.
    fn set(&self, statuses: &[u8]) -> u8 {
        for status in statuses {
            self.registers.set_status(*status);
        }
        self.registers.status()
    }

    fn accept_version_1(&self) {
        self.registers.accept(1, 1);
        self.registers.accept(0, 0);
    }

    /// As far as the features, in order.
    fn negotiate(&self) {
        assert_eq!(self.set(&[0, 1, 3]), 3);
        self.accept_version_1();
        assert_eq!(self.set(&[11]), 11);
    }

    /// Starts with these rings, which are empty.
    fn start_with(&mut self, areas: [u64; 3]) -> u8 {
        self.negotiate();
        self.driver = Driver::new(&self.memory, 0, SIZE);
        let state = self.driver.state;
        self.driver.put(state.available, &[0; 32]);
        self.driver.put(state.used, &[0; 80]);
        self.registers.set_up_queue(0, SIZE, areas);
        self.set(&[15])
    }

    fn start(&mut self) {
        let areas = areas(&self.driver.state);
        assert_eq!(self.start_with(areas), 15);
    }

    fn starts(&self) -> usize {
        self.starts.load(Ordering::SeqCst)
    }

    fn serve(&mut self) {
        self.driver.add(&[(DATA, 1, true)]);
        self.registers.ring(0);
        let began = Instant::now();
        while self.driver.used().is_none() {
            assert!(began.elapsed() < Duration::from_secs(20));
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_status_out_of_order_is_not_taken() {
    for mut machine in machines() {
        let orders: [(&[u8], u8); 14] = [
            (&[2], 0),
            (&[4], 0),
            (&[8], 0),
            (&[6], 0),
            (&[12], 0),
            (&[14], 0),
            (&[64], 0),
            (&[1, 4], 1),
            (&[1, 9], 1),
            (&[1, 5, 13], 1),
            (&[1, 3, 7], 3),
            // Features that lack VERSION_1, step by step and at once.
            (&[1, 3, 11], 3),
            (&[15], 3),
            (&[1, 128, 3, 11, 15], 129),
        ];
        for (order, expected) in orders {
            assert_eq!(machine.set(&[0]), 0);
            assert_eq!(machine.set(order), expected, "{order:?}");
        }
        assert_eq!(machine.starts(), 0);
        // Too early for features: before DRIVER.
        machine.set(&[0, 1]);
        machine.accept_version_1();
        assert_eq!(machine.set(&[3, 11]), 3);
        // Features that nobody offered.
        machine.accept_version_1();
        machine.registers.accept(1, 1 | 1 << 31);
        assert_eq!(machine.set(&[11, 15]), 3);
        machine.negotiate();
        assert_eq!(
            machine.set(&[128 | 15, 15]),
            128 | 11,
            "a driver that failed"
        );
        assert_eq!(machine.starts(), 0);

        machine.start();
        // No bit goes but by a reset, none is set that is the device's, and nothing starts twice.
        for status in [1, 3, 4, 11, 15, 64, 15 | 64, 15 | 16 | 32] {
            assert_eq!(machine.set(&[status]), 15, "{status}");
        }
        assert_eq!(machine.starts(), 1);
        machine.serve();
        assert_eq!(machine.set(&[128]), 15 | 128);
        machine.start();
        machine.serve();
        assert_eq!(machine.starts(), 2);
    }
}

#[test]
fn a_queue_configured_too_early_is_none() {
    for mut machine in machines() {
        let places = areas(&machine.driver.state);
        for early in [&[0][..], &[0, 1], &[0, 1, 3]] {
            machine.set(early);
            machine.registers.set_up_queue(0, SIZE, places);
            machine.set(&[1, 3]);
            machine.accept_version_1();
            // A queue that there is would be looked into at once, before a reset is heard.
            machine.driver.add(&[(DATA, 1, true)]);
            assert_eq!(machine.set(&[11, 15]), 15);
            machine.registers.ring(0);
            assert_eq!(machine.set(&[0]), 0);
            assert_eq!(machine.driver.used(), None, "{early:?}");
            machine.driver.set_available_index(0);
        }
        machine.start();
        machine.serve();
    }
}

#[test]
fn what_is_configured_after_the_start_changes_nothing() {
    for mut machine in machines() {
        machine.start();
        machine.serve();
        let own = machine.driver.state;
        // Good rings of another queue, which hold a request; the own ones by turns; and no memory.
        let mut other = Driver::new(&machine.memory, 1, SIZE);
        other.add(&[(DATA, 1, true)]);
        let [descriptors, available, used] = areas(&other.state);
        let hole = layout::MMIO_HOLE_START;
        for places in [
            [descriptors, available, used],
            [own.descriptors, available, own.used],
            [own.descriptors, own.available, used],
            [0; 3],
            [hole; 3],
            [u64::MAX; 3],
        ] {
            for size in [SIZE, 16, 4, 1, 0, 3, u16::MAX] {
                machine.registers.disable_queue(0);
                machine.registers.set_up_queue(0, size, places);
                machine.registers.set_up_queue(1, size, places);
                for page in 0..3 {
                    machine.registers.accept(page, u32::MAX);
                }
                assert_eq!(machine.set(&[15]), 15);
                machine.serve();
            }
        }
        assert_eq!(machine.starts(), 1);
        assert_eq!(other.used(), None);
        // What was written then is not there after a reset either.
        machine.start();
        machine.serve();
    }
}

#[test]
fn rings_that_overlap_or_lie_in_the_hole_need_a_reset_and_get_over_it() {
    for mut machine in machines() {
        let [d, a, u] = areas(&machine.driver.state);
        let n = u64::from(SIZE);
        let hole = layout::MMIO_HOLE_START;
        for places in [
            // One on the other, by all and by their last bytes, in every order.
            [d, d, u],
            [d, a, d],
            [d, a, a],
            [d, d + n * 16 - 2, u],
            [d, a, d + n * 16 - 4],
            [d, a, a + n * 2 + 4],
            [u + n * 8, a, u],
            [d, u + n * 8 + 4, u],
            [hole, a, u],
            [d, layout::VIRTIO_MMIO_START, u],
            [d, a, layout::PCI_ECAM_START],
            [d, a, layout::LAPIC_START],
        ] {
            let status = machine.start_with(places);
            assert_eq!(status, 15 | 64, "{places:x?}");
            machine.registers.ring(0);
            assert_eq!(machine.starts(), 0, "{places:x?}");
        }
        machine.start();
        machine.serve();
        assert_eq!(machine.starts(), 1);
    }
}

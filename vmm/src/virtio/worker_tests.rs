use super::*;
use crate::bus::BusDevice;
use crate::virtio::device::{DeviceType, Traits};
use crate::virtio::testing::memory;
use std::sync::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Does nothing, says how it goes on, and writes down its turns.
struct Busy {
    name: char,
    queues: &'static [u16],
    turns: Arc<Mutex<String>>,
    progress: fn() -> Progress,
}

impl VirtioDevice for Busy {
    fn traits(&self) -> Traits {
        Traits {
            device_type: DeviceType::Entropy,
            features: 0,
            queue_sizes: self.queues,
        }
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn start(&mut self, _: Queues, _: u64, _: DeviceIo) -> Result<(), device::Error> {
        Ok(())
    }
    fn stop(&mut self) -> QueueStates {
        QueueStates::default()
    }
    fn handle(&mut self, _: Event) -> Result<Progress, device::Error> {
        self.turns.lock().unwrap().push(self.name);
        Ok((self.progress)())
    }
}

/// What a driver does to start a device.
fn start(transport: &Arc<MmioTransport>) {
    for (offset, value) in [(0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x70, 15)] {
        transport.write(offset, &u32::to_le_bytes(value));
    }
}

#[test]
fn a_busy_device_does_not_starve_another() {
    let turns: Arc<Mutex<String>> = Arc::default();
    let mut worker = DeviceWorker::new().unwrap();
    let mut transports = Vec::new();
    for (name, queues) in [('a', &[16, 16, 16][..]), ('b', &[16])] {
        let device = Busy {
            name,
            queues,
            turns: Arc::clone(&turns),
            progress: || Progress::More,
        };
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let transport = MmioTransport::new(Box::new(device), memory(), irq).unwrap();
        worker.add(Arc::clone(&transport)).unwrap();
        transports.push(transport);
    }
    std::thread::spawn(move || worker.run());
    let write = |i: usize, offset: u64, value: u32| {
        transports[i].write(offset, &value.to_le_bytes());
    };
    transports.iter().for_each(start);
    for (i, queue) in [(0, 0), (0, 1), (0, 2), (1, 0)] {
        write(i, 0x50, queue);
    }
    // Although `a` never gets done, with three things at once, `b` starts, takes turns with it, and both stop.
    for _ in 0..10_000 {
        if turns.lock().unwrap().matches("abab").count() > 10 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
    write(0, 0x70, 0);
    write(1, 0x70, 0);
    let turns = turns.lock().unwrap().clone();
    assert!(turns.matches("abab").count() > 10, "{turns:.100}");
}

#[test]
fn what_a_rate_limit_holds_back_goes_on_in_time_and_not_before() {
    const HELD_BACK: Duration = Duration::from_millis(20);
    let turns: Arc<Mutex<String>> = Arc::default();
    let mut worker = DeviceWorker::new().unwrap();
    let device = Busy {
        name: 'a',
        queues: &[16],
        turns: Arc::clone(&turns),
        progress: || Progress::Later(Instant::now() + HELD_BACK),
    };
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let transport = MmioTransport::new(Box::new(device), memory(), irq).unwrap();
    worker.add(Arc::clone(&transport)).unwrap();
    std::thread::spawn(move || worker.run());
    let began = Instant::now();
    start(&transport);
    transport.write(0x50, &0u32.to_le_bytes());
    while turns.lock().unwrap().len() < 12 {
        std::thread::sleep(Duration::from_millis(1));
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "it never goes on"
        );
    }
    // Two of them are the start's and the doorbell's.
    assert!(began.elapsed() >= HELD_BACK * 9, "it spins");
    transport.write(0x70, &0u32.to_le_bytes());
    let stopped = turns.lock().unwrap().len();
    std::thread::sleep(HELD_BACK * 3);
    assert_eq!(turns.lock().unwrap().len(), stopped, "a reset forgets it");
}

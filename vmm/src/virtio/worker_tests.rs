use super::*;
use crate::bus::BusDevice;
use crate::virtio::config_space::ConfigSpace;
use crate::virtio::device::{DeviceType, Traits};
use crate::virtio::rate_limiter::LimiterOptions;
use crate::virtio::testing::memory;
use crate::virtio::transport::mmio::MmioTransport;
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
    fn config(&self) -> Arc<ConfigSpace> {
        Arc::default()
    }
    fn start(&mut self, _: Queues, _: u64, _: DeviceIo) -> Result<(), device::Error> {
        Ok(())
    }
    fn stop(&mut self) -> QueueStates {
        QueueStates::default()
    }
    fn hold(&mut self) -> Option<QueueStates> {
        None
    }
    fn handle(&mut self, _: Event) -> Result<Progress, device::Error> {
        self.turns.lock().unwrap().push(self.name);
        Ok((self.progress)())
    }
    fn update(&mut self, _: Update) -> Result<Answer, UpdateError> {
        Ok(Answer::Done)
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
        let transport = MmioTransport::new(&device, memory(), irq).unwrap();
        worker
            .add(Arc::clone(transport.endpoint()), Box::new(device))
            .unwrap();
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
    let transport = MmioTransport::new(&device, memory(), irq).unwrap();
    worker
        .add(Arc::clone(transport.endpoint()), Box::new(device))
        .unwrap();
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

/// A worker on a thread of its own, with one device that is held back for an hour.
fn held_back() -> (WorkerHandle, Arc<MmioTransport>, Arc<Mutex<String>>) {
    let turns: Arc<Mutex<String>> = Arc::default();
    let mut worker = DeviceWorker::new().unwrap();
    let device = Busy {
        name: 'a',
        queues: &[16],
        turns: Arc::clone(&turns),
        progress: || Progress::Later(Instant::now() + Duration::from_secs(3600)),
    };
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let transport = MmioTransport::new(&device, memory(), irq).unwrap();
    let index = worker.add(Arc::clone(transport.endpoint()), Box::new(device));
    assert_eq!(index.unwrap(), 0);
    let handle = worker.handle();
    std::thread::spawn(move || worker.run());
    start_and_kick(&transport);
    (handle, transport, turns)
}

fn start_and_kick(transport: &Arc<MmioTransport>) {
    start(transport);
    transport.write(0x50, &0u32.to_le_bytes());
}

fn wait_for_turns(turns: &Mutex<String>, count: usize) {
    for _ in 0..20_000 {
        if turns.lock().unwrap().len() >= count {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("the device gets no turn");
}

#[test]
fn a_new_limit_lets_go_on_what_the_old_one_held_back() {
    let (handle, _transport, turns) = held_back();
    let update = || Update::Limits(LimiterOptions::default());
    wait_for_turns(&turns, 1);
    let before = turns.lock().unwrap().len();
    assert_eq!(handle.update(0, update()).unwrap(), Answer::Done);
    wait_for_turns(&turns, before + 1);
    let missing = handle.update(1, update());
    assert!(matches!(missing, Err(UpdateError::NoDevice)), "{missing:?}");
}

#[test]
fn devices_come_and_go_while_the_thread_runs() {
    let (handle, transport, turns) = held_back();
    wait_for_turns(&turns, 1);
    let device = handle.remove(0).unwrap();
    assert!(handle.remove(0).is_none());
    // Its driver gets no answer, and does not wait for one.
    transport.write(0x70, &0u32.to_le_bytes());
    start(&transport);
    let mut status = [0; 4];
    transport.read(0x70, &mut status);
    assert_eq!(u32::from_le_bytes(status), 15 | 64, "NEEDS_RESET");

    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let transport = MmioTransport::new(device.as_ref(), memory(), irq).unwrap();
    let added = handle.add(Arc::clone(transport.endpoint()), device);
    assert_eq!(added.unwrap().unwrap(), 0, "the place is used again");
    let before = turns.lock().unwrap().len();
    start_and_kick(&transport);
    wait_for_turns(&turns, before + 1);
}

#[test]
fn jobs_run_on_the_device_thread() {
    let (handle, ..) = held_back();
    let name = || std::thread::current().id();
    let there = handle.run(name).unwrap();
    assert_ne!(there, name());
    assert_eq!(handle.run(name), Some(there));
}

#[test]
fn nobody_waits_for_a_worker_that_has_ended() {
    let worker = DeviceWorker::new().unwrap();
    let handle = worker.handle();
    drop(worker);
    let update = handle.update(0, Update::Limits(LimiterOptions::default()));
    assert!(matches!(update, Err(UpdateError::NoThread)), "{update:?}");
    assert!(handle.remove(0).is_none());
    assert!(handle.run(|| ()).is_none());
}

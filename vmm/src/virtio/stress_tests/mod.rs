//! A hostile guest: two vCPUs do to every device at once what a driver would and would not, over MMIO and over PCI, while
//! programs on the host come and go, and so does one of the devices. Nothing may panic, hang or make a system call
//! that a sealed thread may not make; the process may not grow, and rests when the guest does; and every device must
//! work after a reset. `CASEMATE_STRESS_SECONDS` makes it last
//! longer.

mod back_end;
mod footprint;
mod host;
mod vcpu;

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, RwLock};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use self::back_end::SERVED;
use self::footprint::Footprint;
use self::host::Host;
use self::vcpu::Vcpu;
use super::block::{Block, BlockOptions, CacheType, Engine, LayerOptions};
use super::console::{Console, Output, Port, Size};
use super::device::VirtioDevice;
use super::pmem::{Pmem, PmemOptions};
use super::rate_limiter::LimiterOptions;
use super::testing::{DATA, END};
use super::transport::registers::{self, Attached, Registers};
use super::worker::WorkerHandle;
use super::{Balloon, BalloonOptions, DeviceWorker, Entropy, Mem, MemOptions, net, vsock};
use crate::lockdown::{self, Role, Stage};
use crate::memory::{self, GuestMemory, add_hotplug, allocate_with};

const QUEUES: u64 = 5;
const SIZE: u16 = 8;
/// Bytes of the disk.
const DISK: u64 = 64 * 512;
/// Where persistent memory would be: above all that devices know of.
const PMEM: u64 = 8 << 30;
/// How long the device thread may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which device is which, as far as it matters.
const BLOCK: usize = 0;
const ENTROPY: usize = 1;
const CONSOLE: usize = 6;
const PERSISTENT: usize = 7;
const LAYERED: usize = 8;
const CARD: usize = 9;
const SERVICE: usize = 10;
const FAR: usize = 11;
const FAR_DIRECTORY: usize = 12;
/// It comes and goes.
const GUEST: usize = 13;
/// Pairs of queues of one of the cards: with its control queue it has [`QUEUES`].
const PAIRS: usize = 2;

/// Puts a device where its driver reaches it.
type Attach = fn(&dyn VirtioDevice, &GuestMemory) -> Attached;

/// SplitMix64.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// A number from where things break.
    fn edge(&mut self) -> u64 {
        let near = self.one(&[0, 1 << 12, 1 << 16, END, 0xc000_0000, 1 << 32, u64::MAX]);
        near.wrapping_add(self.below(64)).wrapping_sub(32)
    }
}

/// Where the vCPUs find the devices.
#[derive(Clone)]
struct Devices(Arc<[RwLock<Arc<dyn Registers>>]>);

impl Devices {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn at(&self, device: usize) -> Arc<dyn Registers> {
        Arc::clone(&self.0[device].read().unwrap())
    }

    fn replace(&self, device: usize, registers: Arc<dyn Registers>) {
        *self.0[device].write().unwrap() = registers;
    }
}

#[test]
fn no_guest_and_no_host_can_break_the_devices_on_mmio() {
    let name = "virtio::stress_tests::no_guest_and_no_host_can_break_the_devices_on_mmio";
    stress(name, registers::mmio);
}

#[test]
fn no_guest_and_no_host_can_break_the_devices_on_pci() {
    let name = "virtio::stress_tests::no_guest_and_no_host_can_break_the_devices_on_pci";
    stress(name, registers::pci);
}

fn stress(test: &str, attach: Attach) {
    // A violation of a filter ends the process.
    if !crate::testing::alone(test) {
        return;
    }
    lockdown::install_violation_reporter().unwrap();
    let seconds = std::env::var("CASEMATE_STRESS_SECONDS").map_or(2, |text| text.parse().unwrap());
    let duration = Duration::from_secs(seconds);
    let shared = memory::Options {
        shared: true,
        ..memory::Options::default()
    };
    let shared = allocate_with(END, shared).unwrap();
    let memory = add_hotplug(&shared, 64 << 20, 2 << 20).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (all, host) = everything(&shared, &memory, &directory.path().join("v.sock"));
    let mut worker = DeviceWorker::new().unwrap();
    let operator = worker.handle();
    let devices = all.into_iter().enumerate().map(|(index, device)| {
        // Back-ends know nothing of memory that comes and goes.
        let memory = if index < FAR { &memory } else { &shared };
        let (registers, endpoint) = attach(device.as_ref(), memory);
        worker.add(endpoint, device).unwrap();
        RwLock::new(registers)
    });
    let devices = Devices(devices.collect());
    spawn(move || {
        lockdown::enter(Role::Device, Stage::Sealed).unwrap();
        worker.run();
    });

    let end = Instant::now() + duration;
    let (done, finished) = channel();
    for seed in [1, 2] {
        let mut vcpu = Vcpu {
            random: Random(seed),
            memory: memory.clone(),
            devices: devices.clone(),
        };
        let done = done.clone();
        spawn(move || {
            lockdown::enter(Role::Vcpu, Stage::Sealed).unwrap();
            let mut acts = 0_u64;
            while Instant::now() < end {
                vcpu.act();
                acts += 1;
            }
            done.send(acts).unwrap();
        });
    }
    let over = Arc::new(AtomicBool::new(false));
    let outside = outside(host, &over);
    let exchange = exchange(operator, attach, &shared, &devices, &over);
    // By then everything has been used.
    sleep(Duration::from_secs(1).min(duration / 2));
    let first = Footprint::now();
    for _ in 0..2 {
        let acts = finished.recv_timeout(duration + PATIENCE);
        let acts = acts.expect("no vCPU hangs");
        println!("{acts} acts");
        assert!(acts > 100);
    }
    let busy = Footprint::now();
    over.store(true, Ordering::SeqCst);
    let host = outside.join().unwrap();
    println!("{} exchanges", exchange.join().unwrap());
    busy.has_not_grown_since(&first);
    // Whatever the guest has left in its rings.
    footprint::rests();

    let (done, finished) = channel();
    spawn(move || {
        every_device_works(memory, devices, host);
        done.send(()).unwrap();
    });
    finished.recv_timeout(PATIENCE).expect("every device works");
    footprint::rests();
    Footprint::now().has_not_grown_since(&first);
}

/// Every device, and what is behind them. Of the `memory`, back-ends get what is `shared`.
fn everything(
    shared: &GuestMemory,
    memory: &GuestMemory,
    vsock_path: &Path,
) -> (Vec<Box<dyn VirtioDevice>>, Host) {
    let disk = image(DISK);
    let limits = LimiterOptions::default();
    let block = BlockOptions {
        id: "disk".into(),
        file: disk.try_clone().unwrap(),
        read_only: false,
        layer: None,
        queues: 1,
        engine: Engine::Async,
        cache: CacheType::Writeback,
        discard: true,
        limits,
    };
    let layered = BlockOptions {
        id: "layered".into(),
        // Two of the layer's clusters, of which it has room for one.
        file: image(128 << 10),
        read_only: false,
        layer: Some(LayerOptions {
            file: image(1 << 20),
            most: 64 << 10,
        }),
        queues: 4,
        engine: Engine::Sync,
        cache: CacheType::Writeback,
        discard: true,
        limits,
    };
    let (net, tap) = net::testing::fake();
    let (card, mut taps) = net::testing::fake_with_pairs(PAIRS);
    let (service, other_tap) = net::testing::fake_with_service();
    taps.extend([tap, other_tap]);
    let vsock = vsock::testing::reachable(UnixListener::bind(vsock_path).unwrap());
    let balloon = BalloonOptions {
        amount_mib: 1,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        free_page_reporting: true,
    };
    let mem = MemOptions {
        region: Arc::clone(memory.hotplug().unwrap()),
        requested_size_mib: 32,
    };
    let port = Port::new(Size::default()).unwrap();
    let output = Arc::new(Output::new().unwrap());
    let said = host::speak(Arc::clone(&output));
    let pmem = PmemOptions {
        id: "pmem".into(),
        file: image(1 << 20),
        read_only: false,
        limits,
    };
    let (pmem, _) = Pmem::map(pmem).unwrap();
    let [far, far_directory, _] = back_end::kinds();
    let devices: Vec<Box<dyn VirtioDevice>> = vec![
        Box::new(Block::new(block).unwrap()),
        Box::new(Entropy::default()),
        Box::new(net),
        Box::new(vsock),
        Box::new(Balloon::new(balloon).unwrap()),
        Box::new(Mem::new(mem).unwrap()),
        Box::new(Console::new(Arc::clone(&port), output)),
        Box::new(pmem.at(PMEM)),
        Box::new(Block::new(layered).unwrap()),
        Box::new(card),
        Box::new(service),
        Box::new(back_end::device(&far, shared, None)),
        Box::new(back_end::device(&far_directory, shared, None)),
        Box::new(back_end::device(&far, shared, Some(Random(5)))),
    ];
    let host = Host::new(vsock_path.to_owned(), taps, disk, port, said);
    (devices, host)
}

/// So many zeroes.
fn image(len: u64) -> std::fs::File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file
}

/// The programs on the host, until it is `over`.
fn outside(mut host: Host, over: &Arc<AtomicBool>) -> JoinHandle<Host> {
    let over = Arc::clone(over);
    spawn(move || {
        while !over.load(Ordering::SeqCst) {
            host.act();
            sleep(Duration::from_micros(200));
        }
        host.disk.set_len(DISK).unwrap();
        host
    })
}

/// An operator who takes the device away whose back-end has no faith, whatever it is doing, and plugs another one in,
/// until it is `over`. What such a back-end leaves behind cannot be asked to work; so the last one keeps faith.
fn exchange(
    operator: WorkerHandle,
    attach: Attach,
    shared: &GuestMemory,
    devices: &Devices,
    over: &Arc<AtomicBool>,
) -> JoinHandle<u64> {
    let (shared, devices, over) = (shared.clone(), devices.clone(), Arc::clone(over));
    spawn(move || {
        let mut random = Random(6);
        let mut exchanges = 0;
        loop {
            let last = over.load(Ordering::SeqCst);
            let faithless = (!last).then(|| Random(random.next()));
            let kinds = back_end::kinds();
            let kind = &kinds[if last { 0 } else { random.below(3) as usize }];
            let device = Box::new(back_end::device(kind, &shared, faithless));
            let (registers, endpoint) = attach(device.as_ref(), &shared);
            operator.remove(GUEST as u16).unwrap();
            let index = operator.add(endpoint, device).unwrap().unwrap();
            assert_eq!(usize::from(index), GUEST);
            devices.replace(GUEST, registers);
            exchanges += 1;
            if last {
                return exchanges;
            }
            sleep(Duration::from_millis(random.below(40)));
        }
    })
}

/// A well-behaved driver resets all devices, and finds everything working.
fn every_device_works(memory: GuestMemory, devices: Devices, mut host: Host) {
    let mut vcpu = Vcpu {
        random: Random(4),
        memory,
        devices,
    };
    for device in 0..vcpu.devices.len() {
        let registers = vcpu.devices.at(device);
        registers.reach();
        registers.set_status(0);
        vcpu.put(
            vcpu.driver(device, 0).state.descriptors,
            &[0; QUEUES as usize * 0x4000],
        );
    }
    for device in 0..vcpu.devices.len() {
        vcpu.start(device, true);
        let status = vcpu.devices.at(device).status();
        assert_eq!(status, 15, "device {device}");
    }
    // A disk's request for its name, and one of persistent memory to be flushed.
    vcpu.put(DATA, &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    vcpu.put(DATA + 16, &[0; 4]);
    vcpu.put(DATA + 32, b"well said");
    let name = (DATA, 16, false);
    let answer = |n: u64, len| (DATA + 0x1000 * n, len, true);
    host.port.offer(b"typed");
    vcpu.put(DATA + 0x100, &[0; 72]);
    let service = crate::mmds::DEFAULT_ADDRESS.octets();
    vcpu.put(DATA + 0x200, &net::testing::who_has(service));
    host.send_frames();
    let requests = [
        (BLOCK, 0, vec![name, answer(1, 20), answer(2, 1)]),
        (ENTROPY, 0, vec![answer(3, 32)]),
        (CONSOLE, 0, vec![answer(4, 1)]),
        (CONSOLE, 1, vec![(DATA + 32, 9, false)]),
        (PERSISTENT, 0, vec![(DATA + 16, 4, false), answer(5, 4)]),
        (FAR, 1, vec![name, answer(6, 20)]),
        (GUEST, 0, vec![name, answer(7, 20)]),
        (LAYERED, 3, vec![name, answer(8, 20), answer(9, 1)]),
        // A frame by each pair, and one that comes.
        (CARD, 1, vec![(DATA + 0x100, 72, false)]),
        (CARD, 3, vec![(DATA + 0x100, 72, false)]),
        (CARD, 0, vec![answer(10, 2000)]),
        (CARD, 2, vec![answer(11, 2000)]),
        // Whose is the service's address? Its answer.
        (SERVICE, 1, vec![(DATA + 0x200, 54, false)]),
        (SERVICE, 0, vec![answer(12, 2000)]),
        (FAR_DIRECTORY, 1, vec![name, answer(13, 20)]),
    ];
    for (device, queue, chain) in requests {
        let mut driver = vcpu.driver(device, queue);
        driver.add(&chain);
        vcpu.devices.at(device).ring(queue as u16);
        while driver.used().is_none() {
            sleep(Duration::from_millis(1));
        }
    }
    let got = |n: u64, len| vcpu.driver(0, 0).get(DATA + 0x1000 * n, len);
    assert_eq!(got(1, 4), b"disk");
    assert_ne!(got(3, 32), [0; 32]);
    assert_eq!(got(5, 4), [0; 4]);
    assert_eq!(got(8, 7), b"layered");
    assert_eq!(got(12, 44)[40..], service);
    for far in [6, 7, 13] {
        assert_eq!(got(far, SERVED.len()), SERVED);
    }
    host.await_said(b"well said");
}

//! A hostile guest: two vCPUs do to every device at once what a driver would and would not, over MMIO and over PCI, while
//! programs on the host come and go. Nothing may panic, hang or make a system call that a sealed
//! thread may not make, and every device must work after a reset. `CASEMATE_STRESS_SECONDS` makes it last longer.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::spawn;
use std::time::{Duration, Instant};

use vm_memory::{Bytes as _, GuestAddress};

use super::block::{Block, BlockOptions, CacheType};
use super::device::VirtioDevice;
use super::testing::{DATA, Driver, END, INDIRECT, NEXT, WRITE, memory};
use super::transport::registers::{self, Attached, Registers};
use super::{Balloon, BalloonOptions, DeviceWorker, Entropy, Mem, MemOptions, net, vsock};
use crate::lockdown::{self, Role, Stage};
use crate::memory::{GuestMemory, add_hotplug};

const QUEUES: u64 = 5;
const SIZE: u16 = 8;
/// How long the device thread may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// SplitMix64.
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

struct Vcpu {
    random: Random,
    memory: GuestMemory,
    devices: Vec<Arc<dyn Registers>>,
}

impl Vcpu {
    fn driver(&self, device: usize, queue: u64) -> Driver {
        let index = device as u64 * QUEUES + queue;
        Driver::new(&self.memory, index as u16, SIZE)
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        // What lies outside of memory is for the device to notice.
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    /// Starts a device as a driver does; `honest`, or with rings anywhere.
    fn start(&mut self, device: usize, honest: bool) {
        let features = if honest { 0 } else { self.random.next() as u32 };
        let registers = Arc::clone(&self.devices[device]);
        registers.reach();
        for status in [0, 1, 3] {
            registers.set_status(status);
        }
        for page in [0, 1] {
            let offered = registers.offered(page);
            registers.accept(page, if page == 1 { 1 } else { offered & features });
        }
        registers.set_status(11);
        for queue in 0..QUEUES {
            let state = self.driver(device, queue).state;
            let areas = [state.descriptors, state.available, state.used].map(|place| {
                let wild = !honest && self.random.below(64) == 0;
                if wild { self.random.edge() } else { place }
            });
            registers.set_up_queue(queue as u16, SIZE, areas);
        }
        registers.set_status(15);
    }

    /// Something that a device may take for a header.
    fn header(&mut self) -> Vec<u8> {
        let random = &mut self.random;
        let mut bytes: Vec<u8> = (0..64).map(|_| random.next() as u8).collect();
        match random.below(4) {
            // A packet of the socket device: few ports, so that they meet.
            0 | 1 => {
                bytes[..16].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
                for (at, end) in [(16, 4), (20, 4), (24, 9000)] {
                    let value = random.below(end) as u32;
                    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
                }
                bytes[28..32].copy_from_slice(&[1, 0, random.below(9) as u8, 0]);
                bytes[32] &= 3;
            }
            // A request for the disk.
            2 => {
                bytes[..4].copy_from_slice(&random.one(&[0_u32, 1, 4, 8, 9]).to_le_bytes());
                let sector = random.one(&[0, 1, 63, 64, u64::MAX]);
                bytes[8..16].copy_from_slice(&sector.to_le_bytes());
            }
            // A request for memory: few blocks, so that they come and go.
            3 if random.below(2) == 0 => {
                bytes[..2].copy_from_slice(&[random.below(5) as u8, 0]);
                let block = (4 << 30) + random.below(33) * (2 << 20);
                bytes[8..16].copy_from_slice(&block.to_le_bytes());
                bytes[16..18].copy_from_slice(&[random.below(4) as u8, 0]);
            }
            _ => bytes[..12].fill(0),
        }
        bytes
    }

    /// Makes a chain available: likely, odd or malformed.
    fn offer(&mut self, device: usize, queue: u64) {
        let mut driver = self.driver(device, queue);
        let place = DATA + self.random.below(8) * 0x1_0000;
        let header = self.header();
        self.put(place, &header);
        let head = self.random.below(u64::from(SIZE)) as u16;
        let (table, first) = if self.random.below(4) == 0 {
            driver.describe(head, DATA + 0x18_0000, 64, INDIRECT, 0);
            (DATA + 0x18_0000, 0)
        } else {
            (driver.state.descriptors, head)
        };
        let sizes = [0, 1, 16, 20, 44, 64, 512, 1024, 4096, 0x1_0000, 0x10_0000];
        let mut writable = self.random.below(3) == 0;
        let count = 1 + self.random.below(4) as u16;
        for n in 0..count {
            let wild = self.random.below(200) == 0;
            let address = if wild {
                self.random.edge()
            } else {
                place + u64::from(n) * 0x40
            };
            let len = if n == 0 && !writable {
                self.random.one(&[16, 44, 64, 2048])
            } else {
                self.random.one(&sizes)
            };
            let more = if n + 1 < count { NEXT } else { 0 };
            let write = if writable { WRITE } else { 0 };
            let odd = self.random.below(300) == 0;
            let flags = if odd {
                self.random.next() as u16
            } else {
                more | write
            };
            driver.describe_at(
                table,
                (first + n) % SIZE,
                address,
                len,
                flags,
                (first + n + 1) % SIZE,
            );
            writable |= self.random.below(2) == 0;
        }
        let mut index = [0; 2];
        let at = GuestAddress(driver.state.available + 2);
        self.memory.read_slice(&mut index, at).unwrap();
        driver.set_available_index(u16::from_le_bytes(index));
        driver.offer(head);
        if self.random.below(500) == 0 {
            driver.set_available_index(self.random.next() as u16);
        }
        self.devices[device].ring(queue as u16);
    }

    fn act(&mut self) {
        let device = self.random.below(self.devices.len() as u64) as usize;
        let queue = self.random.below(QUEUES);
        let registers = Arc::clone(&self.devices[device]);
        match self.random.below(64) {
            0 | 1 => registers.set_status(0),
            2..=5 => self.start(device, false),
            6..=8 => {
                let value = self.random.next().to_le_bytes();
                let offset = self.random.one(registers.places()) + self.random.below(3);
                let len = self.random.below(9) as usize;
                registers.write(offset, &value[..len]);
            }
            9 => {
                let len = self.random.below(9) as usize;
                let offset = self.random.edge();
                registers.read(offset, &mut [0; 8][..len]);
            }
            10 => {
                let ring = self.driver(device, queue).state.descriptors;
                let bytes = self.random.next().to_le_bytes();
                let at = ring + self.random.below(0x4000);
                self.put(at, &bytes);
            }
            11 if registers.status() & 64 != 0 => self.start(device, false),
            _ => self.offer(device, queue),
        }
    }
}

/// Programs on the host, of which few behave.
fn host(path: &Path, tap: &mut File, random: &mut Random, callers: &mut Vec<UnixStream>) {
    // The listener's queue may be full while the device is not running.
    let _ = tap.write(&vec![1; random.one(&[13, 72, 1500, 60_000])]);
    let mut data = vec![0; 1 << 16];
    while tap.read(&mut data).is_ok_and(|count| count > 0) {}
    if let Ok(mut caller) = connect(path) {
        let line = b"CONNECT 2\nhello";
        let count = random.one(&[0, 5, 10, line.len()]);
        let _ = caller.write(&line[..count]);
        callers.push(caller);
    }
    if callers.len() > 16 {
        callers.swap_remove(random.below(16) as usize);
    }
    for caller in callers {
        let _ = caller.write(&data[..random.one(&[0, 1, 9000])]);
        if random.below(2) == 0 {
            let _ = caller.read(&mut data);
        }
    }
}

/// Connects without waiting for anybody to accept.
fn connect(path: &Path) -> nix::Result<UnixStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    use std::os::fd::AsRawFd as _;
    let socket = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
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

/// `attach` puts a device where its driver reaches it.
fn stress(test: &str, attach: fn(&dyn VirtioDevice, &GuestMemory) -> Attached) {
    // A violation of a filter ends the process.
    if !crate::testing::alone(test) {
        return;
    }
    lockdown::install_violation_reporter().unwrap();
    let seconds = std::env::var("CASEMATE_STRESS_SECONDS").map_or(2, |text| text.parse().unwrap());
    let memory = add_hotplug(&memory(), 64 << 20, 2 << 20).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v.sock");
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(64 * 512).unwrap();
    let block = BlockOptions {
        id: "disk".into(),
        file: disk,
        read_only: false,
        layer: None,
        queues: 1,
        engine: crate::virtio::block::Engine::Async,
        cache: CacheType::Writeback,
        discard: true,
        limits: crate::virtio::rate_limiter::LimiterOptions::default(),
    };
    let (net, mut tap) = net::tests::fake();
    let vsock = vsock::testing::reachable(UnixListener::bind(&path).unwrap());
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
    let all: [Box<dyn VirtioDevice>; 6] = [
        Box::new(Block::new(block).unwrap()),
        Box::new(Entropy::default()),
        Box::new(net),
        Box::new(vsock),
        Box::new(Balloon::new(balloon).unwrap()),
        Box::new(Mem::new(mem).unwrap()),
    ];
    let mut worker = DeviceWorker::new().unwrap();
    let devices: Vec<_> = all
        .into_iter()
        .map(|device| {
            let (registers, endpoint) = attach(device.as_ref(), &memory);
            worker.add(endpoint, device).unwrap();
            registers
        })
        .collect();
    spawn(move || {
        lockdown::enter(Role::Device, Stage::Sealed).unwrap();
        worker.run();
    });

    let end = Instant::now() + Duration::from_secs(seconds);
    let over = Arc::new(AtomicBool::new(false));
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
    let outside = {
        let over = Arc::clone(&over);
        spawn(move || {
            let (mut random, mut callers) = (Random(3), Vec::new());
            while !over.load(Ordering::SeqCst) {
                host(&path, &mut tap, &mut random, &mut callers);
                std::thread::sleep(Duration::from_micros(200));
            }
        })
    };
    for _ in 0..2 {
        let acts = finished.recv_timeout(seconds_and_patience(seconds));
        let acts = acts.expect("no vCPU hangs");
        println!("{acts} acts");
        assert!(acts > 100);
    }
    over.store(true, Ordering::SeqCst);
    outside.join().unwrap();

    // A well-behaved driver finds everything working.
    let (done, finished) = channel();
    spawn(move || {
        let mut vcpu = Vcpu {
            random: Random(4),
            memory,
            devices,
        };
        for device in 0..vcpu.devices.len() {
            vcpu.devices[device].reach();
            vcpu.devices[device].set_status(0);
            vcpu.put(
                vcpu.driver(device, 0).state.descriptors,
                &[0; QUEUES as usize * 0x4000],
            );
        }
        for device in 0..vcpu.devices.len() {
            vcpu.start(device, true);
            assert_eq!(vcpu.devices[device].status(), 15, "device {device}");
        }
        let mut disk = vcpu.driver(0, 0);
        vcpu.put(DATA, &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        disk.add(&[
            (DATA, 16, false),
            (DATA + 64, 20, true),
            (DATA + 128, 1, true),
        ]);
        vcpu.devices[0].ring(0);
        let mut entropy = vcpu.driver(1, 0);
        entropy.add(&[(DATA + 256, 32, true)]);
        vcpu.devices[1].ring(0);
        for driver in [&mut disk, &mut entropy] {
            while driver.used().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert_eq!(disk.get(DATA + 64, 4), b"disk");
        assert_ne!(entropy.get(DATA + 256, 32), [0; 32]);
        done.send(()).unwrap();
    });
    finished.recv_timeout(PATIENCE).expect("every device works");
}

fn seconds_and_patience(seconds: u64) -> Duration {
    Duration::from_secs(seconds) + PATIENCE
}

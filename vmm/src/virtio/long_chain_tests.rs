//! Chains of almost 4 GiB, in every queue whose device moves bytes: a turn stays a turn, nothing is allocated by their
//! length, and the device goes on.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use vm_memory::{Bytes as _, GuestAddress};

use super::block::{Block, BlockOptions, CacheType, Engine};
use super::console::{Console, Output, Port, Size};
use super::device::{Event, VirtioDevice};
use super::queue::Progress;
use super::rate_limiter::LimiterOptions;
use super::testing::{DATA, Driver, END, INDIRECT, NEXT, Rig, WRITE};
use super::{Balloon, BalloonOptions, Entropy, net, vsock};
use crate::memory::GuestMemory;

/// Memory that chains are made of, away from the rings.
const BULK: u64 = 1 << 30;
const BULK_LEN: u32 = 64 << 20;
/// Where the indirect tables lie, and a byte for a status.
const TABLE: u64 = DATA + 0x10_0000;
const STATUS: u64 = DATA + 0x8000;
/// Most time of a processor that a turn may take: moving 4 GiB takes longer.
const TURN: Duration = Duration::from_millis(250);
/// Most address space that the process may gain, in KiB.
const GROWTH: u64 = 32 << 10;
/// How long a device may hold a chain back.
const PATIENCE: Duration = Duration::from_secs(60);

type Buffer = (u64, u32, bool);

/// A device, and what its process took before it had anything to do.
struct Subject<D> {
    rig: Rig<D>,
    peak: u64,
}

impl<D: VirtioDevice> Subject<D> {
    fn new(device: D, features: u64) -> Self {
        let ranges = [(0, END as usize), (BULK, BULK_LEN as usize)];
        let memory = ranges.map(|(start, len)| (GuestAddress(start), len));
        let memory = GuestMemory::from_ranges(&memory).unwrap();
        let rig = Rig::on(memory, device, features, 16);
        Self { rig, peak: peak() }
    }

    fn driver(&mut self, queue: u16) -> &mut Driver {
        &mut self.rig.drivers[usize::from(queue)]
    }

    /// Offers `first`, then as much of the bulk as makes the whole one byte less than 4 GiB, then `last`. The bulk is
    /// for the device to write if `writable`.
    fn offer(&mut self, queue: u16, first: &[Buffer], writable: bool, last: &[Buffer]) {
        let around: u32 = first.iter().chain(last).map(|(_, len, _)| len).sum();
        let mut left = u32::MAX - around;
        let mut buffers = first.to_vec();
        while left > 0 {
            let len = left.min(BULK_LEN);
            buffers.push((BULK, len, writable));
            left -= len;
        }
        buffers.extend(last);
        let count = buffers.len() as u16;
        let driver = self.driver(queue);
        let table = TABLE + 0x1_0000 * u64::from(queue);
        for (i, (address, len, writable)) in (0..).zip(buffers) {
            let next = if i + 1 < count { NEXT } else { 0 };
            let flags = next | if writable { WRITE } else { 0 };
            driver.describe_at(table, i, address, len, flags, i + 1);
        }
        driver.describe(0, table, u32::from(count) * 16, INDIRECT, 0);
        driver.offer(0);
    }

    /// Gives the device one turn.
    fn turn(&mut self, event: Event) -> Progress {
        let before = spent();
        let progress = self.rig.device.handle(event).unwrap();
        let turn = spent() - before;
        assert!(turn < TURN, "a turn of {turn:?}");
        progress
    }

    /// Has a queue served until a chain is used; how many bytes the device wrote.
    fn serve(&mut self, queue: u16) -> u32 {
        let began = Instant::now();
        loop {
            if let Some((_, len)) = self.driver(queue).used() {
                let growth = peak() - self.peak;
                assert!(growth < GROWTH, "{growth} KiB more");
                return len;
            }
            assert!(began.elapsed() < PATIENCE, "the chain is never used");
            if let Progress::Later(at) = self.turn(Event::Queue(queue)) {
                std::thread::sleep(at.saturating_duration_since(Instant::now()));
            }
        }
    }

    fn put(&mut self, address: u64, bytes: &[u8]) {
        let memory = &self.rig.memory;
        memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn byte(&self, address: u64) -> u8 {
        self.rig.memory.read_obj(GuestAddress(address)).unwrap()
    }
}

/// What this thread took of a processor.
fn spent() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .unwrap()
        .into()
}

/// Most address space that this process ever had, in KiB: what is allocated and not touched is part of it.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"));
    line.unwrap().trim_end_matches("kB").trim().parse().unwrap()
}

#[test]
fn no_device_works_or_grows_by_the_length_of_a_chain() {
    let name = "virtio::long_chain_tests::no_device_works_or_grows_by_the_length_of_a_chain";
    if !crate::testing::alone(name) {
        return;
    }
    block(Engine::Sync);
    block(Engine::Async);
    net();
    vsock();
    console();
    entropy();
    balloon();
}

/// On a disk that is large enough for all of it.
fn block(engine: Engine) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(16 << 30).unwrap();
    let options = BlockOptions {
        id: "large".into(),
        file: file.try_clone().unwrap(),
        read_only: false,
        layer: None,
        queues: 1,
        engine,
        cache: CacheType::Writeback,
        discard: true,
        limits: LimiterOptions::default(),
    };
    let mut subject = Subject::new(Block::new(options).unwrap(), 0);
    let header = [(DATA, 16, false)];
    let status = [(STATUS, 1, true)];
    // Read and write, discard, write zeroes, a name; flush has no use for data, and an unknown request neither.
    let [io_error, ok, unsupported] = [1, 0, 2];
    for (kind, writable, expected) in [
        (0_u32, true, io_error),
        (1, false, io_error),
        (11, false, io_error),
        (13, false, io_error),
        (8, true, ok),
        (4, false, ok),
        (99, true, unsupported),
    ] {
        subject.put(DATA, &[&kind.to_le_bytes()[..], &[0; 12]].concat());
        subject.put(STATUS, &[0xee]);
        subject.offer(0, &header, writable, &status);
        // The next one waits for the next turn.
        if kind != 4 {
            subject.driver(0).offer(0);
            assert_eq!(subject.turn(Event::Queue(0)), Progress::More, "{kind}");
            assert!(subject.driver(0).used().is_some());
            assert!(subject.driver(0).used_pending().is_none());
        }
        let written = subject.serve_ring(engine);
        let expected_len = if kind == 8 { 21 } else { 1 };
        assert_eq!(written, expected_len, "{engine:?} {kind}");
        assert_eq!(subject.byte(STATUS), expected, "{engine:?} {kind}");
    }
    assert!(is_untouched(&file));
    subject.put(DATA, &[0; 16]);
    let read = [(DATA, 16, false), (DATA + 16, 512, true), status[0]];
    subject.driver(0).add(&read);
    assert_eq!(subject.serve_ring(engine), 513);
}

impl Subject<Block> {
    /// Has the queue served, and what its ring reports.
    fn serve_ring(&mut self, engine: Engine) -> u32 {
        if engine == Engine::Async {
            self.turn(Event::Queue(0));
            let began = Instant::now();
            while self.driver(0).used_pending().is_none() {
                assert!(began.elapsed() < PATIENCE, "the ring is never done");
                self.rig.poll();
            }
        }
        self.serve(0)
    }
}

fn is_untouched(file: &File) -> bool {
    std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) == 0
}

/// A frame of 4 GiB is none; a buffer of as much is one with room.
fn net() {
    let (card, mut tap) = net::testing::fake();
    let mut subject = Subject::new(card, 0);
    subject.offer(1, &[], false, &[]);
    assert_eq!(subject.serve(1), 0);
    let mut data = [0; 200];
    let error = tap.read(&mut data).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    subject.driver(1).add(&[(DATA, 72, false)]);
    subject.serve(1);
    assert_eq!(tap.read(&mut data).unwrap(), 72);

    subject.offer(0, &[], true, &[]);
    tap.write_all(&[0; 72]).unwrap();
    assert_eq!(subject.serve(0), 72);
}

/// A packet from the guest's port 7 to port 9 of the host, as long as it says.
fn packet(op: u8, len: u32) -> Vec<u8> {
    let mut header = [0; 44];
    header[0] = vsock::testing::CID as u8;
    header[8] = 2;
    header[16] = 7;
    header[20] = 9;
    header[24..28].copy_from_slice(&len.to_le_bytes());
    [header[28], header[30]] = [1, op];
    header[36..40].copy_from_slice(&(256_u32 << 10).to_le_bytes());
    header.to_vec()
}

/// Data beyond the credit ends the connection, data within it passes, and a buffer is as good as one of usual size.
fn vsock() {
    const REQUEST: u8 = 1;
    const RESPONSE: u8 = 2;
    const RST: u8 = 3;
    const RW: u8 = 5;
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("v.sock")).unwrap();
    let mut subject = Subject::new(vsock::testing::reachable(listener), 0);
    let header = [(DATA, 44, false)];
    let call = |subject: &mut Subject<vsock::Vsock>| {
        subject.put(DATA, &packet(REQUEST, 0));
        subject.driver(1).add(&header);
        subject.serve(1);
        subject.rig.poll();
    };
    let hear = |subject: &mut Subject<vsock::Vsock>| {
        subject.offer(0, &[], true, &[]);
        let len = subject.serve(0);
        (subject.byte(BULK + 30), len)
    };
    call(&mut subject);
    assert_eq!(hear(&mut subject), (RESPONSE, 44));
    subject.put(DATA, &packet(RW, 5));
    subject.offer(1, &header, false, &[]);
    subject.serve(1);
    // The other end has sent that much, and no RST.
    assert_eq!(hear(&mut subject), (RW, 44 + 3000));
    subject.put(DATA, &packet(RW, u32::MAX - 44));
    subject.offer(1, &header, false, &[]);
    subject.serve(1);
    assert_eq!(hear(&mut subject), (RST, 44));
    call(&mut subject);
    assert_eq!(hear(&mut subject), (RESPONSE, 44));
}

/// With nobody to read it, what the guest says is lost after a while; what was typed arrives.
fn console() {
    let port = Port::new(Size::default()).unwrap();
    let output = Arc::new(Output::new().unwrap());
    let mut subject = Subject::new(Console::new(Arc::clone(&port), Arc::clone(&output)), 0);
    subject.offer(1, &[], false, &[]);
    assert!(matches!(subject.turn(Event::Queue(1)), Progress::Later(_)));
    assert!(subject.driver(1).used_pending().is_none());
    assert_eq!(subject.serve(1), 0);
    subject.offer(0, &[], true, &[]);
    port.offer(b"typed");
    assert_eq!(subject.serve(0), 5);
    assert_eq!(subject.byte(BULK + 4), b'd');
    // Reset in the middle of it.
    subject.offer(1, &[], false, &[]);
    subject.turn(Event::Queue(1));
    assert!(subject.rig.device.stop()[1].is_some());
}

/// A part of it is allowed.
fn entropy() {
    let mut subject = Subject::new(Entropy::default(), 0);
    subject.offer(0, &[], true, &[]);
    assert_eq!(subject.serve(0), 64 << 10);
    subject.driver(0).add(&[(DATA, 32, true)]);
    assert_eq!(subject.serve(0), 32);
}

/// The same pages over and over: each chain is a turn.
fn balloon() {
    let options = BalloonOptions {
        amount_mib: 0,
        deflate_on_oom: false,
        stats_polling_interval_s: 0,
        free_page_hinting: false,
        free_page_reporting: true,
    };
    let balloon = Balloon::new(options).unwrap();
    let features = balloon.traits().features;
    let mut subject = Subject::new(balloon, features);
    let [inflate, reporting] = [0, 2];
    for place in (BULK..BULK + u64::from(BULK_LEN)).step_by(4096) {
        subject.put(place, &[7; 4096]);
    }
    subject.offer(reporting, &[], true, &[]);
    subject.driver(reporting).offer(0);
    assert_eq!(subject.turn(Event::Queue(reporting)), Progress::More);
    assert!(subject.driver(reporting).used().is_some());
    assert!(subject.driver(reporting).used_pending().is_none());
    assert_eq!(subject.byte(BULK + u64::from(BULK_LEN) / 2), 0);
    assert_eq!(subject.serve(reporting), 0);
    // As a list of pages it names page 0 only, which the driver does not need.
    subject.put(0, &[7; 4096]);
    subject.offer(inflate, &[], false, &[]);
    assert_eq!(subject.serve(inflate), 0);
    assert_eq!(subject.byte(0), 0);
}

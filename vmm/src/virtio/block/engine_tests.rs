//! The engines side by side, what they must have in common, and what only a ring can get wrong.

use super::request::{T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES};
use super::tests::{BUFFER, STATUS, options, rig};
use super::*;
use crate::virtio::device::EVENT_IDX;
use crate::virtio::testing::{DATA, Rig};
use std::io::Read as _;
use std::os::fd::{FromRawFd as _, IntoRawFd as _};
use std::os::unix::fs::FileExt as _;

const ENGINES: [Engine; 2] = [Engine::Sync, Engine::Async];

fn rig_with(engine: Engine, sectors: u64) -> (Rig<Block>, File) {
    let options = options(sectors);
    let file = options.file.try_clone().unwrap();
    (rig(BlockOptions { engine, ..options }), file)
}

/// Lets the device do what its ring reports until `done`.
pub(super) fn wait(rig: &mut Rig<Block>, mut done: impl FnMut(&mut Rig<Block>) -> bool) {
    for _ in 0..10_000 {
        if done(rig) {
            return;
        }
        rig.poll();
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("the ring never gets done");
}

/// Offers a request in `queue` with everything of it at `at` and the data in `data`; its head.
pub(super) fn offer(
    rig: &mut Rig<Block>,
    queue: usize,
    at: u64,
    kind: u32,
    sector: u64,
    data: &[(u64, u32, bool)],
) -> u32 {
    let driver = &mut rig.drivers[queue];
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    driver.put(DATA + at, &header);
    driver.put(STATUS + at, &[0xee]);
    let mut buffers = vec![(DATA + at, 16, false)];
    buffers.extend(data);
    buffers.push((STATUS + at, 1, true));
    driver.add(&buffers).into()
}

fn request(rig: &mut Rig<Block>, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
    let head = offer(rig, 0, 0, kind, sector, data);
    rig.kick(0);
    let mut used = None;
    wait(rig, |rig| {
        used = rig.drivers[0].used();
        used.is_some()
    });
    let (id, len) = used.unwrap();
    assert_eq!(id, head);
    (rig.drivers[0].get(STATUS, 1)[0], len)
}

#[test]
fn every_request_ends_alike() {
    for engine in ENGINES {
        let (mut rig, file) = rig_with(engine, 64);
        let scattered = [(BUFFER, 100, true), (BUFFER + 0x1000, 924, true)];
        assert_eq!(request(&mut rig, T_IN, 3, &scattered), (S_OK, 1025));
        assert_eq!(rig.drivers[0].get(BUFFER, 100), [3; 100]);
        assert_eq!(rig.drivers[0].get(BUFFER + 0x1000 + 412, 512), [4; 512]);
        rig.drivers[0].put(BUFFER, &[0xab; 1024]);
        let write = request(&mut rig, T_OUT, 6, &[(BUFFER, 1024, false)]);
        assert_eq!(write, (S_OK, 1));
        assert_eq!(request(&mut rig, T_FLUSH, 0, &[]), (S_OK, 1));
        let mut there = [0; 1024];
        file.read_exact_at(&mut there, 6 * 512).unwrap();
        assert_eq!(there, [0xab; 1024]);
        assert_eq!(
            request(&mut rig, T_IN, 64, &[]),
            (S_OK, 1),
            "nothing, at the end"
        );
        for (sector, len) in [(64, 512), (63, 1024), (u64::MAX, 512), (0, 511)] {
            let read = request(&mut rig, T_IN, sector, &[(BUFFER, len, true)]);
            assert_eq!(read, (S_IOERR, 1));
        }
        assert_eq!(request(&mut rig, 99, 0, &[]), (S_UNSUPP, 1));
        // Several ranges, one of them empty.
        let range = |sector: u64, count: u32| {
            [&sector.to_le_bytes()[..], &count.to_le_bytes(), &[0; 4]].concat()
        };
        let list = [range(9, 1), range(3, 0), range(20, 4)].concat();
        rig.drivers[0].put(BUFFER, &list);
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            let answer = request(&mut rig, kind, 0, &[(BUFFER, 48, false)]);
            assert_eq!(answer, (S_OK, 1), "{engine:?} {kind}");
        }
        file.read_exact_at(&mut there[..512], 9 * 512).unwrap();
        assert_eq!(there[..512], [0; 512]);
        // The file shrinks under the disk: an error, and it does not grow back.
        file.set_len(1024).unwrap();
        let read = request(&mut rig, T_IN, 1, &[(BUFFER, 1024, true)]);
        assert_eq!(read, (S_IOERR, 1), "{engine:?}");
        assert_eq!(file.metadata().unwrap().len(), 1024);
    }
}

#[test]
fn a_read_only_disk_is_neither_discarded_nor_zeroed() {
    for engine in ENGINES {
        let options = options(16);
        let file = options.file.try_clone().unwrap();
        let read_only = BlockOptions {
            engine,
            read_only: true,
            ..options
        };
        let mut rig = rig(read_only);
        let features = rig.device.traits().features;
        assert_eq!(features & (F_DISCARD | F_WRITE_ZEROES), 0);
        let range = [&2_u64.to_le_bytes()[..], &4_u32.to_le_bytes(), &[0; 4]].concat();
        rig.drivers[0].put(BUFFER, &range);
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            // As of any request that was not offered.
            let answer = request(&mut rig, kind, 0, &[(BUFFER, 16, false)]);
            assert_eq!(answer, (S_UNSUPP, 1), "{engine:?} {kind}");
        }
        let read = request(&mut rig, T_IN, 2, &[(BUFFER, 512, true)]);
        assert_eq!(read, (S_OK, 513));
        let mut there = [0; 16 * 512];
        file.read_exact_at(&mut there, 0).unwrap();
        let as_it_was: Vec<u8> = (0..16).flat_map(|sector| [sector; 512]).collect();
        assert!(there[..] == as_it_was, "{engine:?}");
    }
}

/// fdatasync(2) refuses a pipe: so it shows that it was called, and on which descriptor.
#[test]
fn a_flush_is_an_fdatasync() {
    for engine in ENGINES {
        let (mut rig, _) = rig_with(engine, 8);
        assert_eq!(request(&mut rig, T_FLUSH, 0, &[]), (S_OK, 1));
        let (_reader, writer) = std::io::pipe().unwrap();
        // SAFETY: the descriptor was just given up by its owner.
        #[allow(unsafe_code, reason = "there is no safe way from a pipe to a file")]
        let pipe = Arc::new(unsafe { File::from_raw_fd(writer.into_raw_fd()) });
        if let Some(ring) = &mut rig.device.ring {
            ring.replace(Arc::clone(&pipe)).unwrap();
        }
        rig.device.disk.store = Store::File(pipe);
        assert_eq!(request(&mut rig, T_FLUSH, 0, &[]), (S_IOERR, 1));
        // Without a cache none is called.
        rig.device.disk.abilities.flush = false;
        assert_eq!(request(&mut rig, T_FLUSH, 0, &[]), (S_UNSUPP, 1));
    }
}

/// A file whose reads stay in flight: a pipe that nobody writes to, in the place of the disk's file.
pub(super) fn stalled(queues: u16, size: u16) -> (Rig<Block>, std::io::PipeWriter) {
    let options = BlockOptions {
        queues,
        engine: Engine::Async,
        ..options(64)
    };
    let mut rig = Rig::with(Block::new(options).unwrap(), 0, size);
    let (reader, writer) = std::io::pipe().unwrap();
    // SAFETY: the descriptor was just given up by its owner.
    #[allow(unsafe_code, reason = "there is no safe way from a pipe to a file")]
    let pipe = unsafe { File::from_raw_fd(reader.into_raw_fd()) };
    let ring = rig.device.ring.as_mut().unwrap();
    ring.replace(Arc::new(pipe)).unwrap();
    (rig, writer)
}

#[test]
fn a_stop_waits_for_what_is_in_flight() {
    use std::io::Write as _;
    let (mut rig, mut writer) = stalled(1, 16);
    offer(&mut rig, 0, 0, T_IN, 0, &[(BUFFER, 512, true)]);
    rig.kick(0);
    assert_eq!(rig.device.ring.as_ref().unwrap().in_flight(), 1);
    assert_eq!(rig.drivers[0].used(), None);
    let memory = rig.memory.clone();
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        // Untouched until now, and for no other reason than that.
        let mut byte = [0];
        memory
            .read_slice(&mut byte, vm_memory::GuestAddress(BUFFER))
            .unwrap();
        writer.write_all(&[7; 512]).unwrap();
        (byte, writer)
    });
    let states = rig.device.stop();
    assert_eq!(late.join().unwrap().0, [0]);
    // The request has ended, and the saved state knows it.
    assert_eq!(states[0].unwrap().next_used, 1);
    assert_eq!(rig.drivers[0].used(), Some((0, 513)));
    assert_eq!(rig.drivers[0].get(BUFFER, 512), [7; 512]);
    assert_eq!(rig.device.ring.as_ref().unwrap().in_flight(), 0);
    // It runs on from there, and stops again with nothing to wait for.
    rig.start(&states, 0);
    rig.kick(0);
    assert_eq!(rig.device.stop()[0].unwrap().next_used, 1);
}

#[test]
fn a_device_that_goes_away_waits_too() {
    use std::io::Write as _;
    let (mut rig, mut writer) = stalled(1, 16);
    offer(&mut rig, 0, 0, T_IN, 0, &[(BUFFER, 512, true)]);
    rig.kick(0);
    let memory = rig.memory.clone();
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        writer.write_all(&[7; 512]).unwrap();
    });
    drop(rig.device);
    let mut there = [0; 512];
    memory
        .read_slice(&mut there, vm_memory::GuestAddress(BUFFER))
        .unwrap();
    assert_eq!(there, [7; 512]);
    late.join().unwrap();
}

#[test]
fn a_full_ring_holds_requests_back_and_loses_none() {
    use std::io::Write as _;
    // Two queues of 256 descriptors with three in a request: more than there are slots.
    let (mut rig, mut writer) = stalled(2, 256);
    for queue in 0..2 {
        for i in 0..85 {
            let at = 0x8000 * queue as u64 + 64 * i;
            offer(
                &mut rig,
                queue,
                at,
                T_IN,
                0,
                &[(BUFFER + 0x2_0000 + at, 512, true)],
            );
        }
    }
    rig.kick(0);
    rig.kick(1);
    let in_flight = rig.device.ring.as_ref().unwrap().in_flight();
    assert_eq!(in_flight, usize::from(ring::SLOTS));
    assert_ne!(rig.device.starved, 0);
    let feeder = std::thread::spawn(move || {
        // All that is asked for.
        writer.write_all(&vec![7; 170 * 512]).unwrap();
        writer
    });
    let mut ended = 0;
    wait(&mut rig, |rig| {
        for driver in &mut rig.drivers {
            while driver.used().is_some() {
                ended += 1;
            }
        }
        ended == 170
    });
    drop(feeder.join().unwrap());
    assert_eq!(rig.device.ring.as_ref().unwrap().in_flight(), 0);
}

#[test]
fn a_driver_that_breaks_its_queue_meanwhile_gets_nothing_more() {
    use std::io::Write as _;
    let (mut rig, mut writer) = stalled(1, 16);
    offer(&mut rig, 0, 0, T_IN, 0, &[(BUFFER, 512, true)]);
    rig.kick(0);
    // An available index that jumped.
    rig.drivers[0].set_available_index(1000);
    let error = rig.handle(Event::Queue(0)).unwrap_err();
    assert!(matches!(error, device::Error::Queue(_)));
    writer.write_all(&[7; 512]).unwrap();
    // As the worker does; nothing hangs and nothing stays in flight.
    rig.device.stop();
    assert_eq!(rig.device.ring.as_ref().unwrap().in_flight(), 0);
}

#[test]
fn queues_are_served_each_and_announced() {
    for engine in ENGINES {
        let many = BlockOptions {
            queues: 8,
            engine,
            ..options(64)
        };
        let mut rig = Rig::with(Block::new(many).unwrap(), EVENT_IDX, 16);
        let traits = rig.device.traits();
        assert_eq!(traits.queue_sizes.len(), 8);
        assert_ne!(traits.features & F_MQ, 0);
        assert_eq!(rig.device.config().bytes()[34..36], [8, 0]);
        for queue in 0..8 {
            let at = 64 * queue as u64;
            let data = [(BUFFER + 512 * queue as u64, 512, true)];
            offer(&mut rig, queue, at, T_IN, queue as u64, &data);
            rig.kick(queue as u16);
        }
        for queue in 0..8 {
            let mut used = None;
            wait(&mut rig, |rig| {
                used = rig.drivers[queue].used();
                used.is_some()
            });
            assert_eq!(used, Some((0, 513)));
            let got = rig.drivers[queue].get(BUFFER + 512 * queue as u64, 512);
            assert_eq!(got, vec![queue as u8; 512]);
        }
        rig.kick(8);
    }
    let (rig, _) = rig_with(Engine::Sync, 1);
    assert_eq!(rig.device.traits().features & F_MQ, 0);
}

#[test]
fn another_file_takes_the_place_of_the_first() {
    for engine in ENGINES {
        let (mut rig, old) = rig_with(engine, 64);
        assert_eq!(
            request(&mut rig, T_IN, 5, &[(BUFFER, 512, true)]),
            (S_OK, 513)
        );
        let mut other = options(16).file;
        other.write_all_at(&[0xcd; 512], 5 * 512).unwrap();
        let update = Update::File(other.try_clone().unwrap());
        assert!(matches!(rig.device.update(update), Ok(Answer::Done)));
        // The driver learns the new size, reads the new bytes, and not beyond their end.
        assert_eq!(rig.device.config().bytes()[..8], 16u64.to_le_bytes());
        assert_eq!(rig.signal.config_changes(), 1);
        assert_eq!(
            request(&mut rig, T_IN, 5, &[(BUFFER, 512, true)]),
            (S_OK, 513)
        );
        assert_eq!(rig.drivers[0].get(BUFFER, 512), [0xcd; 512]);
        let beyond = request(&mut rig, T_IN, 16, &[(BUFFER, 512, true)]);
        assert_eq!(beyond, (S_IOERR, 1));
        rig.drivers[0].put(BUFFER, &[0xee; 512]);
        let write = request(&mut rig, T_OUT, 0, &[(BUFFER, 512, false)]);
        assert_eq!(write, (S_OK, 1));
        let mut all = Vec::new();
        std::io::Seek::rewind(&mut other).unwrap();
        other.read_to_end(&mut all).unwrap();
        assert_eq!(all[..512], [0xee; 512]);
        let mut first = [0xff; 512];
        old.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, [0; 512], "the old file is left alone");
        // What is no disk changes nothing.
        let update = Update::File(File::open("/dev/null").unwrap());
        assert!(matches!(
            rig.device.update(update),
            Err(UpdateError::Drive(Error::WrongKind { .. }))
        ));
        assert_eq!(
            request(&mut rig, T_IN, 5, &[(BUFFER, 512, true)]),
            (S_OK, 513)
        );
    }
}

#[test]
fn a_file_that_grew_is_taken_again_and_one_in_use_is_not() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(512).unwrap();
    let open = || {
        let file = File::options().read(true).write(true).open(image.path());
        file.unwrap()
    };
    let first = BlockOptions {
        file: open(),
        ..options(0)
    };
    let mut rig = rig(first);
    image.as_file().set_len(4096).unwrap();
    rig.device.update(Update::File(open())).unwrap();
    assert_eq!(rig.device.config().bytes()[..8], 8u64.to_le_bytes());
    // Still this machine's alone.
    let (mut other, _) = rig_with(Engine::Sync, 4);
    let error = other.device.update(Update::File(open())).unwrap_err();
    assert!(
        error.to_string().contains("another machine uses"),
        "{error}"
    );
    assert_eq!(other.device.config().bytes()[..8], 4u64.to_le_bytes());
}

#[test]
fn what_is_in_flight_ends_on_the_old_file() {
    use std::io::Write as _;
    let (mut rig, mut writer) = stalled(1, 16);
    offer(&mut rig, 0, 0, T_IN, 0, &[(BUFFER, 512, true)]);
    rig.kick(0);
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        writer.write_all(&[7; 512]).unwrap();
    });
    rig.device.update(Update::File(options(8).file)).unwrap();
    late.join().unwrap();
    assert_eq!(rig.drivers[0].used(), Some((0, 513)));
    assert_eq!(rig.drivers[0].get(BUFFER, 512), [7; 512]);
    assert_eq!(
        request(&mut rig, T_IN, 5, &[(BUFFER, 512, true)]),
        (S_OK, 513)
    );
    assert_eq!(rig.drivers[0].get(BUFFER, 512), [5; 512]);
}

use std::time::Duration;

use super::*;
use crate::virtio::rate_limiter::BucketOptions;
use crate::virtio::testing::{DATA, END, Rig};

const ADDRESS: u64 = 0x1_4000_0000;
const ANSWER: u64 = DATA + 0x100;

fn options(len: u64, read_only: bool) -> PmemOptions {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    PmemOptions {
        id: "disk".to_owned(),
        file,
        read_only,
        limits: LimiterOptions::default(),
    }
}

fn rig(options: PmemOptions) -> Rig<Pmem> {
    let (device, _) = Pmem::map(options).unwrap();
    Rig::new(device.at(ADDRESS))
}

/// A request of `kind`; its answer will be at [`ANSWER`].
fn request(rig: &mut Rig<Pmem>, kind: u32) {
    rig.drivers[0].put(DATA, &kind.to_le_bytes());
    rig.drivers[0].put(ANSWER, &[7; 4]);
    rig.drivers[0].add(&[(DATA, 4, false), (ANSWER, 4, true)]);
}

fn answer(rig: &Rig<Pmem>) -> i32 {
    i32::from_le_bytes(rig.drivers[0].get(ANSWER, 4).try_into().unwrap())
}

#[test]
fn says_where_it_is() {
    let rig = rig(options(5 << 20, false));
    let expected = [ADDRESS.to_le_bytes(), (6u64 << 20).to_le_bytes()].concat();
    assert_eq!(rig.device.config().bytes(), expected);
}

#[test]
fn flushes() {
    for read_only in [false, true] {
        let mut rig = rig(options(1 << 20, read_only));
        request(&mut rig, FLUSH);
        rig.kick(0);
        assert_eq!(rig.drivers[0].used(), Some((0, 4)));
        assert_eq!(answer(&rig), 0);
    }
}

#[test]
fn a_flush_that_the_host_refuses_fails() {
    // A pipe cannot be flushed, and stands in for a disk that fails.
    let (reader, _writer) = std::io::pipe().unwrap();
    let mut rig = rig(options(1 << 20, false));
    rig.device.file = Arc::new(PmemFile::for_tests(File::from(std::os::fd::OwnedFd::from(
        reader,
    ))));
    request(&mut rig, FLUSH);
    rig.kick(0);
    assert_eq!(rig.drivers[0].used(), Some((0, 4)));
    assert!(answer(&rig) < 0);
    assert_eq!(rig.device.metrics.event_fails.total(), 1);
}

#[test]
fn unknown_and_short_requests_fail() {
    let mut rig = rig(options(1 << 20, false));
    for kind in [1, 2, u32::MAX] {
        request(&mut rig, kind);
        rig.kick(0);
        assert!(rig.drivers[0].used().is_some());
        assert!(answer(&rig) < 0, "{kind}");
    }
    for buffers in [
        &[(DATA, 3, false), (ANSWER, 4, true)][..],
        &[(ANSWER, 4, true)],
        // More room than the answer takes.
        &[(DATA, 1, false), (ANSWER, 0x1000, true)],
    ] {
        rig.drivers[0].put(ANSWER, &[7; 8]);
        rig.drivers[0].add(buffers);
        rig.kick(0);
        assert_eq!(rig.drivers[0].used().unwrap().1, 4);
        assert!(answer(&rig) < 0, "{buffers:?}");
        assert_eq!(rig.drivers[0].get(ANSWER + 4, 4), [7; 4]);
    }
}

#[test]
fn a_request_in_pieces_is_one() {
    let mut rig = rig(options(1 << 20, false));
    rig.drivers[0].put(DATA, &[0; 8]);
    let (half, rest) = ((DATA, 1, false), (DATA + 1, 7, false));
    rig.drivers[0].add(&[half, rest, (ANSWER, 2, true), (ANSWER + 2, 2, true)]);
    rig.kick(0);
    assert_eq!(rig.drivers[0].used(), Some((0, 4)));
    assert_eq!(answer(&rig), 0);
}

#[test]
fn a_request_that_cannot_be_answered_breaks_the_queue() {
    for buffers in [
        &[(DATA, 4, false)][..],
        &[(DATA, 4, false), (ANSWER, 3, true)],
        &[(DATA, 4, false), (END, 4, true)],
        // Its own memory is none that it touches.
        &[(DATA, 4, false), (ADDRESS, 4, true)],
        &[(ADDRESS, 4, false), (ANSWER, 4, true)],
    ] {
        let mut rig = rig(options(1 << 20, false));
        rig.drivers[0].add(buffers);
        assert!(rig.handle(Event::Queue(0)).is_err(), "{buffers:?}");
    }
}

#[test]
fn requests_that_come_together_cost_one_flush() {
    let mut limited = options(1 << 20, false);
    limited.limits.ops = Some(BucketOptions {
        size: 1,
        one_time_burst: 0,
        refill_time: Duration::from_secs(3600),
    });
    let mut rig = rig(limited);
    for _ in 0..3 {
        request(&mut rig, FLUSH);
    }
    rig.kick(0);
    for head in [0, 2, 4] {
        assert_eq!(rig.drivers[0].used(), Some((head, 4)));
    }
    // The next one waits for its hour, or for other limits.
    request(&mut rig, FLUSH);
    rig.kick(0);
    assert_eq!(rig.drivers[0].used(), None);
    assert_eq!(rig.device.metrics.rate_limiter_throttled_events.total(), 1);
}

#[test]
fn a_flush_costs_as_many_bytes_as_the_file_has() {
    let mut limited = options(3 << 20, false);
    limited.limits.bandwidth = Some(BucketOptions {
        size: 4 << 20,
        one_time_burst: 0,
        refill_time: Duration::from_secs(3600),
    });
    let mut rig = rig(limited);
    for expected in [Some((0, 4)), Some((2, 4)), None] {
        request(&mut rig, FLUSH);
        rig.kick(0);
        assert_eq!(rig.drivers[0].used(), expected);
    }
}

#[test]
fn stops_and_starts() {
    let mut rig = rig(options(1 << 20, false));
    request(&mut rig, FLUSH);
    rig.kick(0);
    let states = rig.device.stop();
    assert_eq!(rig.device.stop(), QueueStates::default());
    assert_eq!(rig.device.handle(Event::Queue(0)).unwrap(), Progress::Done);
    rig.start(&states, 0);
    request(&mut rig, FLUSH);
    rig.kick(0);
    assert_eq!(rig.drivers[0].used(), Some((0, 4)));
    assert_eq!(rig.drivers[0].used(), Some((2, 4)));
}

#[test]
fn refuses_what_is_no_memory() {
    let with = |file: File| {
        let options = options(0, false);
        Pmem::map(PmemOptions { file, ..options }).map(|_| ())
    };
    let error = with(tempfile::tempfile().unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "pmem disk: it is empty");
    assert!(matches!(
        with(File::open("/").unwrap()),
        Err(Error::WrongKind { .. })
    ));
}

#[test]
fn a_file_has_one_writer_or_many_readers() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let map = |read_only| {
        let file = File::options()
            .read(true)
            .write(true)
            .open(file.path())
            .unwrap();
        let id = "disk".to_owned();
        let limits = LimiterOptions::default();
        Pmem::map(PmemOptions {
            id,
            file,
            read_only,
            limits,
        })
    };
    let (first, second) = (map(true).unwrap(), map(true).unwrap());
    assert!(matches!(map(false), Err(Error::InUse { .. })));
    drop((first, second));
    let _writer = map(false).unwrap();
    assert!(matches!(map(true), Err(Error::InUse { .. })));
}

#[test]
fn a_file_that_became_shorter_is_named() {
    let options = options(3 << 20, false);
    let file = options.file.try_clone().unwrap();
    let (device, _mapping) = Pmem::map(options).unwrap();
    let device = device.at(ADDRESS);
    assert_eq!(device.file().truncated(), None);
    file.set_len(4 << 20).unwrap();
    assert_eq!(device.file().truncated(), None);
    file.set_len(1000).unwrap();
    let words = device.file().truncated().unwrap();
    assert!(
        words.contains("pmem disk was cut to 1000 bytes") && words.contains("3145728"),
        "{words}"
    );
}

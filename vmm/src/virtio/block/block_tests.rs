use super::request::{T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES};
use super::*;
use crate::virtio::queue;
use crate::virtio::rate_limiter::BucketOptions;
use crate::virtio::rate_limiter::LimiterOptions;
use crate::virtio::testing::{DATA, Rig};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};

pub(super) const STATUS: u64 = DATA + 0x10_0000;
pub(super) const BUFFER: u64 = DATA + 0x1000;

pub(super) fn options(sectors: u64) -> BlockOptions {
    let mut file = tempfile::tempfile().unwrap();
    for sector in 0..sectors {
        file.write_all(&[sector as u8; 512]).unwrap();
    }
    BlockOptions {
        id: "root".into(),
        file,
        read_only: false,
        layer: None,
        queues: 1,
        engine: Engine::Sync,
        cache: CacheType::Writeback,
        discard: true,
        limits: LimiterOptions::default(),
    }
}

pub(super) fn rig(options: BlockOptions) -> Rig<Block> {
    Rig::new(Block::new(options).unwrap())
}

/// Sends a request and returns the status and the length that the device reports.
fn request(rig: &mut Rig<Block>, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
    let driver = &mut rig.drivers[0];
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    driver.put(DATA, &header);
    driver.put(STATUS, &[0xee]);
    let mut buffers = vec![(DATA, 16, false)];
    buffers.extend(data);
    buffers.push((STATUS, 1, true));
    let head = driver.add(&buffers);
    rig.kick(0);
    let driver = &mut rig.drivers[0];
    let (id, len) = driver.used().expect("the request is answered");
    assert_eq!(id, u32::from(head));
    (driver.get(STATUS, 1)[0], len)
}

#[test]
fn counts_what_it_moves() {
    for engine in [Engine::Sync, Engine::Async] {
        let mut rig = rig(BlockOptions {
            engine,
            ..options(8)
        });
        let metrics = Arc::clone(&rig.device.disk.metrics);
        for (kind, len, device_writes) in [
            (T_IN, 1024, true),
            (T_OUT, 512, false),
            (T_FLUSH, 0, true),
            (99, 0, true),
        ] {
            let data = [(BUFFER, len, device_writes)];
            let data = data.get(..usize::from(len > 0)).unwrap();
            let header = [&u32::to_le_bytes(kind)[..], &[0; 12]].concat();
            let driver = &mut rig.drivers[0];
            driver.put(DATA, &header);
            let buffers = [&[(DATA, 16, false)], data, &[(STATUS, 1, true)]].concat();
            driver.add(&buffers);
            rig.kick(0);
            rig.device.stop();
            rig = Rig::new(rig.device);
        }
        let totals = [
            (&metrics.read_count, 1),
            (&metrics.read_bytes, 1024),
            (&metrics.write_count, 1),
            (&metrics.write_bytes, 512),
            (&metrics.flush_count, 1),
            (&metrics.invalid_reqs_count, 1),
            (&metrics.execute_fails, 0),
        ];
        for (place, (counter, total)) in totals.into_iter().enumerate() {
            assert_eq!(counter.total(), total, "{engine:?}, {place}");
        }
    }
}

#[test]
fn reads_into_scattered_buffers() {
    let mut rig = rig(options(8));
    let data = [(BUFFER, 100, true), (BUFFER + 0x1000, 924, true)];
    assert_eq!(request(&mut rig, T_IN, 3, &data), (S_OK, 1025));
    let driver = &rig.drivers[0];
    assert_eq!(driver.get(BUFFER, 100), [3; 100]);
    assert_eq!(driver.get(BUFFER + 0x1000, 412), [3; 412]);
    assert_eq!(driver.get(BUFFER + 0x1000 + 412, 512), [4; 512]);
    assert_eq!(rig.signal.count(), 1);
}

#[test]
fn writes_flushes_and_reads_back() {
    let options = options(8);
    let mut file = options.file.try_clone().unwrap();
    let mut rig = rig(options);
    rig.drivers[0].put(BUFFER, &[0xab; 1024]);
    assert_eq!(
        request(&mut rig, T_OUT, 6, &[(BUFFER, 1024, false)]),
        (S_OK, 1)
    );
    assert_eq!(request(&mut rig, T_FLUSH, 0, &[]), (S_OK, 1));
    let mut all = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 4096);
    assert_eq!(all[5 * 512..6 * 512], [5; 512]);
    assert_eq!(all[6 * 512..], [0xab; 1024]);
}

#[test]
fn stays_within_the_disk() {
    let mut rig = rig(options(8));
    for (sector, len) in [
        (8, 512),
        (7, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512 + 1, 512),
        (i64::MAX as u64 / 512, 512),
        (0, 511),
        (0, 513),
        (0, 4096 + 512),
    ] {
        for (kind, writable) in [(T_IN, true), (T_OUT, false)] {
            let answer = request(&mut rig, kind, sector, &[(BUFFER, len, writable)]);
            assert_eq!(answer, (S_IOERR, 1), "{kind} {sector}+{len}");
        }
    }
    assert_eq!(
        request(&mut rig, T_IN, 0, &[(BUFFER, 4096, true)]),
        (S_OK, 4097)
    );
    assert_eq!(request(&mut rig, T_IN, 8, &[]), (S_OK, 1));
}

#[test]
fn a_file_that_shrank_is_an_error_and_never_grows_back() {
    let options = options(8);
    let file = options.file.try_clone().unwrap();
    let mut rig = rig(options);
    file.set_len(1024).unwrap();
    assert_eq!(
        request(&mut rig, T_IN, 1, &[(BUFFER, 1024, true)]),
        (S_IOERR, 1)
    );
    assert_eq!(file.metadata().unwrap().len(), 1024);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut options = options(2);
    options.read_only = true;
    let mut rig = rig(options);
    assert_ne!(rig.device.traits().features & F_RO, 0);
    assert_eq!(
        request(&mut rig, T_OUT, 0, &[(BUFFER, 512, false)]),
        (S_IOERR, 1)
    );
    assert_eq!(
        request(&mut rig, T_IN, 0, &[(BUFFER, 512, true)]),
        (S_OK, 513)
    );
    assert_eq!(rig.drivers[0].get(BUFFER, 512), [0; 512]);
}

#[test]
fn identifies_itself_in_20_bytes() {
    let mut options = options(1);
    options.id = "a_name_longer_than_twenty_bytes".into();
    let mut rig = rig(options);
    assert_eq!(
        request(&mut rig, T_GET_ID, 0, &[(BUFFER, 20, true)]),
        (S_OK, 21)
    );
    assert_eq!(rig.drivers[0].get(BUFFER, 21), b"a_name_longer_than_t\0");
    assert_eq!(
        request(&mut rig, T_GET_ID, 0, &[(BUFFER, 19, true)]),
        (S_IOERR, 1)
    );
}

#[test]
fn flush_exists_only_with_a_cache() {
    let mut options = options(1);
    options.cache = CacheType::Unsafe;
    let mut rig = rig(options);
    assert_eq!(rig.device.traits().features & F_FLUSH, 0);
    assert_eq!(request(&mut rig, T_FLUSH, 0, &[]), (S_UNSUPP, 1));
    for kind in [2, 3, 14, u32::MAX] {
        assert_eq!(request(&mut rig, kind, 0, &[]), (S_UNSUPP, 1));
    }
}

#[test]
fn any_framing_of_header_and_status_works() {
    let mut rig = rig(options(2));
    let driver = &mut rig.drivers[0];
    driver.put(DATA, &[T_IN as u8, 0, 0, 0, 0, 0, 0, 0, 1]);
    driver.put(DATA + 9, &[0; 7]);
    driver.add(&[(DATA, 5, false), (DATA + 5, 11, false), (BUFFER, 513, true)]);
    rig.kick(0);
    assert_eq!(rig.drivers[0].used(), Some((0, 513)));
    assert_eq!(
        rig.drivers[0].get(BUFFER, 513),
        [&[1; 512][..], &[S_OK]].concat()
    );
}

#[test]
fn a_short_header_is_an_error_and_no_status_breaks_the_queue() {
    let mut rig = rig(options(2));
    rig.drivers[0].add(&[(DATA, 15, false), (STATUS, 1, true)]);
    rig.kick(0);
    assert_eq!(rig.drivers[0].used(), Some((0, 1)));
    assert_eq!(rig.drivers[0].get(STATUS, 1), [S_IOERR]);

    rig.drivers[0].add(&[(DATA, 16, false)]);
    let error = rig.handle(Event::Queue(0)).unwrap_err();
    assert!(matches!(
        error,
        device::Error::Queue(queue::Error::Chain { .. })
    ));
    assert_eq!(rig.drivers[0].used(), None);
}

#[test]
fn more_data_than_a_request_may_have_is_an_error() {
    let options = options(0);
    options.file.set_len(1 << 40).unwrap();
    let rig = rig(options);
    // The same memory over and over: cheap for the guest, not for the host.
    const PIECE: u32 = 1 << 20;
    let mut rig = Rig::with(rig.device, 0, 128);
    for (pieces, answer) in [(63, (S_OK, 63 * PIECE + 1)), (64, (S_IOERR, 1))] {
        let place = DATA - u64::from(PIECE);
        let data = vec![(place, PIECE, true); pieces];
        assert_eq!(request(&mut rig, T_IN, 0, &data), answer);
    }
}

#[test]
fn stops_into_data_and_runs_on_from_it() {
    let mut rig = rig(options(2));
    request(&mut rig, T_IN, 0, &[(BUFFER, 512, true)]);
    let states = rig.device.stop();
    assert_eq!(states[0].unwrap().next_used, 1);
    assert_eq!(rig.device.stop(), QueueStates::default());
    rig.kick(0);
    rig.start(&states, 0);
    assert_eq!(
        request(&mut rig, T_IN, 1, &[(BUFFER, 512, true)]),
        (S_OK, 513)
    );
    assert_eq!(rig.drivers[0].get(BUFFER, 512), [1; 512]);
}

#[test]
fn only_files_and_block_devices_are_disks() {
    for path in ["/", "/dev/null"] {
        let options = BlockOptions {
            file: File::open(path).unwrap(),
            ..options(0)
        };
        assert!(matches!(Block::new(options), Err(Error::WrongKind { .. })));
    }
    let odd = options(0);
    odd.file.set_len(1023).unwrap();
    assert_eq!(
        Block::new(odd).unwrap().config().bytes()[..8],
        1u64.to_le_bytes()
    );
}

#[test]
fn large_requests_leave_the_other_devices_their_turn() {
    let options = options(0);
    options.file.set_len(64 << 20).unwrap();
    let mut rig = Rig::with(Block::new(options).unwrap(), 0, 256);
    let driver = &mut rig.drivers[0];
    driver.put(DATA, &[0; 16]);
    let mut request = vec![(DATA, 16, false)];
    // The same memory again and again.
    request.extend([(BUFFER, SIZE_MAX, true); 40]);
    request.push((STATUS, 1, true));
    for _ in 0..3 {
        driver.add(&request);
    }
    for _ in 0..3 {
        let progress = rig.device.handle(Event::Queue(0)).unwrap();
        assert_eq!(progress, Progress::More);
        assert_eq!(rig.drivers[0].used().unwrap().1, 40 * SIZE_MAX + 1);
        assert_eq!(rig.drivers[0].used(), None);
    }
    let progress = rig.device.handle(Event::Queue(0)).unwrap();
    assert_eq!(progress, Progress::Done);
}

/// A format guessed from the first bytes, which the guest writes, was CVE-2026-27211 elsewhere.
#[test]
fn what_a_guest_writes_to_its_disk_never_changes_what_the_disk_is() {
    let options = options(4);
    let path = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&options.file)
    );
    let mut rig = rig(options);
    // A QCOW2 header that names a file of the host as backing file.
    let mut header = [
        &b"QFI\xfb\0\0\0\x03"[..],
        &104_u64.to_be_bytes(),
        &[0, 0, 0, 11],
    ]
    .concat();
    header.resize(104, 0);
    header.extend_from_slice(b"/etc/passwd");
    header.resize(512, 0);
    rig.drivers[0].put(BUFFER, &header);
    let written = request(&mut rig, T_OUT, 0, &[(BUFFER, 512, false)]);
    assert_eq!(written, (S_OK, 1));
    let file = File::open(path).unwrap();
    // The first machine has ended, and its lock with it.
    drop(rig);
    let again = BlockOptions {
        id: "root".into(),
        file,
        read_only: true,
        layer: None,
        queues: 1,
        engine: Engine::Sync,
        cache: CacheType::Unsafe,
        discard: true,
        limits: LimiterOptions::default(),
    };
    let mut rig = Rig::new(Block::new(again).unwrap());
    assert_eq!(rig.device.config().bytes()[..8], 4_u64.to_le_bytes());
    let read = request(&mut rig, T_IN, 0, &[(BUFFER, 512, true)]);
    assert_eq!(read, (S_OK, 513));
    assert_eq!(rig.drivers[0].get(BUFFER, 512), header);
}

/// One range of a discard or a write-zeroes request.
fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &count.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

/// Sends `kind` with `list` as its data; the status.
fn deallocate(rig: &mut Rig<Block>, kind: u32, list: &[u8]) -> u8 {
    rig.drivers[0].put(BUFFER, list);
    let data = [(BUFFER, list.len() as u32, false)];
    let data = if list.is_empty() { &[] } else { &data[..] };
    request(rig, kind, 0, data).0
}

/// Which sectors of the file hold what [`options`] wrote there, as letters: `x` it does, `.` zeros.
fn map(file: &File) -> String {
    let mut sector = [0; 512];
    let sectors = file.metadata().unwrap().len() / 512;
    let letter = |index| {
        std::os::unix::fs::FileExt::read_exact_at(file, &mut sector, index * 512).unwrap();
        match sector {
            _ if sector == [index as u8; 512] => 'x',
            _ if sector == [0; 512] => '.',
            _ => '?',
        }
    };
    (0..sectors).map(letter).collect()
}

#[test]
fn discards_and_zeroes_exactly_what_is_listed() {
    const UNMAP: u32 = 1;
    for (kind, flags) in [(T_DISCARD, 0), (T_WRITE_ZEROES, 0), (T_WRITE_ZEROES, UNMAP)] {
        let options = options(32);
        let file = options.file.try_clone().unwrap();
        let mut rig = rig(options);
        let list = [range(9, 1, flags), range(16, 16, flags), range(3, 0, flags)].concat();
        assert_eq!(deallocate(&mut rig, kind, &list), S_OK);
        // Sector 0 holds zeros from the start.
        assert_eq!(map(&file), "xxxxxxxxx.xxxxxx................");
    }
}

#[test]
fn a_discard_gives_the_host_its_blocks_back() {
    use std::os::unix::fs::MetadataExt as _;
    let options = options(2048);
    let file = options.file.try_clone().unwrap();
    file.sync_all().unwrap();
    let before = file.metadata().unwrap().blocks();
    let mut rig = rig(options);
    let all = range(0, 2048, 0);
    assert_eq!(deallocate(&mut rig, T_DISCARD, &all), S_OK);
    let after = file.metadata().unwrap();
    assert!(before >= 2048 && after.blocks() < 16, "{before}, {after:?}");
    assert_eq!(after.len(), 2048 * 512);
}

#[test]
fn a_bad_range_touches_nothing() {
    let options = options(8);
    let file = options.file.try_clone().unwrap();
    let mut rig = rig(options);
    let good = range(0, 8, 0);
    for (bad, status) in [
        (range(8, 1, 0), S_IOERR),
        (range(0, 9, 0), S_IOERR),
        (range(u64::MAX, 1, 0), S_IOERR),
        (range(u64::MAX - 1, u32::MAX, 0), S_IOERR),
        (range(0, u32::MAX, 0), S_IOERR),
        (range(0, 1, 2), S_UNSUPP),
        (range(0, 1, u32::MAX), S_UNSUPP),
        (vec![0; 1], S_IOERR),
        (vec![0; 15], S_IOERR),
    ] {
        let list = [good.clone(), bad].concat();
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            assert_eq!(deallocate(&mut rig, kind, &list), status, "{list:x?}");
        }
    }
    assert_eq!(deallocate(&mut rig, T_DISCARD, &range(0, 1, 1)), S_UNSUPP);
    assert_eq!(deallocate(&mut rig, T_DISCARD, &[]), S_IOERR);
    assert_eq!(deallocate(&mut rig, T_DISCARD, &good.repeat(17)), S_IOERR);
    assert_eq!(map(&file), "xxxxxxxx");
    assert_eq!(deallocate(&mut rig, T_DISCARD, &good.repeat(16)), S_OK);
}

#[test]
fn ranges_have_a_largest_size() {
    let options = options(0);
    options.file.set_len(1 << 40).unwrap();
    let mut rig = rig(options);
    let config = rig.device.config().bytes();
    for (kind, at) in [(T_DISCARD, 36), (T_WRITE_ZEROES, 48)] {
        let most = u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!(deallocate(&mut rig, kind, &range(5, most, 0)), S_OK);
        let beyond = range(5, most + 1, 0);
        assert_eq!(deallocate(&mut rig, kind, &beyond), S_IOERR);
    }
}

#[test]
fn offers_discard_only_where_it_is_wanted_and_possible() {
    const OFFERED: u64 = F_DISCARD | F_WRITE_ZEROES;
    let features = |options| Block::new(options).unwrap().traits().features & OFFERED;
    assert_eq!(features(options(1)), OFFERED);
    let read_only = BlockOptions {
        read_only: true,
        ..options(1)
    };
    assert_eq!(features(read_only), 0);
    let unwanted = BlockOptions {
        discard: false,
        ..options(1)
    };
    assert_eq!(features(unwanted), 0);
    let unwanted = BlockOptions {
        discard: false,
        ..options(1)
    };
    let mut rig = rig(unwanted);
    let answer = deallocate(&mut rig, T_DISCARD, &range(0, 1, 0));
    assert_eq!(answer, S_UNSUPP);
}

#[test]
fn requests_beyond_the_limit_wait_and_are_served_later() {
    let mut options = options(8);
    options.limits.ops = Some(BucketOptions {
        size: 2,
        one_time_burst: 0,
        refill_time: std::time::Duration::from_millis(100),
    });
    let mut rig = rig(options);
    rig.drivers[0].put(DATA, &[0; 16]);
    for i in 0..4 {
        rig.drivers[0].add(&[(DATA, 16, false), (BUFFER + i * 512, 513, true)]);
    }
    let Progress::Later(at) = rig.device.handle(Event::Queue(0)).unwrap() else {
        panic!("nothing is held back");
    };
    for _ in 0..2 {
        assert!(rig.drivers[0].used().is_some());
    }
    assert_eq!(rig.drivers[0].used(), None);
    assert_eq!(rig.signal.count(), 1, "the driver hears of what was served");
    std::thread::sleep(at.saturating_duration_since(std::time::Instant::now()));
    rig.kick(0);
    assert!(rig.drivers[0].used().is_some());
}

/// A copy of the descriptor that somebody else has would hold the lock on.
#[test]
fn a_drive_that_goes_gives_its_locks_back() {
    use super::lock::{Lock, take};
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(4096).unwrap();
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .open(image.path())
            .unwrap()
    };
    let file = open();
    let _copy = file.try_clone().unwrap();
    let mut drive = Block::new(BlockOptions { file, ..options(0) }).unwrap();
    let other = open();
    assert_eq!(take(&other, true).unwrap(), Lock::InUse);
    drive.retire();
    assert_eq!(take(&other, false).unwrap(), Lock::Taken);
}

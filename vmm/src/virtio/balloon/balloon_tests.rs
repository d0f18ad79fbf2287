//! The balloon against drivers that do what they should, and others.

use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::virtio::device::VERSION_1;
use crate::virtio::queue::QueueStates;
use crate::virtio::testing::{DATA, END, Rig};

const ALL: BalloonOptions = BalloonOptions {
    amount_mib: 3,
    deflate_on_oom: true,
    stats_polling_interval_s: 60,
    free_page_hinting: true,
    free_page_reporting: true,
};
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const HINTING: usize = 3;
const REPORTING: usize = 4;
const ALL_FEATURES: u64 = F_STATS_VQ | F_DEFLATE_ON_OOM | F_FREE_PAGE_HINT | F_REPORTING;

fn rig(options: BalloonOptions) -> Rig<Balloon> {
    let balloon = Balloon::new(options).unwrap();
    let features = balloon.traits().features;
    let rig = Rig::with(balloon, features, 16);
    // All that a test may lose.
    rig.memory
        .write_slice(&vec![7; (END - DATA) as usize], GuestAddress(DATA))
        .unwrap();
    rig
}

impl Rig<Balloon> {
    fn ask(&mut self, command: Command) -> Result<Answer, Error> {
        match self.device.update(Update::Balloon(command)) {
            Ok(answer) => Ok(answer),
            Err(UpdateError::Balloon(error)) => Err(error),
            Err(other) => panic!("{other}"),
        }
    }

    fn status(&mut self) -> Status {
        match self.ask(Command::Report) {
            Ok(Answer::Balloon(status)) => *status,
            other => panic!("{other:?}"),
        }
    }

    /// Offers `numbers` for the balloon, listed at `place`.
    fn inflate(&mut self, place: u64, numbers: &[u32]) {
        let list: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.drivers[INFLATE].put(place, &list);
        self.drivers[INFLATE].add(&[(place, list.len() as u32, false)]);
        self.kick(INFLATE as u16);
    }

    fn is_lost(&self, address: u64) -> bool {
        match self.memory.read_obj::<u8>(GuestAddress(address)).unwrap() {
            0 => true,
            7 => false,
            other => panic!("{other} at {address:#x}"),
        }
    }

    fn lost(&self) -> Vec<u64> {
        let pages = (DATA..END).step_by(PAGE as usize);
        pages.filter(|page| self.is_lost(page + 100)).collect()
    }
}

fn page(address: u64) -> u32 {
    (address / PAGE) as u32
}

#[test]
fn offers_what_was_asked_for() {
    let none = BalloonOptions {
        amount_mib: 0,
        deflate_on_oom: false,
        stats_polling_interval_s: 0,
        free_page_hinting: false,
        free_page_reporting: false,
    };
    let of = |options| {
        let traits = Balloon::new(options).unwrap().traits();
        (traits.features, traits.queue_sizes.len())
    };
    assert_eq!(of(none), (0, 2));
    assert_eq!(of(ALL), (ALL_FEATURES, 5));
    let hinting = BalloonOptions {
        free_page_hinting: true,
        ..none
    };
    assert_eq!(of(hinting), (F_FREE_PAGE_HINT, 3));
    let too_large = BalloonOptions {
        amount_mib: 1 << 24,
        ..none
    };
    assert_eq!(
        Balloon::new(too_large).err(),
        Some(Error::TooLarge(1 << 24))
    );
}

#[test]
fn queues_of_features_that_were_not_taken_are_not_there() {
    assert_eq!(Role::of(2, ALL_FEATURES), Some(Role::Statistics));
    assert_eq!(Role::of(4, ALL_FEATURES), Some(Role::Reporting));
    assert_eq!(Role::of(2, F_REPORTING), Some(Role::Reporting));
    assert_eq!(Role::of(3, F_REPORTING | F_STATS_VQ), Some(Role::Reporting));
    assert_eq!(Role::of(2, VERSION_1), None);
    assert_eq!(Role::of(u16::MAX, ALL_FEATURES), None);
}

#[test]
fn what_is_in_the_balloon_is_the_hosts() {
    let mut rig = rig(ALL);
    let place = DATA + 0x8000;
    rig.inflate(
        place,
        &[page(DATA + 0x3000), page(DATA), page(DATA + 0x2000)],
    );
    assert_eq!(rig.lost(), [DATA, DATA + 0x2000, DATA + 0x3000]);
    assert_eq!(rig.drivers[INFLATE].used(), Some((0, 0)));
    // Taking one out is no work, and it is as good as new.
    rig.drivers[DEFLATE].add(&[(place, 4, false)]);
    rig.kick(DEFLATE as u16);
    assert_eq!(rig.drivers[DEFLATE].used(), Some((0, 0)));
    rig.memory.write_obj(7u8, GuestAddress(DATA + 100)).unwrap();
    assert!(!rig.is_lost(DATA + 100));
}

#[test]
fn what_is_no_memory_is_passed_over() {
    let mut rig = rig(ALL);
    let place = DATA + 0x8000;
    let outside = [u32::MAX, page(END), page(END) + 1, 0x000c_0000];
    // The last page, and the first one after it, in one run: none of it is taken.
    rig.inflate(place, &[outside[0], outside[3], page(DATA)]);
    assert_eq!(rig.lost(), [DATA]);
    rig.inflate(place, &outside);
    rig.inflate(place, &[page(END) - 1, page(END)]);
    assert_eq!(rig.lost(), [DATA]);
    for head in 0..3 {
        assert_eq!(rig.drivers[INFLATE].used(), Some((head, 0)));
    }
}

#[test]
fn a_list_is_never_taken_whole_because_it_says_so() {
    let mut rig = rig(ALL);
    let place = DATA + 0x8000;
    // A list of 1 MiB, over and over the same memory: what is looked at is bounded.
    rig.drivers[INFLATE].add(&[(0, 0x10_0000, false), (0, 0x10_0000, false)]);
    // Nothing but buffers to write to, and no buffer at all.
    rig.drivers[INFLATE].add(&[(DATA, 0x1000, true)]);
    rig.drivers[INFLATE].add(&[(place, 3, false)]);
    rig.kick(INFLATE as u16);
    for head in [0, 2, 3] {
        assert_eq!(rig.drivers[INFLATE].used(), Some((head, 0)));
    }
    assert_eq!(rig.lost(), Vec::<u64>::new());
}

#[test]
fn reported_pages_are_the_hosts() {
    let mut rig = rig(ALL);
    rig.drivers[REPORTING].add(&[
        (DATA, 0x2000, true),
        // Not whole pages: only what is whole goes.
        (DATA + 0x4800, 0x2000, true),
        (DATA + 0x8000, 0, true),
    ]);
    rig.kick(REPORTING as u16);
    assert_eq!(rig.drivers[REPORTING].used(), Some((0, 0)));
    assert_eq!(rig.lost(), [DATA, DATA + 0x1000, DATA + 0x5000]);
    let metrics = &rig.device.metrics;
    assert_eq!(metrics.free_page_report_count.total(), 3);
    assert_eq!(metrics.free_page_report_freed.total(), 0x3000);
    // What the guest lets the device only read is not given away.
    rig.drivers[REPORTING].add(&[(DATA + 0x9000, 0x1000, false)]);
    rig.kick(REPORTING as u16);
    assert_eq!(rig.lost().len(), 3);
}

#[test]
fn one_chain_gives_back_no_more_than_a_turn_has_time_for() {
    // Not all of it is touched, so it takes no memory of the host's.
    const BULK: u64 = 1 << 30;
    let len = 2 * CHAIN_BYTES;
    let ranges = [
        (GuestAddress(0), END as usize),
        (GuestAddress(BULK), len as usize),
    ];
    let memory = crate::memory::GuestMemory::from_ranges(&ranges).unwrap();
    for segments in [1, 4] {
        let mut rig = Rig::on(memory.clone(), Balloon::new(ALL).unwrap(), ALL_FEATURES, 16);
        rig.drivers[REPORTING].set_available_index(0);
        rig.drivers[REPORTING].put(rig.drivers[REPORTING].state.used, &[0; 4]);
        let places = [0, CHAIN_BYTES - PAGE, CHAIN_BYTES, len - PAGE].map(|at| BULK + at);
        for place in places {
            rig.memory.write_obj(7_u8, GuestAddress(place)).unwrap();
        }
        let each = (len / segments) as u32;
        let chain: Vec<_> = (0..segments)
            .map(|n| (BULK + n * u64::from(each), each, true))
            .collect();
        rig.drivers[REPORTING].add(&chain);
        let progress = rig.device.handle(Event::Queue(REPORTING as u16)).unwrap();
        assert_eq!(progress, Progress::More);
        assert_eq!(rig.drivers[REPORTING].used(), Some((0, 0)));
        assert_eq!(
            places.map(|place| rig.is_lost(place)),
            [true, true, false, false]
        );
        let metrics = &rig.device.metrics;
        assert_eq!(metrics.free_page_report_freed.total(), CHAIN_BYTES);
        assert_eq!(metrics.free_page_report_fails.total(), 0);
    }
}

#[test]
fn statistics_come_when_they_are_due() {
    let mut rig = rig(ALL);
    assert_eq!(rig.status().statistics, Some(Statistics::default()));
    let tell = |rig: &mut Rig<Balloon>, free: u64| {
        let mut entry = vec![4, 0];
        entry.extend(free.to_le_bytes());
        rig.drivers[STATISTICS].put(DATA, &entry);
    };
    tell(&mut rig, 100);
    rig.drivers[STATISTICS].add(&[(DATA, 10, false)]);
    let event = Event::Queue(STATISTICS as u16);
    let Progress::Later(due) = rig.device.handle(event).unwrap() else {
        panic!("it does not wait");
    };
    let now = Instant::now();
    let wait = due.saturating_duration_since(now);
    assert!(
        wait <= Duration::from_secs(60) && wait > Duration::from_secs(30),
        "{wait:?}"
    );
    let told = |rig: &mut Rig<Balloon>| {
        let statistics = rig.status().statistics.unwrap();
        statistics.iter().collect::<Vec<_>>()
    };
    assert_eq!(told(&mut rig), [("free_memory", 100)]);
    assert_eq!(rig.drivers[STATISTICS].used(), None, "it is kept");
    // A new interval asks at once; the driver answers with new values.
    assert_eq!(rig.ask(Command::StatisticsInterval(1)), Ok(Answer::Done));
    rig.kick(STATISTICS as u16);
    assert_eq!(rig.drivers[STATISTICS].used(), Some((0, 0)));
    assert_eq!(rig.drivers[STATISTICS].used(), None);
    tell(&mut rig, 200);
    rig.drivers[STATISTICS].add(&[(DATA, 10, false)]);
    rig.kick(STATISTICS as u16);
    assert_eq!(told(&mut rig), [("free_memory", 200)]);
    assert_eq!(rig.drivers[STATISTICS].used(), None, "it is kept again");
    assert_eq!(rig.status().options.stats_polling_interval_s, 1);
}

#[test]
fn many_statistics_buffers_come_back_one_by_one() {
    let mut rig = rig(ALL);
    for _ in 0..8 {
        rig.drivers[STATISTICS].add(&[(DATA, 0x1000, false), (DATA, 0x1000, true)]);
    }
    for _ in 0..100 {
        rig.kick(STATISTICS as u16);
    }
    assert_eq!(rig.drivers[STATISTICS].used(), None);
    for (interval, head) in [(1, 0), (2, 2), (3, 4)] {
        rig.ask(Command::StatisticsInterval(interval)).unwrap();
        rig.kick(STATISTICS as u16);
        assert_eq!(rig.drivers[STATISTICS].used(), Some((head, 0)));
        assert_eq!(rig.drivers[STATISTICS].used(), None);
    }
}

#[test]
fn a_kept_buffer_survives_a_stop() {
    let mut rig = rig(ALL);
    rig.drivers[STATISTICS].add(&[(DATA, 10, false)]);
    rig.kick(STATISTICS as u16);
    let states = rig.device.stop();
    assert_eq!(states[STATISTICS].unwrap().next_available, 0);
    assert_eq!(rig.device.stop(), QueueStates::default());
    rig.start(&states, ALL_FEATURES);
    rig.kick(STATISTICS as u16);
    assert_eq!(rig.drivers[STATISTICS].used(), None);
    rig.ask(Command::StatisticsInterval(1)).unwrap();
    rig.kick(STATISTICS as u16);
    assert_eq!(rig.drivers[STATISTICS].used(), Some((0, 0)));
}

#[test]
fn the_size_is_told_and_the_drivers_is_believed() {
    let mut rig = rig(ALL);
    assert_eq!(rig.status().target_pages, 3 * 256);
    assert_eq!(rig.ask(Command::Resize(5)), Ok(Answer::Done));
    assert_eq!(rig.signal.config_changes(), 1);
    let config = rig.device.config();
    assert_eq!((config.u32_at(0), config.generation()), (5 * 256, 2));
    // The driver writes `actual` and nothing else.
    config.write(0, &[1, 1, 1, 1, 9, 0, 0, 0, 1, 1, 1, 1]);
    let status = rig.status();
    assert_eq!((status.target_pages, status.actual_pages), (5 * 256, 9));
    assert_eq!(status.options.amount_mib, 5);
    assert_eq!(
        rig.ask(Command::Resize(1 << 24)),
        Err(Error::TooLarge(1 << 24))
    );
    assert_eq!(rig.status().target_pages, 5 * 256);
    // Without a driver it is there for the next one.
    rig.device.stop();
    assert_eq!(rig.ask(Command::Resize(6)), Ok(Answer::Done));
    assert_eq!(
        (config.u32_at(0), rig.signal.config_changes()),
        (6 * 256, 1)
    );
}

#[test]
fn hinted_pages_are_the_hosts_within_the_run() {
    let mut rig = rig(ALL);
    let place = DATA + 0x8000;
    let say = |rig: &mut Rig<Balloon>, command: u32, pages: &[u64]| {
        let driver = &mut rig.drivers[HINTING];
        driver.put(place, &command.to_le_bytes());
        driver.add(&[(place, 4, false)]);
        for page in pages {
            driver.add(&[(*page, 0x1000, true)]);
        }
        rig.kick(HINTING as u16);
    };
    let hinting = |rig: &mut Rig<Balloon>| {
        let status = rig.status().hinting.unwrap();
        (status.host_cmd, status.guest_cmd)
    };
    say(&mut rig, 2, &[DATA]);
    assert_eq!(rig.lost(), Vec::<u64>::new(), "nobody asked");
    let start = |acknowledge_on_stop| Command::StartHinting {
        acknowledge_on_stop,
    };
    rig.ask(start(true)).unwrap();
    assert_eq!(
        (hinting(&mut rig), rig.signal.config_changes()),
        ((2, Some(2)), 1)
    );
    rig.ask(start(true)).unwrap();
    say(&mut rig, 2, &[DATA]);
    assert_eq!(rig.lost(), Vec::<u64>::new(), "of a run before");
    say(&mut rig, 3, &[DATA, DATA + 0x2000]);
    assert_eq!(rig.lost(), [DATA, DATA + 0x2000]);
    say(&mut rig, 0, &[DATA + 0x4000]);
    assert_eq!(rig.lost().len(), 2, "after the end");
    assert_eq!(hinting(&mut rig), (1, Some(0)), "acknowledged");
    rig.ask(start(false)).unwrap();
    say(&mut rig, 4, &[]);
    say(&mut rig, 0, &[]);
    assert_eq!(hinting(&mut rig), (4, Some(0)));
    rig.ask(Command::StopHinting).unwrap();
    assert_eq!(hinting(&mut rig), (1, Some(0)));
    rig.device.stop();
    assert_eq!(hinting(&mut rig), (0, None));
    assert_eq!(rig.ask(start(true)), Err(Error::NotRunning));
}

#[test]
fn refuses_what_it_was_not_made_for() {
    let mut plain = rig(BalloonOptions {
        stats_polling_interval_s: 0,
        free_page_hinting: false,
        ..ALL
    });
    let status = plain.status();
    assert_eq!((status.statistics, status.hinting), (None, None));
    assert_eq!(plain.ask(Command::StatisticsInterval(0)), Ok(Answer::Done));
    assert_eq!(
        plain.ask(Command::StatisticsInterval(1)),
        Err(Error::StatisticsSwitch)
    );
    assert_eq!(plain.ask(Command::StopHinting), Err(Error::NoHinting));
    let mut all = rig(ALL);
    assert_eq!(
        all.ask(Command::StatisticsInterval(0)),
        Err(Error::StatisticsSwitch)
    );
}

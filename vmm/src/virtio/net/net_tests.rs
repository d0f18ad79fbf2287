use super::features::*;
use super::testing::{Fake, RX, TX, frame, service, socket, who_has};
use super::*;
use crate::virtio::device::EVENT_IDX;
use crate::virtio::rate_limiter::BucketOptions;
use crate::virtio::testing::{DATA, Rig};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;

fn rig(features: u64, size: u16) -> (Rig<Fake>, File) {
    let (card, tap) = socket();
    (Rig::with(Fake(card), features, size), tap)
}

#[test]
fn sends_frames_from_scattered_buffers() {
    let (mut rig, mut peer) = rig(0, 16);
    let packet = frame(60, 7);
    let driver = &mut rig.drivers[1];
    driver.put(DATA, &packet[..5]);
    driver.put(DATA + 100, &packet[5..]);
    driver.add(&[(DATA, 5, false), (DATA + 100, 67, false)]);
    rig.kick(TX);
    let mut data = [0; 200];
    assert_eq!(peer.read(&mut data).unwrap(), 72);
    assert_eq!(data[..72], packet);
    assert_eq!(rig.drivers[1].used(), Some((0, 0)));
    let metrics = &rig.device.0.metrics;
    assert_eq!(metrics.tx_packets_count.total(), 1);
    assert_eq!(metrics.tx_bytes_count.total(), 60);
}

#[test]
fn what_is_no_frame_is_not_sent_and_the_queue_goes_on() {
    let (mut rig, mut peer) = rig(0, 16);
    for buffers in [
        &[(DATA, 0, false)][..],
        &[(DATA, 12, false)],
        &[(DATA, 25, false)],
        &[(DATA, 26, true)],
        &[(DATA, 65575, false)],
        &[(DATA, 0x10_0000, false), (DATA, 0x10_0000, false)],
    ] {
        rig.drivers[1].add(buffers);
        rig.kick(TX);
        assert!(rig.drivers[1].used().is_some(), "{buffers:?}");
    }
    let mut data = [0; 200];
    assert!(peer.read(&mut data).is_err());
    rig.drivers[1].add(&[(DATA, 26, false)]);
    rig.kick(TX);
    assert_eq!(peer.read(&mut data).unwrap(), 26);
}

#[test]
fn receives_into_one_chain() {
    let (mut rig, mut peer) = rig(0, 16);
    rig.kick(RX);
    rig.drivers[0].add(&[(DATA, 12, true), (DATA + 100, 2000, true)]);
    peer.write_all(&frame(60, 9)).unwrap();
    rig.poll();
    let driver = &mut rig.drivers[0];
    assert_eq!(driver.used(), Some((0, 72)));
    assert_eq!(driver.get(DATA, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(driver.get(DATA + 100, 61), [&[9; 60][..], &[0]].concat());
}

#[test]
fn merges_buffers_for_a_large_frame() {
    let (mut rig, mut peer) = rig(F_MRG_RXBUF, 16);
    for i in 0..4 {
        rig.drivers[0].add(&[(DATA + i * 0x1000, 1000, true)]);
    }
    peer.write_all(&frame(2500, 5)).unwrap();
    rig.poll();
    let driver = &mut rig.drivers[0];
    for used in [(0, 1000), (1, 1000), (2, 512)] {
        assert_eq!(driver.used(), Some(used));
    }
    assert_eq!(driver.used(), None);
    assert_eq!(driver.get(DATA + 10, 2), [3, 0]);
    assert_eq!(
        driver.get(DATA + 0x2000, 513),
        [&[5; 512][..], &[0]].concat()
    );
    assert_eq!(rig.signal.count(), 1);
}

#[test]
fn a_full_receive_ring_stalls_nothing_and_loses_nothing() {
    let (mut rig, mut peer) = rig(F_MRG_RXBUF, 4);
    peer.write_all(&frame(60, 1)).unwrap();
    peer.write_all(&frame(1500, 2)).unwrap();
    rig.poll();
    // No buffers: transmission works all the same.
    rig.drivers[1].add(&[(DATA, 26, false)]);
    rig.kick(TX);
    let mut data = [0; 200];
    assert_eq!(peer.read(&mut data).unwrap(), 26);

    rig.drivers[0].add(&[(DATA, 1000, true)]);
    assert_eq!(rig.drivers[0].wanted_doorbell(), 0);
    rig.kick(RX);
    assert_eq!(rig.drivers[0].used(), Some((0, 72)));
    // The second takes two buffers, which come one by one.
    rig.drivers[0].add(&[(DATA, 1000, true)]);
    rig.kick(RX);
    assert_eq!(rig.drivers[0].used(), None);
    assert_eq!(rig.drivers[0].wanted_doorbell(), 2);
    rig.drivers[0].add(&[(DATA + 0x1000, 1000, true)]);
    rig.kick(RX);
    assert_eq!(rig.drivers[0].used(), Some((1, 1000)));
    assert_eq!(rig.drivers[0].used(), Some((2, 512)));
}

#[test]
fn a_frame_larger_than_all_buffers_is_lost_and_the_next_arrives() {
    for (features, size) in [(0, 16), (F_MRG_RXBUF, 2)] {
        let (mut rig, mut peer) = rig(features, size);
        for _ in 0..2 {
            rig.drivers[0].add(&[(DATA, 500, true)]);
        }
        peer.write_all(&frame(1500, 1)).unwrap();
        peer.write_all(&frame(60, 2)).unwrap();
        rig.poll();
        assert_eq!(rig.drivers[0].used(), Some((0, 72)));
        assert_eq!(rig.drivers[0].used(), None);
        assert_eq!(rig.drivers[0].get(DATA + 12, 60), [2; 60]);
    }
}

#[test]
fn a_receive_buffer_without_room_for_the_header_breaks_the_queue() {
    let (mut rig, mut peer) = rig(0, 16);
    rig.drivers[0].add(&[(DATA, 11, true)]);
    peer.write_all(&frame(60, 1)).unwrap();
    assert!(rig.handle(Event::Queue(RX)).is_err());
}

#[test]
fn stops_without_watching_the_tap() {
    let (mut rig, mut peer) = rig(0, 16);
    let states = rig.device.stop();
    for _ in 0..3 {
        peer.write_all(&frame(600, 3)).unwrap();
    }
    assert_eq!(rig.events.wait(Some(std::time::Duration::ZERO)).unwrap(), 0);
    rig.drivers[0].add(&[(DATA, 500, true)]);
    rig.start(&states, 0);
    // What came meanwhile was for another driver.
    rig.poll();
    assert_eq!(rig.drivers[0].used(), None);
    peer.write_all(&frame(60, 4)).unwrap();
    rig.poll();
    assert_eq!(rig.drivers[0].used(), Some((0, 72)));
}

#[test]
fn offers_what_it_is_configured_for() {
    let (rig, _) = rig(0, 16);
    let features = rig.device.traits().features;
    assert_eq!(features & (F_MAC | F_MTU), F_MAC | F_MTU);
    assert_eq!(features & (F_HOST_UFO | F_GUEST_UFO | F_MQ | F_CTRL_VQ), 0);
    let config = rig.device.config().bytes();
    assert_eq!(config, [2, 0, 0, 0, 0, 7, 0, 0, 1, 0, 0x78, 5]);
}

#[test]
fn what_is_no_tap_is_refused() {
    let options = options(vec![File::open("/dev/null").unwrap()]);
    assert!(matches!(Net::new(options), Err(Error::Tap(_))));
}

/// A card without anything that is not asked for.
fn options(taps: Vec<File>) -> NetOptions {
    NetOptions {
        id: "eth0".to_owned(),
        taps: taps.into_iter().map(Arc::new).collect(),
        mac: None,
        mtu: None,
        rx_limits: LimiterOptions::default(),
        tx_limits: LimiterOptions::default(),
        mmds: None,
    }
}

/// A real tap, in a network namespace of its own. Making one needs privileges, which the other
/// tests do not.
#[test]
fn a_real_tap_takes_every_offload() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not root: no tap can be made here");
        return;
    }
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        assert!(tap::prepare(&tap::create("test0", 0), 12, false).is_err());
        let tap = tap::create("test1", libc::IFF_VNET_HDR);
        let net = Net::new(options(vec![tap.try_clone().unwrap()])).unwrap();
        assert_eq!(net.traits().features & F_MAC, 0);
        let status = nix::fcntl::fcntl(&tap, nix::fcntl::FcntlArg::F_GETFL).unwrap();
        assert_ne!(status & libc::O_NONBLOCK, 0);
        let mut rig = Rig::with(net, u64::MAX, 16);
        // The interface is down: the host refuses the frame, the queue goes on.
        rig.drivers[1].add(&[(DATA, 64, false)]);
        rig.kick(TX);
        assert!(rig.drivers[1].used().is_some());
        rig.kick(RX);
        assert!(tap.as_raw_fd() > 0);
    })
    .join()
    .unwrap();
}

/// The kernel spreads frames over as many queues as the driver asks for, and over one before.
#[test]
fn the_driver_chooses_how_many_pairs_it_uses() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not root: no tap can be made here");
        return;
    }
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let flags = libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        let taps: Vec<File> = (0..3).map(|_| tap::create("test2", flags)).collect();
        let is_used = |tap: &File| tap::use_queue(tap, true).is_err();
        let watches: Vec<File> = taps.iter().map(|tap| tap.try_clone().unwrap()).collect();
        assert!(matches!(
            Net::new(options(Vec::new())),
            Err(Error::Queues(0))
        ));
        let net = Net::new(options(taps)).unwrap();
        assert_eq!(net.traits().queue_sizes.len(), 7);
        assert_eq!(net.config().bytes()[8..10], [3, 0]);
        let mut rig = Rig::with(net, !EVENT_IDX, 16);
        let mut pairs = |count: u16, class: u8| {
            let command = [&[class, 0][..], &count.to_le_bytes()].concat();
            rig.drivers[6].put(DATA, &command);
            rig.drivers[6].add(&[(DATA, 2, false), (DATA + 2, 2, false), (DATA + 8, 1, true)]);
            rig.kick(6);
            assert!(rig.drivers[6].used().is_some_and(|(_, len)| len == 1));
            rig.drivers[6].get(DATA + 8, 1)[0]
        };
        for (count, expected) in [
            (3, 0),
            (1, 0),
            (2, 0),
            (2, 0),
            (3, 0),
            (0, 1),
            (4, 1),
            (65535, 1),
        ] {
            assert_eq!(pairs(count, 4), expected, "{count}");
        }
        assert_eq!(pairs(1, 1), 1, "another class");
        assert!(watches.iter().all(is_used));
        assert_eq!(pairs(1, 4), 0);
        assert!(!is_used(&watches[1]) && !is_used(&watches[2]));
        // That took them into use: the card's own view of them is older, and it gets along.
        assert_eq!(pairs(2, 4), 1);
        rig.device.stop();
        assert!(is_used(&watches[0]));
    })
    .join()
    .unwrap();
}

#[test]
fn the_control_queue_wants_room_for_its_answer() {
    let memory = crate::virtio::testing::memory();
    let mut driver = crate::virtio::testing::Driver::new(&memory, 0, 16);
    let mut queue = driver.queue(16, false);
    let mut chain = Chain::default();
    let never = |_| panic!("nothing is set");
    driver.add(&[(DATA, 3, false), (DATA + 8, 1, true)]);
    assert!(queue.pop(&memory, &mut chain).unwrap());
    assert_eq!(control::serve(&chain, &memory, 8, never), Ok(1));
    assert_eq!(driver.get(DATA + 8, 1), [1]);
    driver.add(&[(DATA, 4, false)]);
    assert!(queue.pop(&memory, &mut chain).unwrap());
    assert!(control::serve(&chain, &memory, 8, never).is_err());
}

/// A card that leads to a metadata service, and its driver.
fn with_service() -> (Rig<Fake>, File) {
    let (card, tap) = service();
    (Rig::with(Fake(card), F_MRG_RXBUF, 16), tap)
}

#[test]
fn frames_for_the_service_never_reach_the_tap() {
    let (mut rig, mut peer) = with_service();
    let ask = |rig: &mut Rig<Fake>, address| {
        rig.drivers[1].put(DATA, &who_has(address));
        rig.drivers[1].add(&[(DATA, 7, false), (DATA + 7, 47, false)]);
        rig.kick(TX);
        assert!(rig.drivers[1].used().is_some());
    };
    let mut data = [0; 200];
    ask(&mut rig, [169, 254, 169, 253]);
    assert_eq!(peer.read(&mut data).unwrap(), 54);
    // No buffer yet: the answer waits, and frames of the tap wait behind it.
    ask(&mut rig, [169, 254, 169, 254]);
    assert!(peer.read(&mut data).is_err());
    peer.write_all(&frame(60, 1)).unwrap();
    rig.poll();
    for i in 0..2 {
        rig.drivers[0].add(&[(DATA + 0x1000 + i * 0x1000, 1000, true)]);
    }
    rig.kick(RX);
    assert_eq!(rig.drivers[0].used(), Some((0, 54)));
    let answer = rig.drivers[0].get(DATA + 0x1000, 54);
    assert_eq!(answer[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(answer[12..18], [2, 0, 0, 0, 0, 7]);
    assert_eq!(answer[24..26], [8, 6]);
    assert_eq!(answer[33], 2, "a reply");
    assert_eq!(answer[40..44], [169, 254, 169, 254]);
    assert_eq!(rig.drivers[0].used(), Some((1, 72)));
    // A reset forgets an answer that nobody took.
    ask(&mut rig, [169, 254, 169, 254]);
    let states = rig.device.stop();
    rig.start(&states, F_MRG_RXBUF);
    rig.drivers[0].add(&[(DATA, 1000, true)]);
    rig.kick(RX);
    assert_eq!(rig.drivers[0].used(), None);
}

#[test]
fn the_service_s_frames_obey_the_limit_of_what_is_received() {
    let (mut rig, _peer) = with_service();
    rig.device.0.rx_limiter = bytes(30);
    for i in 0..8 {
        rig.drivers[0].add(&[(DATA + 0x1000 + i * 0x1000, 1000, true)]);
    }
    rig.drivers[1].put(DATA, &who_has([169, 254, 169, 254]));
    for _ in 0..2 {
        rig.drivers[1].add(&[(DATA, 54, false)]);
    }
    let progress = rig.device.handle(Event::Queue(TX)).unwrap();
    assert!(matches!(progress, Progress::Later(_)), "{progress:?}");
    assert_eq!(rig.drivers[0].used(), Some((0, 54)));
    assert_eq!(rig.drivers[0].used(), None);
    let free = BucketOptions {
        size: 0,
        one_time_burst: 0,
        refill_time: std::time::Duration::ZERO,
    };
    let limits = LimiterOptions {
        bandwidth: Some(free),
        ops: None,
    };
    let update = Update::NetLimits {
        rx: limits,
        tx: LimiterOptions::default(),
    };
    assert_eq!(rig.device.0.update(update).unwrap(), Answer::Done);
    rig.kick(TX);
    assert_eq!(rig.drivers[0].used(), Some((1, 54)));
    let other = Update::Limits(LimiterOptions::default());
    assert!(rig.device.0.update(other).is_err(), "which direction?");
}

#[test]
fn buffers_taken_in_advance_are_given_back() {
    let (mut rig, mut peer) = rig(F_MRG_RXBUF, 16);
    for i in 0..10 {
        rig.drivers[0].add(&[(DATA + i * 0x1000, 500, true)]);
    }
    // A large frame makes room for another one ready.
    for _ in 0..2 {
        peer.write_all(&frame(1400, 1)).unwrap();
    }
    rig.poll();
    let states = rig.device.stop();
    assert_eq!(states[0].unwrap().next_available, 6);
    assert_eq!(states[0].unwrap().next_used, 6);
    rig.start(&states, F_MRG_RXBUF);
    peer.write_all(&frame(60, 2)).unwrap();
    rig.poll();
    for i in 0..6 {
        assert_eq!(rig.drivers[0].used().unwrap().0, i);
    }
    assert_eq!(rig.drivers[0].used(), Some((6, 72)));
    assert_eq!(rig.drivers[0].get(DATA + 0x6000 + 12, 60), [2; 60]);
}

#[test]
fn a_large_frame_spills_and_is_whole() {
    let (mut rig, mut peer) = rig(F_MRG_RXBUF, 64);
    // 2 KiB are got ready, so the rest of it comes by way of our own buffer; the second one directly.
    for i in 0..30 {
        rig.drivers[0].add(&[(DATA + i * 0x1000, 1500, true)]);
    }
    for fill in [3, 4] {
        let mut large = frame(20_000, fill);
        large[HEADER_LEN + 19_999] = 0xee;
        peer.write_all(&large).unwrap();
        rig.poll();
        let mut bytes = Vec::new();
        for _ in 0..14 {
            let (head, len) = rig.drivers[0].used().unwrap();
            bytes.extend(rig.drivers[0].get(DATA + u64::from(head) * 0x1000, len as usize));
        }
        large[10] = 14;
        assert!(bytes == large, "{fill}");
        assert_eq!(rig.drivers[0].used(), None);
    }
}

/// So many bytes, once: the bucket fills again in an hour.
fn bytes(size: u64) -> RateLimiter {
    let hour = std::time::Duration::from_secs(3600);
    RateLimiter::new(LimiterOptions {
        bandwidth: Some(BucketOptions {
            size,
            one_time_burst: 0,
            refill_time: hour,
        }),
        ops: None,
    })
}

#[test]
fn each_direction_has_a_limit_of_its_own() {
    let (mut rig, mut peer) = rig(F_MRG_RXBUF, 16);
    rig.device.0.rx_limiter = bytes(100);
    rig.device.0.tx_limiter = bytes(200);
    for i in 0..8 {
        rig.drivers[0].add(&[(DATA + i * 0x1000, 1000, true)]);
    }
    for _ in 0..5 {
        peer.write_all(&frame(60, 1)).unwrap();
    }
    rig.poll();
    // 60 bytes, and 60 more while there is anything left; the third waits.
    assert_eq!(rig.drivers[0].used(), Some((0, 72)));
    assert_eq!(rig.drivers[0].used(), Some((1, 72)));
    assert_eq!(rig.drivers[0].used(), None);
    let held_back = rig.device.handle(Event::Queue(RX)).unwrap();
    assert!(matches!(held_back, Progress::Later(_)), "{held_back:?}");

    for _ in 0..5 {
        rig.drivers[1].add(&[(DATA, 12 + 100, false)]);
    }
    rig.kick(TX);
    let mut data = [0; 200];
    for _ in 0..2 {
        assert_eq!(peer.read(&mut data).unwrap(), 112);
        assert!(rig.drivers[1].used().is_some());
    }
    assert!(peer.read(&mut data).is_err());
    assert!(rig.drivers[1].used().is_none());

    // Nothing was lost: without limits the rest arrives, in its order.
    rig.device.0.rx_limiter = RateLimiter::default();
    rig.device.0.tx_limiter = RateLimiter::default();
    rig.kick(RX);
    rig.kick(TX);
    for i in 2..5 {
        assert_eq!(rig.drivers[0].used(), Some((i, 72)));
        assert_eq!(peer.read(&mut data).unwrap(), 112);
    }
}

#[test]
fn a_reset_does_not_fill_the_bucket() {
    let (mut rig, mut peer) = rig(F_MRG_RXBUF, 16);
    rig.device.0.tx_limiter = bytes(100);
    rig.drivers[1].add(&[(DATA, 12 + 100, false)]);
    rig.kick(TX);
    let states = rig.device.stop();
    rig.start(&states, F_MRG_RXBUF);
    rig.drivers[1].add(&[(DATA, 12 + 100, false)]);
    rig.kick(TX);
    let mut data = [0; 200];
    assert_eq!(peer.read(&mut data).unwrap(), 112);
    assert!(peer.read(&mut data).is_err());
}

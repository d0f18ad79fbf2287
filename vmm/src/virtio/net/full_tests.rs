//! A tap that takes nothing: frames are lost, as they may be, and nothing waits for it.

use super::testing::{Fake, RX, TX, frame, pairs};
use super::*;
use crate::virtio::testing::{DATA, Rig};
use std::io::Write as _;

/// A frame to send, and room for those that come.
const OUT: u64 = DATA;
const IN: u64 = DATA + 0x1_0000;

/// A card with so many pairs of queues, and the other ends of its taps.
fn rig(count: usize) -> (Rig<Fake>, Vec<File>) {
    let (card, peers) = pairs(count);
    let features = if count > 1 { F_MQ | F_CTRL_VQ } else { 0 };
    let rig = Rig::with(Fake(card), features, 16);
    rig.drivers[0].put(OUT, &frame(1500, 7));
    (rig, peers)
}

/// Has a pair send a frame, which must not wait.
fn transmit(rig: &mut Rig<Fake>, pair: u16) {
    let queue = 2 * pair + TX;
    let driver = &mut rig.drivers[usize::from(queue)];
    driver.add(&[(OUT, 12, false), (OUT + 12, 1500, false)]);
    rig.kick(queue);
    let used = rig.drivers[usize::from(queue)].used();
    assert!(matches!(used, Some((_, 0))), "{used:?}");
}

/// Sends until the tap takes no more, and then some; how many frames it took.
fn fill(rig: &mut Rig<Fake>, pair: u16) -> u64 {
    let lost = |rig: &Rig<Fake>| rig.device.0.metrics.tx_fails.total();
    let before = lost(rig);
    let mut sent = 0;
    while lost(rig) == before {
        transmit(rig, pair);
        sent += 1;
        assert!(sent < 100_000, "the tap takes everything");
    }
    for _ in 0..100 {
        transmit(rig, pair);
    }
    assert_eq!(lost(rig), before + 101);
    sent - 1
}

/// Has a frame come in by a pair.
fn receive(rig: &mut Rig<Fake>, mut peer: &File, pair: u16) {
    let queue = 2 * pair + RX;
    peer.write_all(&frame(60, 9)).unwrap();
    let driver = &mut rig.drivers[usize::from(queue)];
    driver.put(IN, &[0; 72]);
    driver.add(&[(IN, 2000, true)]);
    rig.kick(queue);
    let driver = &mut rig.drivers[usize::from(queue)];
    assert!(matches!(driver.used(), Some((_, 72))));
    assert_eq!(driver.get(IN + 12, 60), [9; 60]);
}

/// Reads all that the tap has.
fn drain(mut peer: &File) -> u64 {
    let mut data = [0; 2000];
    let mut count = 0;
    while let Ok(len) = peer.read(&mut data) {
        assert_eq!(len, 1512);
        count += 1;
    }
    count
}

#[test]
fn a_full_tap_loses_frames_and_stalls_nothing() {
    let (mut rig, peers) = rig(1);
    let sent = fill(&mut rig, 0);
    for _ in 0..20 {
        receive(&mut rig, &peers[0], 0);
        transmit(&mut rig, 0);
    }
    // A whole ring of them in one turn, too.
    for _ in 0..16 {
        rig.drivers[1].add(&[(OUT, 1512, false)]);
    }
    rig.kick(TX);
    for _ in 0..16 {
        assert!(rig.drivers[1].used().is_some());
    }
    let metrics = Arc::clone(&rig.device.0.metrics);
    assert_eq!(metrics.tx_packets_count.total(), sent);
    assert_eq!(metrics.tap_write_fails.total(), 101 + 20 + 16);
    // What was taken is there, and once there is room again frames pass.
    assert_eq!(drain(&peers[0]), sent);
    transmit(&mut rig, 0);
    assert_eq!(drain(&peers[0]), 1);
}

#[test]
fn a_full_queue_of_the_tap_is_no_other_pair_s_concern() {
    let (mut rig, peers) = rig(2);
    for (full, other) in [(0, 1), (1, 0)] {
        let sent = fill(&mut rig, full);
        for _ in 0..20 {
            transmit(&mut rig, other);
            receive(&mut rig, &peers[usize::from(other)], other);
            receive(&mut rig, &peers[usize::from(full)], full);
        }
        assert_eq!(drain(&peers[usize::from(other)]), 20);
        assert_eq!(drain(&peers[usize::from(full)]), sent);
    }
    // Both at once.
    fill(&mut rig, 0);
    fill(&mut rig, 1);
    for pair in [0, 1] {
        receive(&mut rig, &peers[usize::from(pair)], pair);
    }
}

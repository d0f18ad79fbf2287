//! Rings and requests that a driver rewrites while the host works on them: what counts is the copy that was taken.

use super::engine_tests::{offer, stalled, wait};
use super::request::{T_IN, T_OUT};
use super::ring::SLOTS;
use super::tests::{BUFFER, STATUS};
use super::*;
use crate::virtio::testing::{DATA, END, NEXT, WRITE};
use std::io::Write as _;

/// Where the rewritten descriptors point.
const ELSEWHERE: u64 = DATA + 0x18_0000;

#[test]
fn what_is_rewritten_meanwhile_changes_nothing() {
    let (mut rig, mut writer) = stalled(1, 16);
    for n in 0..2 {
        let data = [(BUFFER + n * 0x1000, 512, true)];
        offer(&mut rig, 0, n * 64, T_IN, 0, &data);
    }
    rig.kick(0);
    assert_eq!(rig.device.ring.as_ref().unwrap().in_flight(), 2);

    // The headers become writes, beyond the end of the disk; the descriptors lead elsewhere, are longer, and form a
    // chain of another length; both rings name what was never offered, and the used ring has gone ahead.
    let driver = &rig.drivers[0];
    for n in 0..2 {
        let header = [&T_OUT.to_le_bytes()[..], &[0; 4], &u64::MAX.to_le_bytes()].concat();
        driver.put(DATA + n * 64, &header);
    }
    for i in 0..16 {
        let place = ELSEWHERE + u64::from(i) * 0x1000;
        driver.describe(i, place, 0x1000, NEXT | WRITE, (i + 5) % 16);
    }
    driver.put(driver.state.available + 4, &[9; 32]);
    driver.put(driver.state.used, &[0xff; 4 + 16 * 8]);
    let before = driver.get(0, END as usize);

    writer.write_all(&[7; 1024]).unwrap();
    let used = driver.state.used;
    wait(&mut rig, |rig| rig.drivers[0].get(used + 2, 2) == [2, 0]);
    let mut heads = [rig.drivers[0].used(), rig.drivers[0].used()];
    // The kernel ends them in any order.
    heads.sort_unstable();
    assert_eq!(heads, [Some((0, 513)), Some((3, 513))]);

    // Data and statuses, two entries of the used ring and its index, and where to ring: nothing else is touched.
    let mut expected = before;
    let mut put = |at: u64, bytes: &[u8]| {
        let at = at as usize;
        expected[at..at + bytes.len()].copy_from_slice(bytes);
    };
    for n in 0..2 {
        put(BUFFER + n * 0x1000, &[7; 512]);
        put(STATUS + n * 64, &[S_OK]);
    }
    let driver = &rig.drivers[0];
    for at in [used + 2, driver.state.used + 4 + 16 * 8] {
        put(at, &driver.get(at, 2));
    }
    put(used + 4, &driver.get(used + 4, 16));
    let after = driver.get(0, END as usize);
    let different = |(at, (one, other)): (usize, (&u8, &u8))| (one != other).then_some(at);
    let first = expected.iter().zip(&after).enumerate().find_map(different);
    assert_eq!(first, None, "the first byte that differs");

    // It goes on with what is offered properly.
    writer.write_all(&[8; 512]).unwrap();
    offer(&mut rig, 0, 0, T_IN, 0, &[(BUFFER, 512, true)]);
    rig.kick(0);
    wait(&mut rig, |rig| rig.drivers[0].used_pending().is_some());
    assert_eq!(rig.drivers[0].used(), Some((6, 513)));
    assert_eq!(rig.drivers[0].get(BUFFER, 512), [8; 512]);
}

/// A driver that offers the same head over and over gets as many answers, and never more requests in flight than there
/// is room for.
#[test]
fn one_chain_offered_many_times_is_as_many_requests() {
    let (mut rig, mut writer) = stalled(1, 256);
    offer(&mut rig, 0, 0, T_IN, 0, &[(BUFFER, 512, true)]);
    for _ in 1..256 {
        rig.drivers[0].offer(0);
    }
    rig.kick(0);
    let in_flight = rig.device.ring.as_ref().unwrap().in_flight();
    assert_eq!(in_flight, usize::from(SLOTS));
    let feeder = std::thread::spawn(move || {
        writer.write_all(&vec![7; 256 * 512]).unwrap();
        writer
    });
    let mut ended = 0;
    wait(&mut rig, |rig| {
        while let Some(used) = rig.drivers[0].used() {
            assert_eq!(used, (0, 513));
            ended += 1;
        }
        ended == 256
    });
    drop(feeder.join().unwrap());
    assert_eq!(rig.drivers[0].get(BUFFER, 512), [7; 512]);
}

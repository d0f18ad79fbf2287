//! The transport-reset event, and many connections at once.

use super::packet::op;
use super::testing::*;
use crate::virtio::device::VirtioDevice as _;
use crate::virtio::testing::DATA;
use std::io::{Read as _, Write as _};

const EVENTS: u16 = 2;
const PLACE: u64 = DATA + 0x10_0000;

#[test]
fn a_restored_device_tells_the_guest_once() {
    let mut guest = Guest::new();
    // A driver gives buffers for events when it starts; without a reset they stay where they are.
    for i in 0..3 {
        guest.rig.drivers[2].add(&[(PLACE + i * 16, 8, true)]);
    }
    guest.rig.kick(EVENTS);
    assert_eq!(guest.rig.drivers[2].used(), None);
    let states = guest.rig.device.stop();
    guest.rig.drivers[2].put(PLACE, &[0xff; 16]);

    guest.rig.device.announce_reset();
    guest.rig.start(&states, 0);
    guest.rig.kick(EVENTS);
    assert_eq!(guest.rig.drivers[2].used(), Some((0, 4)));
    let event = guest.rig.drivers[2].get(PLACE, 8);
    assert_eq!(event, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    guest.rig.kick(EVENTS);
    assert_eq!(guest.rig.drivers[2].used(), None);
    // The device works on.
    let (mut host, ports) = guest.called(52);
    guest.send(ports, op::RW, b"x");
    host.read_exact(&mut [0; 1]).unwrap();
}

#[test]
fn the_event_waits_for_a_buffer_and_wants_room() {
    let mut guest = Guest::new();
    guest.rig.device.announce_reset();
    guest.rig.kick(EVENTS);
    let _connected = guest.called(52);
    guest.rig.drivers[2].add(&[(PLACE, 4, true)]);
    guest.rig.kick(EVENTS);
    assert_eq!(guest.rig.drivers[2].used(), Some((0, 4)));
    guest.rig.device.announce_reset();
    guest.rig.drivers[2].add(&[(PLACE, 3, true)]);
    let event = crate::virtio::device::Event::Queue(EVENTS);
    assert!(guest.rig.handle(event).is_err());
}

#[test]
fn a_thousand_connections_talk_at_once() {
    let mut guest = Guest::new();
    let mut all: Vec<_> = (0..1000).map(|port| guest.called(port)).collect();
    assert_eq!(guest.counts().0, 1000);
    for (host, (port, _)) in &mut all {
        host.write_all(&port.to_le_bytes()).unwrap();
    }
    let mut heard = vec![false; all.len()];
    for _ in 0..all.len() {
        let (header, data) = guest.receive(op::RW);
        assert_eq!(data, header.dst_port.to_le_bytes());
        heard[header.dst_port as usize] = true;
        guest.send((header.dst_port, header.src_port), op::RW, &data);
    }
    assert!(heard.iter().all(|heard| *heard));
    for (host, (port, _)) in &mut all {
        let mut answer = [0; 4];
        host.read_exact(&mut answer).unwrap();
        assert_eq!(answer, port.to_le_bytes());
    }
}

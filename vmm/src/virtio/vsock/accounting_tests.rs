//! What is owed: credit, data that waits for the host, and word of a connection's end.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use super::connection::{BUFFER, SMALL_BUFFER};
use super::hub::{MAX_CONNECTIONS, MAX_LARGE, MAX_REFUSALS};
use super::packet::{CLOSED, op};
use super::testing::*;
use crate::virtio::device::VirtioDevice as _;

/// Fills the socket of a connection, so that the last of the bytes wait; returns how many there are.
fn stuff(guest: &mut Guest, ports: (u32, u32)) -> usize {
    let mut sent = 0;
    let mut known = 0;
    while sent - known < 8192 {
        guest.send(ports, op::RW, &[5; 4096]);
        sent += 4096;
        guest.send(ports, op::CREDIT_REQUEST, &[]);
        known = loop {
            let (header, _) = guest.receive(op::CREDIT_UPDATE);
            if guest.rig.drivers[0].used_pending().is_none() {
                break header.fwd_cnt as usize;
            }
        };
    }
    sent
}

/// As Linux does when its program has closed and the host does not answer for seconds.
fn close_and_forget(guest: &mut Guest, ports: (u32, u32)) {
    guest.send_with(ports, op::SHUTDOWN, &[], |header| header.flags = CLOSED);
    guest.silent();
    guest.send(ports, op::RST, &[]);
}

#[test]
fn what_waits_for_the_host_is_bounded_over_all_connections() {
    let most = MAX_LARGE * BUFFER as usize + MAX_CONNECTIONS * SMALL_BUFFER as usize;
    assert!(most <= 16 << 20);
    let mut guest = Guest::new();
    let (mut first, ports) = guest.called(1);
    let mut hosts = Vec::new();
    for port in 0..MAX_LARGE as u32 - 1 {
        hosts.push(guest.calls((port, 1)));
    }
    // The next ones are told of less room, and get no more.
    guest.send((5000, 1), op::REQUEST, &[]);
    let (_small, theirs) = UnixStream::pair().unwrap();
    guest.answer(|_| Ok(theirs));
    assert_eq!(guest.receive(op::RESPONSE).0.buf_alloc, SMALL_BUFFER);
    let (_caller, small) = guest.called(2);
    let waiting = (0..4096).take_while(|_| {
        guest.send(small, op::RW, &[0; 4096]);
        guest.counts().0 > MAX_LARGE + 1
    });
    assert!(waiting.count() < 4096, "it holds what it was not told of");
    while let Some((header, _)) = guest.try_receive() {
        assert_eq!(
            (header.dst_port, header.buf_alloc),
            (
                2,
                if header.op == op::RST {
                    0
                } else {
                    SMALL_BUFFER
                }
            )
        );
    }
    // Those that were there go on, and a place that they leave is taken.
    guest.send(ports, op::RW, b"x");
    first.read_exact(&mut [0; 1]).unwrap();
    guest.send((7, 1), op::RST, &[]);
    guest.send((5001, 1), op::REQUEST, &[]);
    let (_large, theirs) = UnixStream::pair().unwrap();
    guest.answer(|_| Ok(theirs));
    assert_eq!(guest.receive(op::RESPONSE).0.buf_alloc, BUFFER);
}

#[test]
fn a_host_that_reads_late_gets_what_the_guest_had_sent() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.called(52);
    let sent = stuff(&mut guest, ports);
    close_and_forget(&mut guest, ports);
    // The guest may use the ports again at once.
    let _other = guest.calls(ports);
    assert_eq!(guest.counts(), (1, 0, 2));
    host.set_nonblocking(true).unwrap();
    let (mut got, mut data) = (0, vec![0; 1 << 16]);
    while got < sent {
        if let Ok(count) = host.read(&mut data) {
            assert_ne!(count, 0, "the end after {got} of {sent} bytes");
            got += count;
        }
        guest.rig.poll();
    }
    assert!(ended(&mut host));
    assert_eq!(guest.counts(), (1, 0, 1));
}

#[test]
fn data_for_a_host_that_is_gone_is_not_kept() {
    let mut guest = Guest::new();
    let (host, ports) = guest.called(52);
    stuff(&mut guest, ports);
    close_and_forget(&mut guest, ports);
    assert_eq!(guest.counts(), (0, 0, 1));
    drop(host);
    guest.rig.poll();
    assert_eq!(guest.counts(), (0, 0, 0));
    // Neither is that of a guest that breaks off.
    let (mut host, ports) = guest.called(53);
    stuff(&mut guest, ports);
    guest.send(ports, op::RST, &[]);
    assert_eq!(guest.counts(), (0, 0, 0));
    while host.read(&mut [0; 4096]).unwrap() > 0 {}
    // Nor does it outlive a reset of the device.
    let (_host, ports) = guest.called(54);
    stuff(&mut guest, ports);
    close_and_forget(&mut guest, ports);
    guest.rig.device.stop();
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn connections_that_the_guest_forgot_count_and_make_room() {
    let mut guest = Guest::new();
    let mut old = Vec::new();
    for port in 0..2 {
        let (host, ports) = guest.called(port);
        stuff(&mut guest, ports);
        close_and_forget(&mut guest, ports);
        old.push(host);
    }
    let hosts: Vec<UnixStream> = (0..MAX_CONNECTIONS as u32 - 1)
        .map(|port| guest.calls((port, 1)))
        .collect();
    assert_eq!(guest.counts(), (MAX_CONNECTIONS - 1, 0, MAX_CONNECTIONS));
    // The oldest made room. Without another, there is none.
    let all = |host: &mut UnixStream| {
        host.set_nonblocking(true).unwrap();
        let mut data = vec![0; 1 << 20];
        loop {
            match host.read(&mut data) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
            }
        }
    };
    assert!(all(&mut old[0]) && !all(&mut old[1]));
    drop(hosts);
}

#[test]
fn a_guest_that_says_it_has_no_room_is_not_asked_again() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.called(52);
    guest.send_with(ports, op::CREDIT_UPDATE, &[], |header| header.buf_alloc = 0);
    host.write_all(b"hello").unwrap();
    guest.receive(op::CREDIT_REQUEST);
    for _ in 0..3 {
        guest.send_with(ports, op::CREDIT_UPDATE, &[], |header| header.buf_alloc = 0);
        guest.silent();
    }
    // Room for a part; then it is asked once more.
    guest.send_with(ports, op::CREDIT_UPDATE, &[], |header| header.buf_alloc = 2);
    assert_eq!(guest.receive(op::RW).1, b"he");
    guest.receive(op::CREDIT_REQUEST);
    guest.silent();
    guest.send(ports, op::CREDIT_UPDATE, &[]);
    assert_eq!(guest.receive(op::RW).1, b"llo");
}

#[test]
fn a_guest_that_takes_no_packets_still_learns_of_every_end() {
    let mut guest = Guest::new();
    let count = MAX_CONNECTIONS as u32;
    let hosts: Vec<UnixStream> = (0..count).map(|port| guest.calls((port, 1))).collect();
    for _ in 0..=MAX_REFUSALS {
        guest.send((9000, 9000), op::RW, &[]);
    }
    // Nonsense for a connection ends it.
    for port in 0..count {
        guest.send((port, 1), op::RESPONSE, &[]);
    }
    assert_eq!(guest.counts(), (0, 0, 0));
    drop(hosts);
    // There are no new ones before it listens.
    guest.send((5000, 1), op::REQUEST, &[]);
    assert_eq!(guest.counts(), (0, 0, 0));
    let mut told = vec![false; MAX_CONNECTIONS];
    while let Some((header, _)) = guest.try_receive() {
        assert_eq!(header.op, op::RST);
        if let Some(told) = told.get_mut(header.dst_port as usize) {
            *told = true;
        }
    }
    assert!(told.iter().all(|&told| told));
    let _host = guest.calls((5000, 1));
}

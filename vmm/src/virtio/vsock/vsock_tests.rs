use super::connection::BUFFER;
use super::hub::{MAX_CONNECTIONS, MAX_HANDSHAKES, MAX_REFUSALS};
use super::packet::{CLOSED, HEADER_LEN, Header, NO_RECEIVE, NO_SEND, op};
use super::testing::*;
use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

#[test]
fn the_host_calls_and_both_talk() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.called(52);
    host.write_all(b"ping").unwrap();
    let (header, data) = guest.receive(op::RW);
    assert_eq!((header.src_port, header.dst_port), (ports.1, 52));
    assert_eq!(data, b"ping");
    guest.send(ports, op::RW, b"pong");
    let mut answer = [0; 4];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong");
}

#[test]
fn bytes_right_behind_the_line_reach_the_guest() {
    let mut guest = Guest::new();
    let mut host = guest.dial();
    host.write_all(b"CONNECT 7\nhello").unwrap();
    let (header, _) = guest.receive(op::REQUEST);
    guest.silent();
    guest.send((7, header.src_port), op::RESPONSE, &[]);
    assert_eq!(guest.receive(op::RW).1, b"hello");
}

#[test]
fn the_guest_calls_and_both_talk() {
    let mut guest = Guest::new();
    let mut host = guest.calls((1000, 5000));
    guest.send((1000, 5000), op::RW, b"hello");
    let mut data = [0; 5];
    host.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"hello");
    host.write_all(b"world").unwrap();
    assert_eq!(guest.receive(op::RW).1, b"world");
}

#[test]
fn what_fits_no_connection_is_refused() {
    let mut guest = Guest::new();
    for op in [0, op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_REQUEST, 9] {
        guest.send((1, 2), op, &[]);
        let (header, _) = guest.receive(op::RST);
        assert_eq!((header.src_port, header.dst_port), (2, 1));
    }
    guest.send((1, 2), op::RST, &[]);
    guest.silent();
    // Not a stream, to somebody else, from somebody else, longer than it is.
    guest.send_with((1, 2), op::REQUEST, &[], |header| header.kind = 2);
    assert_eq!(guest.receive(op::RST).0.kind, 2);
    guest.send_with((1, 2), op::REQUEST, &[], |header| header.dst_cid = 1);
    assert_eq!(guest.receive(op::RST).0.src_cid, 1);
    guest.send_with((1, 2), op::REQUEST, &[], |header| header.src_cid = 4);
    guest.silent();
    guest.send_with((1, 2), op::RW, b"x", |header| header.len = u32::MAX);
    guest.receive(op::RST);
    assert_eq!(guest.office.lock().unwrap().asked.len(), 0);
    guest.rig.drivers[1].add(&[(OUT, 43, false)]);
    guest.rig.kick(TX);
    guest.silent();
}

#[test]
fn a_call_that_nobody_takes_is_refused() {
    let mut guest = Guest::new();
    guest.send((1, 2), op::REQUEST, &[]);
    guest.silent();
    guest.answer(|_| Err("connection refused".into()));
    guest.receive(op::RST);
    // More at a time than the broker takes.
    for port in 0..65 {
        guest.send((port, 2), op::REQUEST, &[]);
    }
    let (header, _) = guest.receive(op::RST);
    assert_eq!(header.dst_port, 64);
    guest.silent();
    // The broker ends: all of them fail, and later ones at once.
    guest.office.lock().unwrap().gone = true;
    guest.bell.write(1).unwrap();
    for _ in 0..64 {
        guest.receive(op::RST);
    }
    assert_eq!(guest.counts(), (0, 0, 0));
    guest.send((1, 2), op::REQUEST, &[]);
    guest.receive(op::RST);
}

#[test]
fn an_answer_that_comes_too_late_is_closed() {
    let mut guest = Guest::new();
    guest.send((1, 2), op::REQUEST, &[]);
    guest.send((1, 2), op::RST, &[]);
    guest.send((1, 2), op::REQUEST, &[]);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.answer(|_| Ok(theirs));
    assert!(ended(&mut ours));
    guest.silent();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    guest.answer(|_| Ok(theirs));
    guest.receive(op::RESPONSE);
}

#[test]
fn a_host_that_ends_is_read_to_its_end() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.called(52);
    host.write_all(&[7; 5000]).unwrap();
    drop(host);
    assert_eq!(guest.receive(op::RW).1.len(), ROOM as usize - HEADER_LEN);
    assert_eq!(
        guest.receive(op::RW).1.len(),
        5000 + HEADER_LEN - ROOM as usize
    );
    assert_eq!(guest.receive(op::SHUTDOWN).0.flags, CLOSED);
    guest.silent();
    // The guest may still be sending; then it answers, and nothing is left.
    guest.send(ports, op::RW, b"late");
    guest.send(ports, op::RST, &[]);
    guest.silent();
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn either_side_may_close_half() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.called(52);
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive(op::RW).1, b"question");
    assert_eq!(guest.receive(op::SHUTDOWN).0.flags, NO_SEND);
    guest.silent();
    guest.send(ports, op::RW, b"answer");
    guest.send_with(ports, op::SHUTDOWN, &[], |header| header.flags = NO_SEND);
    let mut answer = String::new();
    host.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    guest.send_with(ports, op::SHUTDOWN, &[], |header| header.flags = CLOSED);
    guest.receive(op::RST);
    assert_eq!(guest.counts(), (0, 0, 0));

    // The guest first, and the host still sends.
    let (mut host, ports) = guest.called(53);
    guest.send_with(ports, op::SHUTDOWN, &[], |header| header.flags = NO_SEND);
    assert!(ended(&mut host));
    host.write_all(b"still here").unwrap();
    assert_eq!(guest.receive(op::RW).1, b"still here");
    guest.send(ports, op::RW, b"it said it would not");
    guest.receive(op::RST);
}

#[test]
fn peers_may_vanish_at_any_byte() {
    let mut guest = Guest::new();
    let line = b"CONNECT 52\nab";
    for count in 0..=line.len() {
        let mut host = guest.dial();
        host.write_all(&line[..count]).unwrap();
        guest.rig.poll();
        drop(host);
        // The guest may have been asked before the caller vanished, and may answer.
        while let Some((header, _)) = guest.try_receive() {
            assert!(count >= 11);
            match header.op {
                op::REQUEST => guest.send((52, header.src_port), op::RESPONSE, &[]),
                other => assert_eq!(other, op::RST),
            }
        }
        assert_eq!(guest.counts(), (0, 0, 0), "after {count} bytes");
    }
    // The guest refuses, or vanishes itself.
    let mut host = guest.dial();
    host.write_all(b"CONNECT 52\n").unwrap();
    let (header, _) = guest.receive(op::REQUEST);
    guest.send((52, header.src_port), op::RST, &[]);
    assert!(ended(&mut host));
    let (mut host, ports) = guest.called(52);
    guest.send(ports, op::RST, &[]);
    assert!(ended(&mut host));
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn a_host_that_does_not_read_costs_one_buffer() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.called(52);
    let chunk = [5; 4096];
    let (mut sent, mut known) = (0u32, 0u32);
    // An honest guest, until the credit is used up.
    loop {
        if BUFFER - (sent - known) < 4096 {
            guest.send(ports, op::CREDIT_REQUEST, &[]);
            let (header, _) = guest.receive(op::CREDIT_UPDATE);
            if header.fwd_cnt == known {
                break;
            }
            known = header.fwd_cnt;
            continue;
        }
        guest.send(ports, op::RW, &chunk);
        sent += 4096;
        while guest.rig.drivers[0].used_pending().is_some() {
            known = guest.receive(op::CREDIT_UPDATE).0.fwd_cnt;
        }
    }
    assert!((BUFFER..16 << 20).contains(&sent), "{sent}");
    // The host reads: everything arrives, and the guest gets its credit back.
    host.set_nonblocking(true).unwrap();
    let (mut got, mut data) = (0, vec![0; 1 << 16]);
    while got < sent {
        if let Ok(count) = host.read(&mut data) {
            assert!(data[..count].iter().all(|&byte| byte == 5));
            got += count as u32;
        }
        guest.rig.poll();
    }
    assert_eq!(got, sent);
    assert!(guest.receive(op::CREDIT_UPDATE).0.fwd_cnt > known);

    // A guest that sends more than it may loses the connection.
    let (_host, ports) = guest.called(53);
    for _ in 0..4096 {
        guest.send(ports, op::RW, &chunk);
        if guest.counts().0 == 1 {
            break;
        }
    }
    assert_eq!(guest.counts().0, 1, "only the first connection is left");
}

#[test]
fn a_guest_without_room_is_sent_nothing() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.called(52);
    guest.send_with(ports, op::CREDIT_UPDATE, &[], |header| {
        header.buf_alloc = 10
    });
    host.write_all(b"more than ten bytes").unwrap();
    assert_eq!(guest.receive(op::RW).1, b"more than ");
    guest.receive(op::CREDIT_REQUEST);
    guest.silent();
    guest.send_with(ports, op::CREDIT_UPDATE, &[], |header| {
        header.buf_alloc = 13
    });
    assert_eq!(guest.receive(op::RW).1, b"ten bytes");
    // Nonsense: more consumed than was sent.
    host.write_all(b"x").unwrap();
    guest.send_with(ports, op::CREDIT_UPDATE, &[], |header| {
        header.fwd_cnt = header.fwd_cnt.wrapping_add(1000);
    });
    let _ = guest.try_receive();
}

#[test]
fn handshakes_are_bounded_and_the_oldest_makes_room() {
    let mut guest = Guest::new();
    let mut hosts: VecDeque<UnixStream> = VecDeque::new();
    for _ in 0..MAX_HANDSHAKES + 10 {
        hosts.push_back(guest.dial());
        guest.rig.poll();
    }
    assert_eq!(guest.counts(), (0, MAX_HANDSHAKES, MAX_HANDSHAKES));
    for _ in 0..10 {
        assert!(ended(&mut hosts.pop_front().unwrap()));
    }
    hosts[0].write_all(b"CONNECT 1\n").unwrap();
    guest.receive(op::REQUEST);
}

#[test]
fn connections_and_refusals_are_bounded() {
    let mut guest = Guest::new();
    let mut hosts = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        hosts.push(guest.calls((port, 1)));
    }
    guest.send((5000, 1), op::REQUEST, &[]);
    guest.receive(op::RST);
    let mut late = guest.dial();
    late.write_all(b"CONNECT 1\n").unwrap();
    guest.rig.poll();
    assert!(ended(&mut late));
    guest.silent();
    // A connection that only the guest keeps makes room.
    hosts.remove(7);
    assert_eq!(guest.receive(op::SHUTDOWN).0.flags, CLOSED);
    hosts.push({
        guest.send((5000, 1), op::REQUEST, &[]);
        let (header, _) = guest.receive(op::RST);
        assert_eq!(header.dst_port, 7);
        let (ours, theirs) = UnixStream::pair().unwrap();
        guest.answer(|_| Ok(theirs));
        guest.receive(op::RESPONSE);
        ours
    });
    assert_eq!(guest.counts().0, MAX_CONNECTIONS);

    // A guest that takes no packets, and asks for refusals.
    for _ in 0..MAX_REFUSALS + 50 {
        guest.send((9000, 9000), op::RW, &[]);
    }
    for _ in 0..MAX_REFUSALS {
        guest.receive(op::RST);
    }
    guest.silent();
}

#[test]
fn a_reset_ends_everything_and_a_start_begins_anew() {
    let mut guest = Guest::new();
    let (mut host, _) = guest.called(52);
    let mut other = guest.calls((1, 2));
    guest.send((3, 4), op::REQUEST, &[]);
    let waiting = guest.dial();
    guest.rig.poll();
    let states = guest.rig.device.stop();
    assert!(ended(&mut host) && ended(&mut other));
    assert_eq!(guest.counts(), (0, 0, 0));
    drop(waiting);
    // The answer to a request from before finds nobody.
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.answer(|_| Ok(theirs));
    guest.rig.start(&states, 0);
    guest.silent();
    assert!(ended(&mut ours));
    let (mut host, ports) = guest.called(52);
    guest.send(ports, op::RW, b"x");
    host.read_exact(&mut [0; 1]).unwrap();
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::new();
    let (mut busy, _) = guest.called(1);
    let (mut other, _) = guest.called(2);
    busy.write_all(&[1; 40_000]).unwrap();
    other.write_all(b"x").unwrap();
    guest.rig.poll();
    let first = guest.receive(op::RW).0.dst_port;
    assert_ne!(guest.receive(op::RW).0.dst_port, first);
}

#[test]
fn a_receive_buffer_without_room_breaks_the_queue_only_when_it_is_needed() {
    let mut guest = Guest::new();
    guest.rig.drivers[0].add(&[(IN, HEADER_LEN as u32, true)]);
    guest.rig.kick(0);
    guest.rig.drivers[1].add(&[(OUT, 64, false)]);
    guest.rig.drivers[1].put(
        OUT,
        &Header {
            src_cid: CID,
            ..Header::default()
        }
        .encode(),
    );
    assert!(guest.rig.handle(Event::Queue(TX)).is_err());
}

#[test]
fn reserved_addresses_are_refused() {
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 32, u64::MAX] {
        let (listener, _directory) = {
            let directory = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(directory.path().join("v")).unwrap();
            (listener, directory)
        };
        assert!(matches!(
            Vsock::with(cid, Arc::new(listener), None),
            Err(Error::Cid(_))
        ));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever packets come, the device goes on, and a new connection works.
    #[test]
    fn any_packets_are_harmless(
        packets in prop::collection::vec(
            (0..4u32, 0..3u32, 0..9u16, any::<u32>(), any::<u32>(), any::<u32>(), 0..64usize),
            1..100,
        ),
        answers in prop::collection::vec(0..3u8, 100),
    ) {
        let mut guest = Guest::new();
        let (_host, ports) = guest.called(1);
        let mut streams = Vec::new();
        for ((from, to, op, flags, buf_alloc, fwd_cnt, len), answer) in packets.into_iter().zip(answers) {
            let to = if to == 0 { ports.1 } else { to };
            guest.send_with((from, to), op, &vec![0; len], |header| {
                header.flags = flags & 7;
                header.buf_alloc = buf_alloc;
                header.fwd_cnt = fwd_cnt;
            });
            let asked = !guest.office.lock().unwrap().asked.is_empty();
            match answer {
                0 if asked => {
                    let (ours, theirs) = UnixStream::pair().unwrap();
                    (&ours).write_all(b"hello").unwrap();
                    guest.answer(|_| Ok(theirs));
                    streams.push(ours);
                }
                1 if asked => guest.answer(|_| Err("no".into())),
                2 => drop(streams.pop()),
                _ => {}
            }
            while guest.rig.drivers[0].used_pending().is_some() {
                guest.try_receive();
            }
        }
        while guest.try_receive().is_some() {}
        let (mut host, ports) = guest.called(77);
        guest.send(ports, op::RW, b"x");
        host.read_exact(&mut [0; 1]).unwrap();
    }
}

#[test]
fn a_caller_that_does_not_stay_is_not_announced() {
    let mut guest = Guest::new();
    for _ in 0..MAX_CONNECTIONS + 10 {
        let mut host = guest.dial();
        host.write_all(b"CONNECT 52\n").unwrap();
        drop(host);
        // Line and end are seen at once.
        guest.rig.poll();
    }
    assert_eq!(guest.counts(), (0, 0, 0));
    guest.silent();
}

#[test]
fn a_guest_that_reads_no_more_learns_that_the_host_is_gone() {
    for host_first in [false, true] {
        let mut guest = Guest::new();
        let (host, ports) = guest.called(52);
        // Without credit, the end of what the host wrote is not read.
        guest.send_with(ports, op::CREDIT_UPDATE, &[], |header| header.buf_alloc = 0);
        let close = |header: &mut Header| {
            header.buf_alloc = 0;
            header.flags = NO_RECEIVE;
        };
        if host_first {
            drop(host);
            guest.receive(op::CREDIT_REQUEST);
            guest.silent();
            guest.send_with(ports, op::SHUTDOWN, &[], close);
        } else {
            guest.send_with(ports, op::SHUTDOWN, &[], close);
            guest.silent();
            drop(host);
        }
        assert_eq!(guest.receive(op::SHUTDOWN).0.flags, CLOSED);
        guest.send(ports, op::RST, &[]);
        assert_eq!(guest.counts(), (0, 0, 0));
    }
}

#[test]
fn callers_wait_while_descriptors_are_short() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use std::os::fd::AsRawFd as _;
    if !crate::testing::alone("virtio::vsock::tests::callers_wait_while_descriptors_are_short") {
        return;
    }
    let mut guest = Guest::new();
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let lowest_free = std::fs::File::open("/dev/null").unwrap().as_raw_fd() as u64;
    // Room for the caller's end alone.
    setrlimit(Resource::RLIMIT_NOFILE, lowest_free + 1, most).unwrap();
    let mut host = guest.dial();
    host.write_all(b"CONNECT 52\n").unwrap();
    guest.silent();
    assert_eq!(guest.counts(), (0, 0, 0));
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    // Anything that happens will do.
    guest.rig.kick(0);
    guest.receive(op::REQUEST);
}

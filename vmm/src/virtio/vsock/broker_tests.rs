//! With a real broker: who connects, and to where.

use super::*;
use crate::virtio::testing::{DATA, Rig};
use crate::virtio::vsock::packet::{HEADER_LEN, Header, STREAM, op};
use casemate_broker::{BrokerPolicy, ConnectTarget, Server};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::io::Read as _;
use std::time::Duration;

/// Sends a packet from port 9.
fn send(rig: &mut Rig<Vsock>, host_port: u32, op: u16, data: &[u8]) {
    let header = Header {
        src_cid: 3,
        dst_cid: 2,
        src_port: 9,
        dst_port: host_port,
        len: data.len() as u32,
        kind: STREAM,
        op,
        buf_alloc: 1 << 16,
        ..Header::default()
    };
    rig.drivers[1].put(DATA, &[&header.encode()[..], data].concat());
    rig.drivers[1].add(&[(DATA, (HEADER_LEN + data.len()) as u32, false)]);
    rig.kick(TX);
}

/// Sends a packet without data and waits for the one that answers it.
fn ask(rig: &mut Rig<Vsock>, host_port: u32, op: u16) -> Option<Header> {
    send(rig, host_port, op, &[]);
    rig.drivers[0].add(&[(DATA + 0x1000, 4096, true)]);
    rig.kick(0);
    for _ in 0..100 {
        rig.poll();
        if rig.drivers[0].used().is_some() {
            let bytes = rig.drivers[0].get(DATA + 0x1000, HEADER_LEN);
            return Some(Header::decode(&bytes.try_into().unwrap()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    None
}

#[test]
fn the_guest_reaches_the_socket_of_its_port_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let uds_path = directory.path().join("v.sock");
    let name = uds_path.to_str().unwrap().to_owned();
    let target = UnixListener::bind(format!("{name}_5000")).unwrap();
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    let policy = BrokerPolicy {
        connections: vec![ConnectTarget {
            device: name.clone(),
            directory: std::fs::File::open(directory.path()).unwrap().into(),
            base_name: "v.sock".into(),
        }],
        ..BrokerPolicy::default()
    };
    let broker = std::thread::spawn(move || Server::new(theirs, policy).serve(None));

    let device = Vsock::new(VsockOptions {
        guest_cid: 3,
        uds_path: name.clone(),
        listener: Arc::new(UnixListener::bind(&uds_path).unwrap()),
        broker: Some(Arc::new(Mutex::new(Client::new(ours)))),
    })
    .unwrap();
    let mut rig = Rig::new(device);
    let answer = ask(&mut rig, 5001, op::REQUEST).expect("an answer");
    assert_eq!((answer.op, answer.src_port), (op::RST, 5001));
    let answer = ask(&mut rig, 5000, op::REQUEST).expect("an answer");
    assert_eq!((answer.op, answer.src_port), (op::RESPONSE, 5000));
    let (mut host, _) = target.accept().unwrap();
    let answer = ask(&mut rig, 5000, op::CREDIT_REQUEST).expect("an answer");
    assert_eq!(answer.op, op::CREDIT_UPDATE);
    send(&mut rig, 5000, op::RW, b"hello");
    let mut data = [0; 5];
    host.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"hello");
    drop(rig);
    broker.join().unwrap().unwrap();
}

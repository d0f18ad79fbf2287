//! virtio-net on a tap in a network namespace of the test's own.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use super::probe;
use casemate_tests::Netns;
use nix::ifaddrs::getifaddrs;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

const MAC: &str = "06:00:ac:10:00:02";
const MAC_BYTES: [u8; 6] = [6, 0, 0xac, 0x10, 0, 2];
const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Runs `body` on a thread inside `netns`, with a packet socket on the tap.
fn inside<T: Send>(netns: &Netns, body: impl FnOnce(&OwnedFd) -> T + Send) -> T {
    let namespace = File::open(netns.path()).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            let socket = packet_socket("tap0");
            body(&socket)
        });
        thread.join().unwrap()
    })
}

fn packet_socket(interface: &str) -> OwnedFd {
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )
    .unwrap();
    let address: LinkAddr = getifaddrs()
        .unwrap()
        .filter(|found| found.interface_name == interface)
        .find_map(|found| found.address?.as_link_addr().copied())
        .unwrap();
    bind(socket.as_raw_fd(), &address).unwrap();
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(20)).unwrap();
    socket
}

fn frame(to: [u8; 6], from: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let mut frame = [&to[..], &from, &ETHERTYPE, payload].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// The next frame of our Ethertype that came from the guest.
fn receive(socket: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    loop {
        let len = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap();
        if bytes[12..14] == ETHERTYPE && bytes[6..12] == MAC_BYTES {
            return bytes[..len].to_vec();
        }
    }
}

#[test]
fn frames_come_back() {
    for jailed in [true, false] {
        let netns = Netns::with_tap(None);
        let mut vm = probe("probe.task=net probe.count=3").net("tap0", MAC);
        if jailed {
            vm = vm.jailer_arg("--netns").jailer_arg(&netns.path());
        } else {
            vm = vm.unjailed();
        }
        let done = inside(&netns, |socket| {
            // The unjailed VMM opens its tap in the namespace that it is started in: this thread's.
            let vm = vm.start().unwrap();
            let announced = receive(socket);
            assert_eq!(announced[..6], [0xff; 6]);
            assert_eq!(&announced[14..19], b"ready");
            for payload in [&b"one"[..], &[0xa5; 1000], &[0x5a; 1486]] {
                let sent = frame(MAC_BYTES, SENDER, payload);
                send(socket.as_raw_fd(), &sent, MsgFlags::empty()).unwrap();
                assert_eq!(receive(socket), frame(SENDER, MAC_BYTES, payload));
            }
            vm.wait().unwrap()
        });
        done.assert_line("probe: mac [06, 00, ac, 10, 00, 02]");
        done.assert_line("probe: net ok");
    }
}

//! virtio-net on a tap in a network namespace of the test's own.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use super::probe;
use casemate_tests::{Finished, Netns, Vm, wait_until_running};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

pub const MAC: &str = "06:00:ac:10:00:02";
pub const MAC_BYTES: [u8; 6] = [6, 0, 0xac, 0x10, 0, 2];
pub const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Runs `body` on a thread inside `netns`, with a packet socket on the tap.
pub fn inside<T: Send>(netns: &Netns, body: impl FnOnce(&OwnedFd) -> T + Send) -> T {
    let namespace = File::open(netns.path()).unwrap();
    let socket = netns.listen();
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(20)).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            body(&socket)
        });
        thread.join().unwrap()
    })
}

pub fn frame(to: [u8; 6], from: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let mut frame = [&to[..], &from, &ETHERTYPE, payload].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// The next frame of our Ethertype that came from the guest.
pub fn receive(socket: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    loop {
        let len = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap();
        if bytes[12..14] == ETHERTYPE && bytes[6..12] == MAC_BYTES {
            return bytes[..len].to_vec();
        }
    }
}

/// The guest has said that it is ready, and frames reach it.
pub(super) fn wait_for_guest(socket: &OwnedFd) {
    let announced = receive(socket);
    assert_eq!(announced[..6], [0xff; 6]);
    assert_eq!(&announced[14..19], b"ready");
    wait_until_running("tap0");
}

fn echoes(netns: &Netns, vm: Vm, jailed: bool) -> Finished {
    let vm = if jailed {
        vm.jailer_arg("--netns").jailer_arg(&netns.path())
    } else {
        vm.unjailed()
    };
    inside(netns, |socket| {
        // The unjailed VMM opens its tap in the namespace that it is started in: this thread's.
        let vm = vm.start().unwrap();
        wait_for_guest(socket);
        for payload in [&b"one"[..], &[0xa5; 1000], &[0x5a; 1486]] {
            let sent = frame(MAC_BYTES, SENDER, payload);
            send(socket.as_raw_fd(), &sent, MsgFlags::empty()).unwrap();
            assert_eq!(receive(socket), frame(SENDER, MAC_BYTES, payload));
        }
        vm.wait().unwrap()
    })
}

#[test]
fn frames_come_back() {
    for jailed in [true, false] {
        let netns = Netns::with_tap(None);
        let vm = probe("probe.task=net probe.count=3").net("tap0", MAC);
        let done = echoes(&netns, vm, jailed);
        done.assert_line("probe: mac [06, 00, ac, 10, 00, 02]");
        done.assert_line("probe: net ok");
    }
}

/// A driver that knows one pair of queues gets every frame by it; one that asks for two gets them by either.
#[test]
fn a_tap_with_several_queues_serves_every_driver() {
    for jailed in [true, false] {
        for pairs in [1, 2] {
            let netns = Netns::with_queues(None);
            let task = format!("probe.task=net probe.count=3 probe.pairs={pairs}");
            let vm = probe(&task).net_with_queues("tap0", 2, MAC);
            let done = echoes(&netns, vm, jailed);
            if pairs == 2 {
                done.assert_line("probe: two pairs: 0");
            }
            done.assert_line("probe: net ok");
        }
    }
}

#[test]
fn more_queues_than_the_tap_has_are_refused() {
    let netns = Netns::with_tap(None);
    probe("probe.task=net")
        .net_with_queues("tap0", 2, MAC)
        .jailer_arg("--netns")
        .jailer_arg(&netns.path())
        .assert_refused(125, &["tap0", "multi_queue"]);
}

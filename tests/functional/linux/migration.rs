//! A Linux guest moves to another VMM with a TCP connection open.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use casemate_tests::{ApiClient, Machine, Netns, Relay, Running, Vm, exit};
use nix::sched::{CloneFlags, setns};
use serde_json::json;

use crate::guest::{Guest, linux};

const DRIVERS: [&str; 4] = ["virtio_mmio", "virtio_pci", "virtio_net", "virtio_rng"];
const HOST: &str = "10.99.0.1";

/// Says line after line to the host, and repeats on its console what it hears from there.
const SCRIPT: &str = "
ip link set lo up; ip link set eth0 up; ip address add 10.99.0.2/24 dev eth0
n=0
while :; do n=$((n + 1)); echo \"line $n\"; usleep 50000; done | nc 10.99.0.1 8000 |
    while read words; do echo \"heard $words\" > /dev/console; done
";

/// What the host's end of the connection has heard: the numbers of the lines, in order.
fn host(netns: &Netns) -> Receiver<u64> {
    let namespace = File::open(netns.path()).unwrap();
    let (heard, numbers) = channel();
    let (bound, is_bound) = channel();
    std::thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        let listener = TcpListener::bind((HOST, 8000)).unwrap();
        bound.send(()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        for (line, number) in lines.map_while(Result::ok).zip(1_u64..) {
            assert_eq!(line, format!("line {number}"));
            if writeln!(stream, "host {number}").is_err() || heard.send(number).is_err() {
                return;
            }
        }
    });
    is_bound.recv().unwrap();
    numbers
}

/// How long a line may take: from a lab beside another one, on a busy host.
const PATIENCE: Duration = Duration::from_secs(180);

/// Waits for so many more lines.
fn hear(numbers: &Receiver<u64>, more: usize) -> u64 {
    let next = |_| numbers.recv_timeout(PATIENCE).unwrap();
    (0..more).map(next).fold(0, u64::max)
}

fn card(vm: Vm, netns: &Netns, tap: &str) -> Vm {
    vm.net(tap, "06:00:00:00:00:07")
        .jailer_arg("--netns")
        .jailer_arg(&netns.path())
}

#[test]
fn a_tcp_connection_lives_through_a_move() {
    let netns = Netns::with_tap(None);
    let ip = |args: &[&str]| {
        let done = netns.command("ip").args(args).output().unwrap();
        assert!(done.status.success(), "{args:?}: {done:?}");
    };
    ip(&["tuntap", "add", "tap1", "mode", "tap", "vnet_hdr"]);
    for tap in ["tap0", "tap1"] {
        // The neighbour that the guest knows, as it would on a bridge: it would ask for another one only minutes later.
        ip(&["link", "set", tap, "address", "02:00:00:00:00:01"]);
        ip(&["link", "set", tap, "up"]);
    }
    ip(&["link", "set", "lo", "up"]);
    ip(&["address", "add", HOST, "dev", "lo"]);
    ip(&["route", "add", "10.99.0.2", "dev", "tap0"]);
    let numbers = host(&netns);

    let vm = card(linux("", &DRIVERS, SCRIPT, &[]), &netns, "tap0").entropy();
    let vm = vm.set(
        "/machine-config",
        json!({ "vcpu_count": 2, "mem_size_mib": 128 }),
    );
    let vm = vm.served();
    let running = Running::start(vm.command().unwrap(), None).unwrap();
    let source = Guest::new(running, vm);
    hear(&numbers, 30);

    let vm = card(linux("", &DRIVERS, "", &[]), &netns, "tap1").entropy();
    let api = vm.api_path();
    let mut target = Machine::new(vm);
    target.get("/migration");
    let cards = json!([{ "iface_id": "eth0", "host_dev_name": "tap1" }]);
    let receive = json!({ "network_overrides": cards });
    let to = ApiClient::connect(&api).unwrap();
    let (to, _) = to.upgrade("/migration/receive", &receive).unwrap();
    let from = ApiClient::connect(&source.files.api_path()).unwrap();
    let from = from.upgrade("/migration/send", &json!({ "downtime_ms": 2000 }));
    let _relay = Relay::join(from.unwrap(), to, [None; 2]).unwrap();
    let Guest { vm: source, .. } = source;
    let gone = source.wait().unwrap();
    assert_eq!(gone.code, exit::MOVED, "{gone:#?}");
    // The network follows.
    ip(&["route", "replace", "10.99.0.2", "dev", "tap1"]);
    // What was said before is not what is waited for.
    while numbers.try_recv().is_ok() {}
    let last = hear(&numbers, 60);
    target
        .vm
        .wait_for_line(&format!("heard host {last}"))
        .unwrap();
    let all = gone.stdout + &target.vm.said();
    let heard = all
        .lines()
        .filter_map(|line| line.strip_prefix("heard host "));
    let heard: Vec<u64> = heard
        .filter_map(|number| number.trim().parse().ok())
        .collect();
    // A line of the console may be cut in two: then it is no number, or another one.
    let expected: Vec<u64> = (1..=last).collect();
    assert!(heard.len() + 1 >= expected.len(), "{all}");
    assert!(!all.contains("soft lockup"), "{all}");
    target.kill();
}

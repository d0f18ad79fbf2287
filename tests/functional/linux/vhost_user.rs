//! A network card of a back-end under the kernel's own driver. Disks and directories of others are in `every_device.rs`.

use casemate_tests::{NetBackEnd, Running, exit, neighbour};
use serde_json::json;

use crate::guest::linux;

const DRIVERS: [&str; 3] = ["virtio_net", "virtio_mmio", "virtio_pci"];
/// Each of these is answered thrice; the largest takes several frames. Then nobody is there any more.
const SCRIPT: &str = "
say() { echo \"$*\" > /dev/ttyS0; }
cd /sys/class/net/eth0; say \"card $(cat address) $(cat mtu) $(ls -d queues/*-0 | wc -l)\"; cd /
ip link set eth0 up; ip address add 10.99.0.2/24 dev eth0
for size in 0 56 1400 4000; do
    ping -c 3 -W 10 -s $size 10.99.0.1 > /tmp/ping && say \"size $size ok\" || say \"size $size FAIL $(cat /tmp/ping)\"
done
say \"carrier $(cat /sys/class/net/eth0/carrier)\"
say alone
n=0; while ping -c 1 -W 2 10.99.0.1 > /dev/null && [ $n -lt 20 ]; do n=$((n + 1)); sleep 0.2; done
[ $n -lt 20 ] && say \"no answer\"
ip link set lo up; ping -c 1 -W 10 127.0.0.1 > /dev/null && say \"alive\"
poweroff -f
";

#[test]
fn a_back_end_answers_pings_until_it_goes_on_mmio() {
    pinged(false);
}

#[test]
fn a_back_end_answers_pings_until_it_goes_on_pci() {
    pinged(true);
}

fn pinged(pci: bool) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("net.sock");
    let host = neighbour([2, 0, 0, 0, 0, 1], [10, 99, 0, 1]);
    let back_end = NetBackEnd::start(&socket, host).unwrap();
    let card = json!({ "iface_id": "eth0", "guest_mac": "06:00:ac:10:00:02", "mtu": 1450 });
    let mut vm = linux("", &DRIVERS, SCRIPT, &[]).back_end("network-interfaces", card, &socket);
    if pci {
        vm = vm.pci();
    }
    let machine = Running::start(vm.command().unwrap(), None).unwrap();
    machine.wait_for_line("alone").unwrap();
    back_end.hang_up().unwrap();
    let sent = back_end.wait().unwrap();
    let done = machine.wait().unwrap();
    assert_eq!(done.code, exit::GUEST_POWERED_OFF, "{done:#?}");
    for line in [
        "card 06:00:ac:10:00:02 1450 2",
        "size 0 ok",
        "size 56 ok",
        "size 1400 ok",
        "size 4000 ok",
        "carrier 1",
        "no answer",
        "alive",
    ] {
        done.assert_line(line);
    }
    let said = format!("{}{}", done.stdout, done.stderr);
    assert_eq!(said.matches("eth0: it has gone away").count(), 1, "{said}");
    // Headers of Ethernet, IP and ICMP; and as much of a packet as fits into one frame.
    for length in [14 + 20 + 8 + 1400, 14 + 20 + 8 * ((1450 - 20) / 8)] {
        let found = sent.iter().filter(|frame| frame.len() == length).count();
        assert!(found >= 3, "{found} frames of {length} bytes");
    }
}

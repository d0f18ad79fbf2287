//! Network cards and directories of back-ends under the kernel's own drivers. They are with all other devices, and disks, in
//! `every_device.rs`.

use std::os::unix::fs::{MetadataExt, symlink};

use casemate_tests::{NetBackEnd, Running, Share, exit, neighbour, virtiofsd};
use serde_json::json;

use crate::guest::linux;

const NET_DRIVERS: [&str; 3] = ["virtio_net", "virtio_mmio", "virtio_pci"];
/// Each of these is answered thrice; the largest takes several frames. Then nobody is there any more.
const PINGS: &str = "
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
    let mut vm = linux("", &NET_DRIVERS, PINGS, &[]).back_end("network-interfaces", card, &socket);
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

/// Writes in the directory; then tries ways out of it, to read and to write.
const ESCAPES: &str = "
say() { echo \"$*\" > /dev/ttyS0; }
mount -t virtiofs host /mnt && cd /mnt || say not mounted
mkdir made && seq 1 50000 > made/new && echo more >> made/new && chmod 640 made/new && mv made/new made/numbers && say wrote
ln -s ../outside mine; ln -s .. made/up
sync; cd /; umount /mnt; mount -t virtiofs host /mnt
tail -n 1 /mnt/made/numbers | grep -q more && say \"read it\"
for path in ../outside up/outside absolute mine made/up/../../outside; do
    grep -q secret /mnt/$path 2> /dev/null && say \"leaked by $path\"
    echo changed 2> /dev/null > /mnt/$path
done
say \"tried all\"
umount /mnt; poweroff -f
";

#[test]
fn a_shared_directory_is_written_and_not_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (shared, outside) = (path("shared"), path("outside"));
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(&outside, "secret").unwrap();
    symlink("..", shared.join("up")).unwrap();
    symlink(&outside, shared.join("absolute")).unwrap();
    let _back_end = virtiofsd(&shared, Share::ToWrite, &path("socket")).unwrap();
    // Who serves it may write beside it, as far as the host's permissions go.
    let owner = std::fs::metadata(&shared).unwrap().uid();
    std::os::unix::fs::chown(&outside, Some(owner), None).unwrap();
    std::os::unix::fs::chown(dir.path(), Some(owner), None).unwrap();

    let fs = json!({ "tag": "host" });
    let drivers = ["virtiofs", "virtio_mmio"];
    let vm = linux("", &drivers, ESCAPES, &[]).back_end("fs", fs, &path("socket"));
    let done = vm.run().unwrap();
    for line in ["wrote", "read it", "tried all"] {
        done.assert_line(line);
    }
    assert!(!done.stdout.contains("leaked"), "{done:#?}");
    assert_eq!(std::fs::read(&outside).unwrap(), b"secret");
    let numbers: String = (1..=50_000).map(|number| format!("{number}\n")).collect();
    let written = shared.join("made/numbers");
    assert!(std::fs::read_to_string(&written).unwrap() == numbers + "more\n");
    let told = std::fs::metadata(&written).unwrap();
    assert_eq!((told.mode() & 0o7777, told.uid()), (0o640, owner));
}

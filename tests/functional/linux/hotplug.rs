//! Devices that come to a running Linux guest and go again: an unmodified kernel is told by ACPI and does the rest;
//! nobody rescans a bus.

use std::io::Read as _;
use std::path::Path;

use casemate_tests::{Netns, Running, Vm, ext4_image, is_free};
use serde_json::{Value, json};

use crate::guest::{Guest, linux};
use crate::sockets::{call, callee, connect};

const DRIVERS: [&str; 6] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtio_pmem",
    "nd_pmem",
];

/// Says what there is, whenever it changes, and uses what came. Each change has a number, so that no line comes twice.
const WATCH: &str = "
ping_host() {
    ip link set eth0 up; ip address add 10.99.0.2/24 dev eth0
    ping -c 3 -W 10 10.99.0.1 > /dev/null && echo \"$n pong $(cat /sys/class/net/eth0/address)\"
}
use_memory() {
    mount -t ext4 -o dax=always /dev/pmem0 /mnt && grep -q 'pmem0.*dax' /proc/mounts &&
        echo \"$n found $(cat /mnt/hello)\" && echo \"written by DAX\" > /mnt/new && umount /mnt && echo $n kept
}
use_sockets() {
    casemate-guest-tool serve 52$n 20 && casemate-guest-tool call 1024 20 && echo $n called
    casemate-guest-tool serve 53$n 1
    echo $n the last one ended
}
echo ready
had= n=0
while :; do
    has=
    for disk in /sys/block/vd*; do
        [ -e $disk ] && has=\"$has ${disk##*/}:$(cat $disk/size):$(head -c 5 /dev/${disk##*/})\"
    done
    for card in /sys/class/net/eth*; do [ -e $card ] && has=\"$has ${card##*/}:$(cat $card/address)\"; done
    for memory in /sys/block/pmem*; do [ -e $memory ] && has=\"$has ${memory##*/}:$(cat $memory/size)\"; done
    grep -q 0x0013 /sys/bus/virtio/devices/*/device && has=\"$has sockets\"
    if [ \"$has\" != \"$had\" ]; then
        n=$((n + 1))
        echo \"$n has$has.\"
        case $has in
        *eth0*) ping_host ;;
        *pmem0*) use_memory ;;
        *sockets*) use_sockets ;;
        esac
    fi
    had=$has
    usleep 100000
done 2>&1
";

/// A machine on a PCI bus, without a device, whose guest says what comes and goes.
fn guest(vm: impl FnOnce(Vm) -> Vm) -> Guest {
    let tool = Path::new(env!("CARGO_BIN_EXE_casemate-guest-tool"));
    let script = format!("exec > /dev/console 2>&1\n{WATCH}");
    let vm = vm(linux("", &DRIVERS, &script, &[tool]))
        .set("/machine-config/mem_size_mib", json!(192))
        .pci()
        .served();
    let running = Running::start(vm.command().unwrap(), None).unwrap();
    let guest = Guest::new(running, vm);
    guest.says("ready");
    guest
}

/// Removes a device, waits until the guest has let it go and says that it has but `left`.
fn remove(guest: &mut Guest, path: &str, section: &str, left: &str) {
    let before = guest.get("/vm/config")[section].clone();
    guest.ask("DELETE", path, &Value::Null).assert_done();
    guest.says(left);
    guest.wait_until("/vm/config", |config| config[section] != before);
}

#[test]
fn a_disk_appears_and_vanishes() {
    let dir = tempfile::tempdir().unwrap();
    let disk = |name: &str, sectors: usize| {
        let path = dir.path().join(name);
        let mut bytes = vec![0; sectors * 512];
        bytes[..5].copy_from_slice(format!("disk{name}").as_bytes());
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let (first, second) = (disk("1", 2048), disk("2", 4096));
    let mut guest = guest(|vm| vm.may_open(&first).may_open(&second));
    let put = |guest: &mut Guest, id: &str, path: &Path| {
        let body = json!({"drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": true});
        let path = format!("/drives/{id}");
        guest.ask("PUT", &path, &body).assert_done();
    };
    put(&mut guest, "a", &first);
    guest.says("1 has vda:2048:disk1.");
    put(&mut guest, "b", &second);
    guest.says("2 has vda:2048:disk1 vdb:4096:disk2.");
    remove(&mut guest, "/drives/a", "drives", "3 has vdb:4096:disk2.");
    remove(&mut guest, "/drives/b", "drives", "4 has.");
    assert_eq!(guest.get("/vm/config")["drives"], json!([]));
    // The same name and the same slot again.
    put(&mut guest, "a", &second);
    guest.says("5 has vda:4096:disk2.");
    guest.kill();
}

#[test]
fn a_network_card_appears_carries_and_vanishes() {
    let netns = Netns::with_tap(Some("10.99.0.1/24"));
    let words = ["--netns", &netns.path(), "--grant-tap", "tap0"];
    let mut guest = guest(|vm| words.iter().fold(vm, |vm, word| vm.jailer_arg(word)));
    for (came, mac) in [(1, "06:00:ac:10:00:02"), (3, "06:00:ac:10:00:03")] {
        let body = json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": mac});
        let path = "/network-interfaces/eth0";
        guest.ask("PUT", path, &body).assert_done();
        guest.says(&format!("{came} has eth0:{mac}."));
        guest.says(&format!("{came} pong {mac}"));
        remove(
            &mut guest,
            path,
            "network-interfaces",
            &format!("{} has.", came + 1),
        );
    }
    guest.kill();
}

/// A file system on it, read and written without copies, and in the file once the guest has let go of it.
#[test]
fn persistent_memory_appears_carries_a_file_system_and_vanishes() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("memory");
    ext4_image(&file, "16M", "what the host wrote").unwrap();
    let mut guest = guest(|vm| vm.may_open(&file));
    for came in [1, 3] {
        let body = json!({"id": "memory", "path_on_host": file});
        guest.ask("PUT", "/pmem/memory", &body).assert_done();
        guest.says(&format!("{came} has pmem0:32768."));
        guest.says(&format!("{came} found what the host wrote"));
        guest.says(&format!("{came} kept"));
        assert!(
            guest.vm.has_mapped(&file).unwrap() && !is_free(&file).unwrap(),
            "{came}"
        );
        remove(
            &mut guest,
            "/pmem/memory",
            "pmem",
            &format!("{} has.", came + 1),
        );
        assert!(
            !guest.vm.has_mapped(&file).unwrap() && is_free(&file).unwrap(),
            "{came}"
        );
    }
    guest.kill();
    let bytes = std::fs::read(&file).unwrap();
    let text = b"written by DAX";
    assert!(bytes.windows(text.len()).any(|window| window == text));
}

/// Connections in both directions; one that is open when the device goes ends on both sides.
#[test]
fn the_socket_device_appears_carries_and_vanishes() {
    let mut guest = guest(|vm| {
        let path = vm.vsock_path();
        vm.jailer_arg("--grant-listen")
            .jailer_arg(path.to_str().unwrap())
    });
    let path = guest.files.vsock_path();
    for (came, cid) in [(1, 3), (3, 4)] {
        let calls = callee(&path);
        let body = json!({"guest_cid": cid, "uds_path": path});
        guest.ask("PUT", "/vsock", &body).assert_done();
        guest.says(&format!("{came} has sockets."));
        guest.says(&format!("serving 52{came}"));
        call(&path, 520 + came);
        guest.says(&format!("{came} called"));
        calls.join().unwrap();
        guest.says(&format!("serving 53{came}"));
        let mut open = connect(&path, 530 + came);
        remove(&mut guest, "/vsock", "vsock", &format!("{} has.", came + 1));
        guest.says(&format!("{came} the last one ended"));
        assert_eq!(open.read(&mut [0]).unwrap(), 0);
    }
    guest.kill();
}

//! Devices that come to a running Linux guest and go again: an unmodified kernel is told by ACPI and does the rest;
//! nobody rescans a bus.

use std::path::Path;

use casemate_tests::{Machine, Netns, Vm, kernel_file};
use serde_json::{Value, json};

use crate::vmm::busybox_initrd;

/// The drivers, each behind those that it needs.
const MODULES: [&str; 9] = [
    "virtio/virtio",
    "virtio/virtio_ring",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
    "../net/core/failover",
    "net/net_failover",
    "net/virtio_net",
];

/// Says what there is, whenever it changes.
const WATCH: &str = "had=
while :; do
    has=
    for disk in /sys/block/vd*; do
        [ -e $disk ] && has=\"$has ${disk##*/}:$(cat $disk/size):$(head -c 5 /dev/${disk##*/})\"
    done
    for card in /sys/class/net/eth*; do
        [ -e $card ] && has=\"$has ${card##*/}:$(cat $card/address)\"
    done
    [ \"$has\" = \"$had\" ] || echo \"has$has.\"
    if [ \"$has\" != \"$had\" ] && [ -e /sys/class/net/eth0 ]; then
        ip link set eth0 up; ip address add 10.99.0.2/24 dev eth0
        ping -c 3 -W 10 10.99.0.1 > /dev/null && echo \"pong $(cat /sys/class/net/eth0/address)\"
    fi
    had=$has
    usleep 100000
done
";

/// A machine on a PCI bus whose guest says what comes and goes.
fn guest(vm: impl FnOnce(Vm) -> Vm) -> Machine {
    let args = "console=ttyS0 panic=-1 quiet rdinit=/init";
    let vm = vm(Vm::kernel(&kernel_file("cloud"), args)).pci();
    let modules = vm.path("initrd-root/modules");
    std::fs::create_dir_all(&modules).unwrap();
    let kernel = kernel_file("cloud");
    let drivers = kernel.with_file_name("modules/kernel/drivers");
    let mut load = String::new();
    for module in MODULES {
        let from = drivers.join(format!("{module}.ko"));
        let name = from.file_name().unwrap();
        std::fs::copy(&from, modules.join(name))
            .unwrap_or_else(|error| panic!("{from:?}: {error}"));
        load += &format!("insmod /modules/{}\n", Path::new(name).display());
    }
    let init = format!(
        "#!/bin/sh\n/bin/busybox --install -s /bin\nmkdir /proc /sys; mount -t proc p /proc; \
         mount -t sysfs s /sys; mount -t devtmpfs d /dev\nexec > /dev/console 2>&1\n{load}echo ready\n{WATCH}"
    );
    let initrd = vm.path("initrd");
    busybox_initrd(vm.dir(), &initrd, &init);
    let vm = vm.set("/boot-source/initrd_path", json!(initrd));
    let vm = vm
        .set("/machine-config/mem_size_mib", json!(256))
        .jailer_arg("--grant-ro")
        .jailer_arg(initrd.to_str().unwrap());
    let config = vm.config().clone();
    let mut machine = Machine::new(vm);
    machine.describe(&config);
    machine.start();
    machine.vm.wait_for_line("ready").unwrap();
    machine
}

#[test]
fn a_disk_appears_and_vanishes() {
    let dir = tempfile::tempdir().unwrap();
    let disk = |name: &str, sectors: usize| {
        let path = dir.path().join(name);
        let mut bytes = vec![0; sectors * 512];
        bytes[..5].copy_from_slice(format!("disk{name}").as_bytes());
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (first, second) = (disk("1", 2048), disk("2", 4096));
    let mut machine = guest(|vm| {
        let vm = vm.jailer_arg("--grant-ro").jailer_arg(&first);
        vm.jailer_arg("--grant-ro").jailer_arg(&second)
    });
    let put = |machine: &mut Machine, id: &str, path: &str| {
        let body = json!({"drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": true});
        machine.put(&format!("/drives/{id}"), body).assert_done();
    };
    put(&mut machine, "a", &first);
    machine.vm.wait_for_line("has vda:2048:disk1.").unwrap();
    put(&mut machine, "b", &second);
    machine
        .vm
        .wait_for_line("has vda:2048:disk1 vdb:4096:disk2.")
        .unwrap();
    for (id, left) in [("a", "has vdb:4096:disk2."), ("b", "has.")] {
        machine
            .ask("DELETE", &format!("/drives/{id}"), Value::Null)
            .assert_done();
        machine.vm.wait_for_line(left).unwrap();
    }
    machine.wait_until("the config has no drive", |machine| {
        machine.get("/vm/config")["drives"] == json!([])
    });
    // The same name and the same slot again.
    put(&mut machine, "a", &second);
    machine.vm.wait_for_line("has vda:4096:disk2.").unwrap();
    machine.kill();
}

#[test]
fn a_network_card_appears_carries_and_vanishes() {
    let netns = Netns::with_tap(Some("10.99.0.1/24"));
    let words = ["--netns", &netns.path(), "--grant-tap", "tap0"];
    let mut machine = guest(|vm| words.iter().fold(vm, |vm, word| vm.jailer_arg(word)));
    for mac in ["06:00:ac:10:00:02", "06:00:ac:10:00:03"] {
        let body = json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": mac});
        machine.put("/network-interfaces/eth0", body).assert_done();
        machine
            .vm
            .wait_for_line(&format!("has eth0:{mac}."))
            .unwrap();
        machine.vm.wait_for_line(&format!("pong {mac}")).unwrap();
        machine
            .ask("DELETE", "/network-interfaces/eth0", Value::Null)
            .assert_done();
        machine.wait_until("the config has no card", |machine| {
            machine.get("/vm/config")["network-interfaces"] == json!([])
        });
    }
    machine.kill();
}

//! A guest with two NUMA nodes, on a host that has two in the lab.

use casemate_tests::{Vm, cpus_of_thread, kernel_file, memory_nodes};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::vmm::busybox_initrd;

const SCRIPT: &str = "#!/bin/sh
export PATH=/bin
for name in cat echo grep mkdir mount sleep; do /bin/busybox ln -s busybox /bin/$name; done
mkdir /sys /proc
mount -t sysfs none /sys; mount -t proc none /proc
exec > /dev/console
cd /sys/devices/system/node
for node in node*; do
    echo \"$node cpus $(cat $node/cpulist) distance $(cat $node/distance)\"
    grep -o 'MemTotal: *[0-9]*' $node/meminfo
done
echo looked
sleep 1000
";

#[test]
fn a_guest_has_nodes_and_they_lie_on_nodes_of_the_host() {
    let host = std::fs::read_to_string("/sys/devices/system/node/has_memory").unwrap();
    let host = host.trim();
    if std::env::var_os("CASEMATE_LAB").is_some() {
        assert_eq!(host, "0-1");
    }
    // On a host with one node both of the guest's are there.
    let second: u16 = if host.contains('1') { 1 } else { 0 };
    let vm = Vm::kernel(
        &kernel_file("cloud"),
        "console=ttyS0 panic=-1 quiet rdinit=/init",
    );
    let initrd = vm.path("initrd");
    busybox_initrd(vm.dir(), &initrd, SCRIPT);
    let path = initrd.to_str().unwrap().to_owned();
    let nodes = json!([
        {"cpus": [0, 2], "mem_size_mib": 320, "host_node": 0, "host_cpus": [0], "distances": [10, 17]},
        {"cpus": [1], "mem_size_mib": 192, "host_node": second, "distances": [21, 10]},
    ]);
    let vm = vm
        .set("/boot-source/initrd_path", json!(path))
        .jailer_arg("--grant-ro")
        .jailer_arg(&path)
        .set("/machine-config/vcpu_count", json!(3))
        .set("/machine-config/mem_size_mib", json!(512))
        .set("/machine-config/numa_nodes", nodes)
        .start()
        .unwrap();
    let seen = |words: &str| {
        let line = vm.wait_for_line(words);
        line.unwrap_or_else(|error| panic!("{words}: {error:#}"))
    };
    seen("node0 cpus 0,2 distance 10 17");
    let first_size = kib(&seen("MemTotal:"));
    seen("node1 cpus 1 distance 21 10");
    seen("looked");
    assert!(
        (200 << 10..=320 << 10).contains(&first_size),
        "{first_size}"
    );

    let vmm = vm.vmm_pid().unwrap();
    assert_eq!(cpus_of_thread(vmm, "vcpu0").unwrap(), "0");
    assert_eq!(cpus_of_thread(vmm, "vcpu2").unwrap(), "0");
    let bound = memory_nodes(vmm).unwrap();
    for node in [0, second] {
        // Bound to it, and every page of it there.
        let here = format!("bind:{node} N{node}=");
        let there = bound.iter().filter(|line| line.starts_with(&here));
        assert!(there.clone().count() > 0, "{bound:?}");
        assert!(
            there.clone().all(|line| line.matches('N').count() == 1),
            "{bound:?}"
        );
    }
    vm.signal(Signal::SIGKILL).unwrap();
    vm.wait().unwrap();
}

fn kib(line: &str) -> u64 {
    line.split_whitespace().last().unwrap().parse().unwrap()
}

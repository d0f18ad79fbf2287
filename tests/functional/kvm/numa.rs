//! Where a machine with NUMA nodes is on its host. What a guest makes of the nodes is seen in the linux tier.

use casemate_tests::{Vm, cpus_of_thread, exit, memory_nodes};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

fn with_nodes(vm: Vm, nodes: Value) -> Vm {
    vm.set("/machine-config/vcpu_count", json!(2))
        .set("/machine-config/mem_size_mib", json!(128))
        .set("/machine-config/numa_nodes", nodes)
}

#[test]
fn memory_and_threads_are_where_the_config_says() {
    let nodes = json!([
        {"cpus": [1], "mem_size_mib": 96, "host_node": 0, "host_cpus": [0]},
        {"cpus": [0], "mem_size_mib": 32},
    ]);
    let vm = with_nodes(Vm::probe("probe.task=spin"), nodes)
        .start()
        .unwrap();
    vm.wait_for_line("probe: spin").unwrap();
    let vmm = vm.vmm_pid().unwrap();
    assert_eq!(cpus_of_thread(vmm, "vcpu1").unwrap(), "0");
    // The other threads have what the VMM was started with.
    let ours = cpus_of_thread(std::process::id(), &this_thread()).unwrap();
    for thread in ["control", "vcpu0"] {
        assert_eq!(cpus_of_thread(vmm, thread).unwrap(), ours, "{thread}");
    }
    let bound = memory_nodes(vmm).unwrap();
    // One range of guest memory, of which the kernel's pages at least are there.
    assert_eq!(bound.len(), 1, "{bound:?}");
    assert!(bound[0].starts_with("bind:0 N0="), "{bound:?}");
    vm.signal(Signal::SIGKILL).unwrap();
    vm.wait().unwrap();
}

fn this_thread() -> String {
    let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
    name.trim_end().to_owned()
}

#[test]
fn what_the_host_has_not_is_refused() {
    let node = |host: Value| {
        let mut node = json!({"cpus": [0, 1], "mem_size_mib": 128});
        node.as_object_mut()
            .unwrap()
            .extend(host.as_object().unwrap().clone());
        json!([node])
    };
    for (host, words) in [
        (
            json!({"host_node": 1000}),
            ["node 1000 of the host", "numa_nodes[].host_node"],
        ),
        (
            json!({"host_cpus": [1000]}),
            ["CPUs [1000] of the host", "numa_nodes[].host_cpus"],
        ),
    ] {
        let vm = with_nodes(Vm::probe(""), node(host));
        vm.assert_refused(exit::BAD_INPUT, &words);
    }
}

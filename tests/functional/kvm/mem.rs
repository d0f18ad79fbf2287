//! virtio-mem against the probe's driver: memory comes and goes, and what is not there costs nothing.

use super::probe;
use casemate_tests::{Running, Vm, exit, resident_mib};
use serde_json::json;

const MIB: u64 = 64;

fn mem(args: &str) -> Vm {
    probe(&format!("probe.task=mem {args}")).set(
        "/memory-hotplug",
        json!({ "total_size_mib": 256, "requested_size_mib": MIB }),
    )
}

/// Lets the probe go on, and waits until it says `line`.
fn step(vm: &mut Running, line: &str) {
    vm.write(b"\n").unwrap();
    vm.wait_for_line(line).unwrap();
}

#[test]
fn memory_comes_and_goes() {
    let mut vm = mem("").unjailed().start().unwrap();
    vm.wait_for_line("probe: 32 blocks requested").unwrap();
    let pid = vm.pid();
    let empty = resident_mib(pid).unwrap();
    step(&mut vm, "probe: plugged in");
    let full = resident_mib(pid).unwrap();
    assert!(full + 2 >= empty + MIB, "{empty} MiB, then {full}");
    step(&mut vm, "probe: unplugged");
    let less = resident_mib(pid).unwrap();
    assert!(less + MIB <= full + 2, "{full} MiB, then {less}");
    step(&mut vm, "probe: mem ok");
    assert_eq!(vm.wait().unwrap().code, exit::GUEST_RESET);
}

#[test]
fn works_behind_every_wall() {
    let mut vm = mem("").start().unwrap();
    vm.wait_for_line("probe: 32 blocks requested").unwrap();
    for line in ["plugged in", "unplugged", "mem ok"] {
        step(&mut vm, &format!("probe: {line}"));
    }
    assert_eq!(vm.wait().unwrap().code, exit::GUEST_RESET);
}

/// Not a page of the host's: its end, with the address.
#[test]
fn a_guest_that_writes_to_unplugged_memory_ends() {
    let done = mem("probe.mem=write").run().unwrap();
    done.assert_line("probe: writes");
    assert_eq!(done.code, exit::GUEST_CRASHED, "{done:#?}");
    let why = "the host has no memory for";
    assert!(done.stderr.contains(why), "{done:#?}");
}

#[test]
fn a_buffer_in_unplugged_memory_breaks_the_queue_and_nothing_else() {
    let done = mem("probe.mem=buffer").run().unwrap();
    done.assert_line("probe: offers a buffer");
    done.assert_line("probe: mem FAIL: timed out");
    assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
    assert!(done.stderr.contains("needs a reset"), "{done:#?}");
}

#[test]
fn sizes_that_make_no_sense_are_refused() {
    for (hotplug, field) in [
        (json!({ "total_size_mib": 100 }), "total_size_mib"),
        (
            json!({ "total_size_mib": 128, "block_size_mib": 3 }),
            "block_size_mib",
        ),
        (json!({ "total_size_mib": 65664 }), "block_size_mib"),
        (
            json!({ "total_size_mib": 128, "requested_size_mib": 130 }),
            "requested_size_mib",
        ),
    ] {
        probe("probe.task=mem")
            .set("/memory-hotplug", hotplug)
            .assert_refused(exit::BAD_INPUT, &[field]);
    }
}

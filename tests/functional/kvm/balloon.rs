//! virtio-balloon against the probe's driver: what the guest gives back is the host's.

use super::probe;
use casemate_tests::{Running, Vm, exit, resident_mib};
use serde_json::json;

const MIB: u64 = 64;

fn balloon() -> Vm {
    probe("probe.task=balloon").set(
        "/balloon",
        json!({ "amount_mib": MIB, "deflate_on_oom": true, "stats_polling_interval_s": 1,
                "free_page_hinting": true, "free_page_reporting": true }),
    )
}

/// Lets the probe go on, and waits until it says `line`.
fn step(vm: &mut Running, line: &str) {
    vm.write(b"\n").unwrap();
    vm.wait_for_line(line).unwrap();
}

#[test]
fn memory_goes_to_the_host_and_comes_back() {
    let mut vm = balloon().unjailed().start().unwrap();
    vm.wait_for_line("probe: balloon wants 16384 pages")
        .unwrap();
    let pid = vm.pid();
    let empty = resident_mib(pid).unwrap();
    step(&mut vm, "probe: filled");
    let full = resident_mib(pid).unwrap();
    // All of it, but for what was there before.
    assert!(full >= empty + MIB - 2, "{empty} MiB, then {full}");
    for (given, taken) in [("inflated", "deflated"), ("reported", "balloon ok")] {
        step(&mut vm, &format!("probe: {given}"));
        let less = resident_mib(pid).unwrap();
        assert!(less + MIB - 2 <= full, "{given}: {full} MiB, then {less}");
        step(&mut vm, &format!("probe: {taken}"));
        if taken == "deflated" {
            let again = resident_mib(pid).unwrap();
            assert!(again + 2 >= full, "{full} MiB, then {again}");
        }
    }
    let done = vm.wait().unwrap();
    done.assert_line("probe: asked for statistics");
    assert_eq!(done.code, exit::GUEST_RESET);
}

#[test]
fn works_behind_every_wall() {
    let mut vm = balloon().start().unwrap();
    vm.wait_for_line("probe: balloon wants 16384 pages")
        .unwrap();
    for line in ["filled", "inflated", "deflated", "reported", "balloon ok"] {
        step(&mut vm, &format!("probe: {line}"));
    }
    assert_eq!(vm.wait().unwrap().code, exit::GUEST_RESET);
}

#[test]
fn is_absent_unless_configured() {
    let done = probe("probe.task=balloon").run().unwrap();
    done.assert_line("probe: balloon FAIL: no such device on the command line or the PCI bus");
}

#[test]
fn is_no_larger_than_the_guest() {
    let balloon = json!({ "amount_mib": 129, "deflate_on_oom": false });
    probe("probe.task=balloon")
        .set("/balloon", balloon)
        .assert_refused(exit::BAD_INPUT, &["balloon.amount_mib", "129"]);
}

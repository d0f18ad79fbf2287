//! Both boot protocols, from the kernel image to the first line.

use casemate_tests::{Vm, exit};
use serde_json::json;

#[test]
fn boots_by_pvh() {
    let done = Vm::probe("")
        .set("/boot-source/protocol", json!("pvh"))
        .run()
        .unwrap();
    done.assert_line("probe: boot ok");
    assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
}

#[test]
fn boots_by_the_linux_64_bit_protocol() {
    let done = Vm::probe("")
        .set("/boot-source/protocol", json!("linux64"))
        .run()
        .unwrap();
    done.assert_line("probe: boot ok");
    assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
}

#[test]
fn boots_without_a_jail() {
    let done = Vm::probe("").unjailed().run().unwrap();
    done.assert_line("probe: boot ok");
    assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
}

#[test]
fn boots_with_the_most_vcpus_and_with_memory_above_the_hole() {
    let done = Vm::probe("")
        .set("/machine-config/vcpu_count", json!(32))
        .set("/machine-config/mem_size_mib", json!(4096))
        .run()
        .unwrap();
    done.assert_line("probe: boot ok");
}

#[test]
fn there_is_a_pit_when_asked_and_only_then() {
    let pit = Vm::probe("probe.task=pit").set("/machine-config/pit", json!(true));
    pit.run().unwrap().assert_line("probe: pit ok");
    let none = Vm::probe("probe.task=pit").run().unwrap();
    none.assert_line("probe: pit FAIL: counter 2 has no switch");
}

//! Both boot protocols, from the kernel image to the first line.

use casemate_tests::{Vm, exit};
use nix::sys::signal::Signal;
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

/// The probe starts no second CPU; each has its thread all the same.
#[test]
fn every_vcpu_has_a_thread() {
    for count in [1, 32] {
        let vm = Vm::probe("probe.task=spin")
            .set("/machine-config/vcpu_count", json!(count))
            .unjailed()
            .start()
            .unwrap();
        vm.wait_for_line("probe: spin").unwrap();
        let mut names: Vec<String> = std::fs::read_dir(format!("/proc/{}/task", vm.pid()))
            .unwrap()
            .flatten()
            .filter_map(|thread| std::fs::read_to_string(thread.path().join("comm")).ok())
            .map(|name| name.trim_end().to_owned())
            .filter(|name| name.starts_with("vcpu"))
            .collect();
        let mut expected: Vec<String> = (0..count).map(|id| format!("vcpu{id}")).collect();
        names.sort();
        expected.sort();
        assert_eq!(names, expected);
        vm.signal(Signal::SIGKILL).unwrap();
        vm.wait().unwrap();
    }
}

#[test]
fn there_is_a_pit_when_asked_and_only_then() {
    let pit = Vm::probe("probe.task=pit").set("/machine-config/pit", json!(true));
    pit.run().unwrap().assert_line("probe: pit ok");
    let none = Vm::probe("probe.task=pit").run().unwrap();
    none.assert_line("probe: pit FAIL: counter 2 has no switch");
}

/// What the host types arrives whole, also where it is more than the port holds at a time.
#[test]
fn a_line_typed_on_the_console_reaches_the_guest() {
    let line: String = ('a'..='z').cycle().take(1000).collect();
    for jailed in [false, true] {
        let mut vm = Vm::probe("probe.task=serial");
        if !jailed {
            vm = vm.unjailed();
        }
        let mut vm = vm.start().unwrap();
        vm.wait_for_line("probe: type a line").unwrap();
        vm.write(format!("{line}\n").as_bytes()).unwrap();
        let done = vm.wait().unwrap();
        done.assert_line(&format!("probe: heard {line}"));
        done.assert_line("probe: serial ok");
    }
}

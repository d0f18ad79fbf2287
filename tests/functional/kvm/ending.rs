//! Every way for a VM to end has an exit code of its own.

use casemate_tests::{Machine, Vm, exit};
use nix::sys::signal::Signal;

#[test]
fn each_end_has_its_code() {
    for (end, code) in [
        ("poweroff", exit::GUEST_POWERED_OFF),
        ("reset", exit::GUEST_RESET),
        ("acpi-reset", exit::GUEST_RESET),
        ("crash", exit::GUEST_CRASHED),
    ] {
        for jailed in [false, true] {
            let mut vm = Vm::probe(&format!("probe.end={end}"));
            if !jailed {
                vm = vm.unjailed();
            }
            let done = vm.run().unwrap();
            done.assert_line("probe: boot ok");
            assert_eq!(done.code, code, "{end}, jailed {jailed}: {done:#?}");
        }
    }
}

/// A guest that ignores the power button is ended after the grace time, or at the second signal.
#[test]
fn a_second_signal_ends_a_spinning_guest() {
    for jailed in [false, true] {
        let mut vm = Vm::probe("probe.task=spin");
        if !jailed {
            vm = vm.unjailed();
        }
        let vm = vm.start().unwrap();
        vm.wait_for_line("probe: spin").unwrap();
        vm.signal(Signal::SIGTERM).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(300));
        vm.signal(Signal::SIGTERM).unwrap();
        let done = vm.wait().unwrap();
        assert_eq!(done.code, exit::ENDED_BY_HOST, "jailed {jailed}: {done:#?}");
    }
}

/// The keys for a guest that has a driver for them, the power button for one that has not.
#[test]
fn ctrl_alt_del_takes_the_way_that_the_guest_knows() {
    for task in ["probe.task=keyboard", "probe.task=keyboard probe.keys=1"] {
        let vm = Vm::probe(task);
        let config = vm.config().clone();
        let mut machine = Machine::new(vm);
        machine.describe(&config);
        machine.start();
        machine.vm.wait_for_line("probe: listening").unwrap();
        machine.act("SendCtrlAltDel").assert_done();
        let done = machine.vm.wait().unwrap();
        done.assert_line("probe: keyboard ok");
        assert_eq!(done.code, exit::GUEST_RESET, "{task}: {done:#?}");
    }
}

#[test]
fn a_signal_ends_a_sleeping_guest_after_the_grace_time() {
    let vm = Vm::kernel(&casemate_tests::bin("casemate-probe"), "idle acpi=off")
        .start()
        .unwrap();
    vm.wait_for_line("probe: idle").unwrap();
    vm.signal(Signal::SIGTERM).unwrap();
    let done = vm.wait().unwrap();
    assert_eq!(done.code, exit::ENDED_BY_HOST, "{done:#?}");
}

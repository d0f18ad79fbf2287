//! How a run ends: its exit code, and nothing left behind.

use std::time::{Duration, Instant};

use casemate_tests::{Casemate, Machine, exit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::guest::linux;

#[test]
fn a_command_that_does_not_exist() {
    let casemate = Casemate::new();
    let rootfs = casemate_tests::rootfs();
    let rootfs = rootfs.to_str().unwrap();
    for (command, code) in [("/no/such/thing", 127), ("/etc/passwd", 126)] {
        let done = casemate
            .call(&["run", "--rootfs", rootfs, "--", command])
            .unwrap();
        assert_eq!(done.code, code, "{done:#?}");
        assert!(done.stderr.contains(command), "{done:#?}");
    }
    casemate.assert_clean();
}

#[test]
fn a_command_that_a_signal_ends() {
    let done = Casemate::new().run(&[], "kill -9 $$").unwrap();
    assert_eq!(done.code, 137, "{done:#?}");
}

#[test]
fn a_timeout() {
    let casemate = Casemate::new();
    let done = casemate
        .run(&["--timeout", "30s"], "echo started; sleep 1000")
        .unwrap();
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (124, "started\n"),
        "{done:#?}"
    );
    casemate.assert_clean();
}

#[test]
fn sigterm_reaches_the_command_and_leaves_nothing() {
    let casemate = Casemate::new();
    let run = casemate.start(
        &[],
        "trap 'echo bye; exit 33' TERM; echo up; while :; do sleep 0.1; done",
    );
    let run = run.unwrap();
    run.wait_for_line("up").unwrap();
    let machines = casemate.call(&["ps", "--quiet"]).unwrap();
    assert_eq!(machines.stdout.lines().count(), 1, "{machines:#?}");
    run.signal(Signal::SIGTERM).unwrap();
    let done = run.wait().unwrap();
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (33, "up\nbye\n"),
        "{done:#?}"
    );
    casemate.assert_clean();
    assert!(casemate.call(&["ps", "--quiet"]).unwrap().stdout.is_empty());
}

#[test]
fn a_killed_run_is_cleaned_up_after() {
    let casemate = Casemate::new();
    let run = casemate.start(&[], "echo up; sleep 1000").unwrap();
    run.wait_for_line("up").unwrap();
    run.signal(Signal::SIGKILL).unwrap();
    assert_eq!(run.wait().unwrap().code, 137);
    // The machine dies with it; then what it had can go.
    for _ in 0..100 {
        assert_eq!(casemate.call(&["gc"]).unwrap().code, 0);
        if casemate.left_behind().unwrap().is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    panic!("left behind: {:?}", casemate.left_behind());
}

#[test]
fn a_guest_that_panics_is_reported_with_its_last_words() {
    let done = Casemate::new()
        .run(&[], "echo c > /proc/sysrq-trigger")
        .unwrap();
    assert_eq!(done.code, 125, "{done:#?}");
    assert!(done.stderr.contains("Kernel panic"), "{done:#?}");
}

/// A signal to the VMM itself, past `casemate run`, presses the ACPI power button; the guest's init ends the command.
#[test]
fn the_power_button_ends_the_command() {
    let casemate = Casemate::new();
    let script = "trap 'echo bye; exit 33' TERM; echo up; while :; do sleep 0.1; done";
    let run = casemate.start(&["--id", "button"], script).unwrap();
    run.wait_for_line("up").unwrap();
    let report = casemate.call(&["inspect", "--confinement", "--json", "button"]);
    let report: Value = serde_json::from_str(&report.unwrap().stdout).unwrap();
    let processes = report["processes"].as_array().unwrap();
    let vmm = processes.iter().find(|process| process["role"] == "vmm");
    let pid = vmm.and_then(|process| process["pid"].as_i64()).unwrap();
    kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGTERM).unwrap();
    let done = run.wait().unwrap();
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (33, "up\nbye\n"),
        "{done:#?}"
    );
    casemate.assert_clean();
}

/// The kernel alone resets; where user space wants to be asked (`systemd` does), process 1 gets a signal.
#[test]
fn ctrl_alt_del_reaches_the_kernel_and_process_1() {
    let script = "
cd /proc/sys/kernel; echo 0 > ctrl-alt-del
trap 'echo asked; echo 1 > ctrl-alt-del; echo \"or not\"' INT
until grep 'Name=\"AT .* keyboard' /proc/bus/input/devices; do usleep 100000; done
dmesg | grep -i -e i8042 -e atkbd
echo listening
while :; do usleep 100000; done";
    let vm = linux("reboot=k", &[], script, &[]);
    let config = vm.config().clone();
    let mut machine = Machine::new(vm);
    machine.describe(&config);
    machine.start();
    for words in ["listening", "or not"] {
        machine.vm.wait_for_line(words).unwrap();
        machine.act("SendCtrlAltDel").assert_done();
    }
    let done = machine.vm.wait().unwrap();
    assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
    assert!(done.stdout.contains("asked"), "{done:#?}");
}

/// A command that ignores the request to end: after the grace time the power button, which init answers by killing it
/// and powering off.
#[test]
fn a_command_that_ignores_the_end_is_killed() {
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let casemate = Casemate::new();
        let script = "trap '' TERM INT; echo up; while :; do sleep 0.1; done";
        let run = casemate.start(&["--stop-grace", "3s"], script).unwrap();
        run.wait_for_line("up").unwrap();
        let asked = Instant::now();
        run.signal(signal).unwrap();
        let done = run.wait().unwrap();
        assert!(asked.elapsed() >= Duration::from_secs(3), "{done:#?}");
        assert!(asked.elapsed() < Duration::from_secs(60), "{done:#?}");
        assert_eq!(done.code, code, "{done:#?}");
        casemate.assert_clean();
    }
}

//! However a machine ends, nothing of it stays.

use casemate_tests::{Running, Vm, exit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::outside::*;

/// A machine whose guest idles: the jailer's half, and the VMM.
fn idle(vm: Vm) -> (Running, u32, u32) {
    let vm = vm.set("/boot-source/boot_args", json!("idle acpi=off"));
    let running = vm.start().unwrap();
    running.wait_for_line("probe: idle").unwrap();
    let jailer = running.pid().as_raw().unsigned_abs();
    let vmm = prisoner_of(&running);
    (running, jailer, vmm)
}

/// Mounts of an empty root that the host sees.
fn mounts() -> usize {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    mounts
        .lines()
        .filter(|line| line.contains("nr_inodes="))
        .count()
}

#[test]
fn the_vmm_dies_with_the_jailer() {
    let (running, jailer, vmm) = idle(Vm::probe("").vsock());
    running.signal(Signal::SIGKILL).unwrap();
    eventually("the VMM ends", || !is_alive(vmm) && !is_alive(jailer));
    assert_eq!(running.wait().unwrap().code, 137);
}

#[test]
fn the_jailer_tells_how_the_vmm_was_killed_and_leaves_nothing() {
    let before = mounts();
    let user = user();
    let vm = with_user(Vm::probe("").vsock(), user);
    let directory = vm.dir().to_owned();
    let (running, jailer, vmm) = idle(vm);
    assert_eq!(mounts(), before, "the host sees the jail's mounts");
    kill(Pid::from_raw(vmm.cast_signed()), Signal::SIGKILL).unwrap();
    let done = running.wait().unwrap();
    assert_eq!(done.code, 137, "{done:#?}");
    assert!(!is_alive(vmm) && !is_alive(jailer));
    assert_eq!(processes_of(user), Vec::<u32>::new());
    assert_eq!(mounts(), before);
    assert!(
        !directory.exists(),
        "the test's own directory is gone with it"
    );
}

/// As soon as the jailer's half can forward it, which is long before the VMM listens.
#[test]
fn an_early_signal_is_not_lost() {
    let vm = Vm::probe("").vsock();
    let vm = vm.set("/boot-source/boot_args", json!("idle acpi=off"));
    let running = vm.start().unwrap();
    let jailer = running.pid().as_raw().to_string();
    eventually("the jailer's half serves", || {
        status(&jailer, "Seccomp") == "2"
    });
    running.signal(Signal::SIGTERM).unwrap();
    assert_eq!(running.wait().unwrap().code, exit::ENDED_BY_HOST);
}

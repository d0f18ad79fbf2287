//! Bad input: one line that says what, where and what to do; nothing started, nothing left.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use casemate_tests::{Running, Vm, bin, broken_kernels, exit, pattern_disk};
use serde_json::json;

/// A VM that starts by itself, and the same in a jail: both must refuse.
#[track_caller]
fn both(vm: impl Fn() -> Vm, words: &[&str]) {
    vm().unjailed().assert_refused(exit::BAD_INPUT, words);
    vm().assert_refused(exit::BAD_INPUT, words);
}

/// The probe's config with `pointer` set to `value` is refused in both ways to start.
#[track_caller]
fn refused(pointer: &str, value: &serde_json::Value, words: &[&str]) {
    both(|| Vm::probe("").set(pointer, value.clone()), words);
}

fn drive(path: &str) -> serde_json::Value {
    json!([{ "drive_id": "a", "path_on_host": path, "is_root_device": false, "is_read_only": true }])
}

/// `vm`'s command with less rights, by setpriv of util-linux.
fn through_setpriv(vm: &Vm, options: &[&str]) -> Command {
    let inner = vm.command().unwrap();
    let mut command = Command::new("setpriv");
    command.args(options).arg("--");
    command.arg(inner.get_program()).args(inner.get_args());
    command
}

#[test]
fn a_field_that_does_not_exist() {
    refused("/machine-config/vcpus", &json!(1), &["vcpus"]);
    refused("/bootsource", &json!({}), &["bootsource"]);
}

#[test]
fn vcpus_out_of_range() {
    refused(
        "/machine-config/vcpu_count",
        &json!(0),
        &["vcpu_count", "32"],
    );
    refused(
        "/machine-config/vcpu_count",
        &json!(33),
        &["vcpu_count", "32"],
    );
}

#[test]
fn no_memory() {
    refused("/machine-config/mem_size_mib", &json!(0), &["mem_size_mib"]);
}

#[test]
fn more_memory_than_an_address_space() {
    refused(
        "/machine-config/mem_size_mib",
        &json!(u64::MAX),
        &["mem_size_mib"],
    );
}

#[test]
fn a_config_that_is_not_json() {
    for text in ["", "{", "[]", "null", "{\"boot-source\": 1}"] {
        let vm = Vm::probe("").unjailed();
        let command = vm.command().unwrap();
        fs::write(vm.path("config.json"), text).unwrap();
        vm.assert_command_refused(command, exit::BAD_INPUT, &["config.json"]);
    }
}

#[test]
fn a_config_that_is_not_there() {
    for (vm, code) in [
        (Vm::probe("").unjailed(), exit::BAD_INPUT),
        (Vm::probe(""), exit::JAIL_FAILED),
    ] {
        let command = vm.command().unwrap();
        fs::remove_file(vm.path("config.json")).unwrap();
        vm.assert_command_refused(command, code, &["config.json", "No such file"]);
    }
}

#[test]
fn two_devices_with_one_name() {
    let vm = || {
        let mut vm = Vm::probe("");
        for file in ["first", "second"] {
            let disk = vm.path(file);
            pattern_disk(&disk, 8).unwrap();
            vm = vm.drive("twin", &disk, true);
        }
        vm
    };
    both(vm, &["drives", "twin"]);
}

#[test]
fn more_devices_than_interrupt_pins() {
    let vm = || {
        let mut vm = Vm::probe("");
        for number in 0..25 {
            let disk = vm.path(&format!("disk{number}"));
            pattern_disk(&disk, 8).unwrap();
            vm = vm.drive(&format!("d{number}"), &disk, true);
        }
        vm
    };
    both(vm, &["interrupt"]);
}

#[test]
fn files_that_are_missing_or_are_directories() {
    for (path, why) in [("/nonexistent/file", "No such file"), ("/tmp", "directory")] {
        for (pointer, value) in [
            ("/boot-source/kernel_image_path", json!(path)),
            ("/boot-source/initrd_path", json!(path)),
            ("/drives", drive(path)),
        ] {
            Vm::probe("")
                .set(pointer, value.clone())
                .unjailed()
                .assert_refused(exit::BAD_INPUT, &[path, why]);
            // Where the VMM opens nothing, it is the jailer that finds out.
            Vm::probe("")
                .set(pointer, value)
                .jailer_arg("--grant-ro")
                .jailer_arg(path)
                .assert_refused(exit::JAIL_FAILED, &[path, why]);
        }
    }
}

#[test]
fn files_that_may_not_be_read() {
    for pointer in ["/boot-source/kernel_image_path", "/boot-source/initrd_path"] {
        for (jailed, code) in [(false, exit::BAD_INPUT), (true, exit::JAIL_FAILED)] {
            let mut vm = Vm::probe("");
            let secret = vm.path("secret");
            fs::write(&secret, "x").unwrap();
            fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
            let path = secret.to_str().unwrap();
            vm = vm.set(pointer, json!(path));
            vm = vm.jailer_arg("--grant-ro").jailer_arg(path);
            if !jailed {
                vm = vm.unjailed();
            }
            // Root reads everything, but for a root without these two.
            let lost = "--bounding-set=-dac_override,-dac_read_search";
            let command = through_setpriv(&vm, &[lost]);
            vm.assert_command_refused(command, code, &["secret", "ermission denied"]);
        }
    }
}

#[test]
fn an_initrd_that_is_no_file_for_a_guest() {
    let vm = || {
        let vm = Vm::probe("");
        let initrd = vm.path("initrd");
        // Larger than the guest's memory; sparse, so that it takes no room here.
        fs::File::create(&initrd).unwrap().set_len(1 << 30).unwrap();
        let path = initrd.to_str().unwrap().to_owned();
        vm.set("/boot-source/initrd_path", json!(path))
            .jailer_arg("--grant-ro")
            .jailer_arg(&path)
    };
    vm().unjailed().assert_refused(exit::BAD_INPUT, &["initrd"]);
    vm().assert_refused(exit::BAD_INPUT, &["initrd"]);
}

#[test]
fn a_file_that_was_not_granted() {
    Vm::probe("")
        .set("/drives", drive("/etc/passwd"))
        .assert_refused(exit::BAD_INPUT, &["/etc/passwd", "--grant-ro"]);
}

#[test]
fn a_tap_that_does_not_exist() {
    let vm = || Vm::probe("").net("notap0", "06:00:ac:10:00:02");
    vm().unjailed().assert_refused(exit::BAD_INPUT, &["notap0"]);
    vm().assert_refused(exit::JAIL_FAILED, &["notap0"]);
    let there = fs::exists("/sys/class/net/notap0").unwrap();
    assert!(!there, "the tap was created");
}

#[test]
fn kernels_that_are_none() {
    let (_dir, kernels) = broken_kernels();
    for kernel in kernels {
        both(|| Vm::kernel(&kernel, "acpi=off"), &["kernel"]);
    }
}

#[test]
fn ids_that_are_none() {
    for id in ["", "a/b", "..", "../../etc", "a b", "ä", &"x".repeat(300)] {
        both(|| Vm::probe("").id(id), &["id"]);
    }
}

#[test]
fn no_permission_on_dev_kvm() {
    // A node of this test's own where everybody may open the host's, which stays as it is.
    let vm = Vm::probe("").unjailed();
    let node = vm.path("kvm");
    fs::write(&node, "").unwrap();
    fs::set_permissions(&node, fs::Permissions::from_mode(0o600)).unwrap();
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let inner = through_setpriv(&vm, &nobody);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c"]);
    command.arg("mount --bind \"$0\" /dev/kvm && exec \"$@\"");
    command.arg(&node).arg(inner.get_program());
    command.args(inner.get_args());
    vm.assert_command_refused(command, exit::BAD_INPUT, &["/dev/kvm", "ermission"]);
}

#[test]
fn without_an_api_it_says_what_is_missing() {
    let mut command = Command::new(bin("casemate-vmm"));
    command.arg("--no-api");
    let done = Running::start(command, None).unwrap().wait().unwrap();
    done.assert_refused(exit::BAD_INPUT, &["--config-file", "--no-api"]);
}

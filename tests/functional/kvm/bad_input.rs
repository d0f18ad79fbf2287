//! Bad input: one line that says what, where and what to do; nothing started, nothing left.

use std::fs;
use std::process::Command;

use casemate_tests::{Running, Vm, bin, exit, pattern_disk};
use serde_json::json;

/// The probe's config with `pointer` set to `value` is refused in both ways to start, with one
/// line that has `words`.
#[track_caller]
fn refused(pointer: &str, value: &serde_json::Value, words: &[&str]) {
    for jailed in [false, true] {
        let mut vm = Vm::probe("").set(pointer, value.clone());
        if !jailed {
            vm = vm.unjailed();
        }
        vm.run().unwrap().assert_refused(exit::BAD_INPUT, words);
    }
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
        let mut command = vm.command().unwrap();
        fs::write(vm.path("config.json"), text).unwrap();
        command.stdin(std::process::Stdio::null());
        let done = Running::start(command, None).unwrap().wait().unwrap();
        done.assert_refused(exit::BAD_INPUT, &["config.json"]);
    }
}

#[test]
fn two_devices_with_one_name() {
    let vm = Vm::probe("");
    let disk = vm.path("disk");
    pattern_disk(&disk, 8).unwrap();
    let done = vm
        .drive("one", &disk, true)
        .drive("one", &disk, true)
        .unjailed()
        .run()
        .unwrap();
    done.assert_refused(exit::BAD_INPUT, &["one"]);
}

#[test]
fn more_devices_than_interrupt_pins() {
    let mut vm = Vm::probe("").unjailed();
    for number in 0..25 {
        let disk = vm.path(&format!("disk{number}"));
        pattern_disk(&disk, 8).unwrap();
        vm = vm.drive(&format!("d{number}"), &disk, true);
    }
    vm.run()
        .unwrap()
        .assert_refused(exit::BAD_INPUT, &["interrupt"]);
}

#[test]
fn files_that_are_missing_or_are_directories() {
    let missing = json!("/nonexistent/kernel");
    let done = Vm::probe("")
        .set("/boot-source/kernel_image_path", missing)
        .unjailed()
        .run();
    done.unwrap()
        .assert_refused(exit::BAD_INPUT, &["/nonexistent/kernel"]);
    let done = Vm::probe("")
        .set("/boot-source/kernel_image_path", json!("/tmp"))
        .unjailed()
        .run();
    done.unwrap()
        .assert_refused(exit::BAD_INPUT, &["/tmp", "directory"]);
    for path in ["/nonexistent/disk", "/tmp"] {
        let drive = json!([{ "drive_id": "a", "path_on_host": path, "is_root_device": false,
                             "is_read_only": true }]);
        let done = Vm::probe("")
            .set("/drives", drive)
            .unjailed()
            .run()
            .unwrap();
        done.assert_refused(exit::BAD_INPUT, &[path]);
    }
}

#[test]
fn the_jailer_refuses_the_same_files() {
    for path in ["/nonexistent/disk", "/tmp"] {
        let done = Vm::probe("")
            .jailer_arg("--grant-ro")
            .jailer_arg(path)
            .run()
            .unwrap();
        assert_ne!(done.code, 0, "{done:#?}");
        assert!(done.stderr.contains(path), "{done:#?}");
        assert_eq!(done.stderr.trim_end().lines().count(), 1, "{done:#?}");
    }
}

#[test]
fn a_file_that_was_not_granted() {
    let drive = json!([{ "drive_id": "a", "path_on_host": "/etc/passwd", "is_root_device": false,
                         "is_read_only": true }]);
    let done = Vm::probe("").set("/drives", drive).run().unwrap();
    done.assert_refused(exit::BAD_INPUT, &["/etc/passwd", "--grant-ro"]);
}

#[test]
fn a_tap_that_does_not_exist() {
    for jailed in [false, true] {
        let mut vm = Vm::probe("").net("notap0", "06:00:ac:10:00:02");
        if !jailed {
            vm = vm.unjailed();
        }
        let done = vm.run().unwrap();
        assert_ne!(done.code, 0, "{done:#?}");
        assert!(done.stderr.contains("notap0"), "{done:#?}");
        let there = fs::exists("/sys/class/net/notap0").unwrap();
        assert!(!there, "the tap was created");
    }
}

#[test]
fn kernels_that_are_none() {
    let probe = fs::read(bin("casemate-probe")).unwrap();
    // A bzImage header that claims a payload of 100 GB: length is a u32, so 4 GiB - 1 here, and
    // an ELF whose one segment claims the full 100 GB.
    let mut bzimage = vec![0u8; 8192];
    bzimage[0x1f1] = 4;
    bzimage[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    bzimage[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    bzimage[0x211] = 1;
    bzimage[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut huge = probe.clone();
    huge[64 + 32..64 + 40].copy_from_slice(&100_000_000_000u64.to_le_bytes());
    huge[64 + 40..64 + 48].copy_from_slice(&100_000_000_000u64.to_le_bytes());
    let cases: [(&str, &[u8]); 7] = [
        ("empty", b""),
        ("text", b"This is not a kernel.\n"),
        ("short", &probe[..60]),
        ("headless", &probe[..100]),
        ("half", &probe[..probe.len() / 2]),
        ("bzimage", &bzimage),
        ("huge", &huge),
    ];
    for (name, bytes) in cases {
        for jailed in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let kernel = dir.path().join(name);
            fs::write(&kernel, bytes).unwrap();
            let mut vm = Vm::kernel(&kernel, "acpi=off");
            if !jailed {
                vm = vm.unjailed();
            }
            let done = vm.run().unwrap();
            done.assert_refused(exit::BAD_INPUT, &["kernel"]);
        }
    }
}

#[test]
fn ids_that_are_none() {
    for id in ["", "a/b", "..", "../../etc", "a b", "ä", &"x".repeat(300)] {
        for jailed in [false, true] {
            let mut vm = Vm::probe("").id(id);
            if !jailed {
                vm = vm.unjailed();
            }
            vm.run().unwrap().assert_refused(exit::BAD_INPUT, &["id"]);
        }
    }
}

#[test]
fn no_permission_on_dev_kvm() {
    // As an account that may not open it: the same program, run through setpriv of util-linux.
    let vm = Vm::probe("").unjailed();
    let vmm = vm.command().unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
    command.arg(vmm.get_program()).args(vmm.get_args());
    let done = Running::start(command, None).unwrap().wait().unwrap();
    done.assert_refused(exit::BAD_INPUT, &["/dev/kvm", "ermission"]);
}

#[test]
fn without_no_api_it_says_what_is_missing() {
    let command = Command::new(bin("casemate-vmm"));
    let done = Running::start(command, None).unwrap().wait().unwrap();
    done.assert_refused(exit::BAD_INPUT, &["--no-api"]);
}

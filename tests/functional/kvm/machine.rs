//! What belongs to the machine as a whole: logs, metrics, the boot timer, CPU templates.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;

use casemate_tests::{Vm, exit};
use nix::sys::stat::Mode;
use serde_json::{Value, json};

/// The jailer opens the files, and the sealed VMM writes them.
#[test]
fn a_jailed_machine_writes_its_metrics_and_its_log() {
    let dir = tempfile::tempdir().unwrap();
    let (metrics, log) = (dir.path().join("metrics"), dir.path().join("log"));
    let grant = |name: &str, path: &std::path::Path| format!("{name}={}", path.display());
    let done = Vm::probe("probe.task=rng")
        .entropy()
        .id("counted")
        .jailer_arg("--grant-append")
        .jailer_arg(&grant("m", &metrics))
        .jailer_arg("--grant-append")
        .jailer_arg(&grant("l", &log))
        .set(
            "/metrics",
            json!({"metrics_path": "m", "emit_id": true, "properties": {"a": "b"}}),
        )
        .set(
            "/logger",
            json!({"log_path": "l", "level": "Debug", "show_level": true, "module": "machine=off,virtio=debug"}),
        )
        .run()
        .unwrap();
    done.assert_line("probe: rng ok");
    let metrics = std::fs::read_to_string(metrics).unwrap();
    assert_eq!(metrics.lines().count(), 1, "{metrics}");
    let line: Value = serde_json::from_str(&metrics).unwrap();
    assert_eq!(line["id"], "counted");
    assert_eq!(line["properties"]["a"], "b");
    assert_eq!(line["entropy"]["entropy_bytes"], 128);
    assert_eq!(line["entropy"]["entropy_event_count"], 2);
    for exits in ["exit_mmio_write", "exit_mmio_read", "exit_io_out"] {
        assert!(line["vcpu"][exits].as_u64() > Some(0), "{exits}: {line}");
    }
    let log = std::fs::read_to_string(log).unwrap();
    assert!(
        log.contains("[counted:device:DEBUG] virtio device 0: started"),
        "{log}"
    );
    assert!(!log.contains("kernel:"), "a module that is off: {log}");
}

/// A log that nobody reads holds up neither the guest nor the end.
#[test]
fn a_stuck_reader_of_the_log_holds_up_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("log");
    nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    // Opened, never read, and full before the machine starts.
    let mut reader = OpenOptions::new();
    let reader = reader
        .read(true)
        .write(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits());
    let mut reader = reader.open(&pipe).unwrap();
    while std::io::Write::write(&mut reader, &[b'x'; 4096]).is_ok() {}
    let metrics = dir.path().join("metrics");
    let done = Vm::probe("probe.task=rng")
        .entropy()
        .unjailed()
        .vmm_arg("--log-path")
        .vmm_arg(pipe.to_str().unwrap())
        .vmm_arg("--metrics-path")
        .vmm_arg(metrics.to_str().unwrap())
        .vmm_arg("--level")
        .vmm_arg("trace")
        .run()
        .unwrap();
    done.assert_line("probe: rng ok");
    assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
    let metrics = std::fs::read_to_string(metrics).unwrap();
    let line: Value = serde_json::from_str(&metrics).unwrap();
    assert!(
        line["logger"]["missed_log_count"].as_u64() > Some(2),
        "{line}"
    );
}

#[test]
fn the_guest_says_when_it_has_booted() {
    let run = |timer: bool| {
        let mut vm = Vm::probe("probe.task=booted")
            .vmm_arg("--level")
            .vmm_arg("info");
        if timer {
            vm = vm.vmm_arg("--boot-timer");
        }
        vm.run().unwrap()
    };
    let done = run(true);
    done.assert_line("probe: booted ok");
    let line = done
        .stderr
        .lines()
        .find(|line| line.contains("Guest-boot-time ="));
    let line = line.unwrap_or_else(|| panic!("{done:#?}"));
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "us").unwrap();
    assert!(words[at - 1].parse::<u64>().unwrap() > 0, "{line}");
    let done = run(false);
    assert!(!done.stderr.contains("Guest-boot-time"), "{done:#?}");
}

#[test]
fn a_template_that_does_not_fit_is_refused_by_name() {
    let leaf = json!({"cpuid_modifiers": [{"leaf": "0x12345", "subleaf": "0x0", "flags": 0, "modifiers": []}]});
    Vm::probe("")
        .set("/cpu-config", leaf)
        .assert_refused(exit::BAD_INPUT, &["cpu-config", "leaf 0x12345"]);
    let msr = json!({"msr_modifiers": [{"addr": "0xdead", "bitmap": "0b1"}]});
    Vm::probe("")
        .set("/cpu-config", msr)
        .assert_refused(exit::BAD_INPUT, &["0xdead", "cpu-config"]);
}

/// Whether KVM shows guests the CPUID of their machine: one that pages in software cannot where the CPU does not let it
/// (CPUID faulting), for guests that are not in ring 0.
fn guests_see_their_cpuid() -> bool {
    let word = 0x7473_6163_u32;
    let change = json!({ "register": "eax", "bitmap": format!("0b{word:032b}") });
    let leaf = json!({ "leaf": "0x80000002", "subleaf": "0x0", "flags": 0, "modifiers": [change] });
    let vm = Vm::probe("probe.task=cpuid probe.leaf=2147483650");
    let vm = vm.set("/cpu-config", json!({ "cpuid_modifiers": [leaf] }));
    let done = vm.run().unwrap();
    assert!(done.stdout.contains("probe: cpuid ok"), "{done:#?}");
    done.stdout.contains(&format!("{word:08x}"))
}

/// Leaf 0xb of CPUID: how many threads a core has, and how many the processor.
#[test]
fn with_smt_two_vcpus_are_a_core() {
    if !guests_see_their_cpuid() {
        // Units look at what KVM is told.
        eprintln!("not looked at: this KVM shows its guests the host's CPUID");
        return;
    }
    for (vcpus, smt, threads) in [(4, false, 1), (4, true, 2), (1, true, 1)] {
        for (subleaf, count) in [(0, threads), (1, vcpus)] {
            let task = format!("probe.task=cpuid probe.leaf=11 probe.subleaf={subleaf}");
            let machine = json!({ "vcpu_count": vcpus, "mem_size_mib": 128, "smt": smt });
            let vm = Vm::probe(&task).set("/machine-config", machine);
            let done = vm.run().unwrap();
            // In EBX, of EAX to EDX.
            let mut lines = done.stdout.lines();
            let line = lines.find_map(|line| line.trim().strip_prefix("probe: leaf 0xb "));
            let word = line.and_then(|line| line.split(' ').nth(1));
            assert_eq!(word, Some(&*format!("{count:08x}")), "{done:#?}");
        }
    }
}

//! A machine that is configured, started and changed by requests alone.

use casemate_tests::{ApiClient, Machine, Running, Vm, bin, exit, pattern_disk};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

fn both(vm: impl Fn() -> Vm) -> [Vm; 2] {
    [vm(), vm().unjailed()]
}

#[test]
fn boots_by_requests_alone() {
    for vm in both(|| Vm::probe("probe.task=rng")) {
        let (config, id) = (vm.config().clone(), vm.name().to_owned());
        let mut machine = Machine::new(vm);
        assert_eq!(
            machine.get("/"),
            json!({"id": id, "state": "Not started", "vmm_version": "1.16.0", "app_name": "Firecracker"})
        );
        assert_eq!(
            machine.get("/version"),
            json!({"firecracker_version": "1.16.0"})
        );
        let size = machine.get("/machine-config");
        assert_eq!(
            (&size["vcpu_count"], &size["mem_size_mib"]),
            (&json!(1), &json!(128))
        );
        machine.describe(&config);
        machine.put("/entropy", json!({})).assert_done();
        let shown = machine.get("/vm/config");
        assert_eq!(
            shown["boot-source"]["kernel_image_path"],
            config["boot-source"]["kernel_image_path"]
        );
        assert_eq!(shown["entropy"], json!({"rate_limiter": null}));
        machine.start();
        let done = machine.vm.wait().unwrap();
        done.assert_line("probe: rng ok");
        assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
    }
}

#[test]
fn a_config_file_boots_at_once_and_is_served_afterwards() {
    let vm = Vm::probe("probe.task=spin").unjailed();
    let socket = vm.api_path();
    let mut command = std::process::Command::new(bin("casemate-vmm"));
    std::fs::write(vm.path("c.json"), vm.config().to_string()).unwrap();
    command.arg("--config-file").arg(vm.path("c.json"));
    command.arg("--api-sock").arg(&socket);
    let running = Running::start(command, None).unwrap();
    running.wait_for_line("probe: spin").unwrap();
    let mut machine = Machine {
        client: ApiClient::connect(&socket).unwrap(),
        vm: running,
    };
    assert_eq!(machine.get("/")["state"], "Running");
    machine
        .act("InstanceStart")
        .assert_refused("before the machine is started");
    machine.kill();
    // What it left is taken over.
    let vm = vm.unjailed();
    Machine::new(vm).kill();
}

#[test]
fn some_requests_come_only_before_and_some_only_after_the_start() {
    for vm in both(|| Vm::probe("probe.task=spin")) {
        let config = vm.config().clone();
        let mut machine = Machine::new(vm);
        machine
            .act("InstanceStart")
            .assert_refused("PUT /boot-source");
        let after = [
            ("PATCH", "/vm", json!({"state": "Paused"})),
            ("PATCH", "/drives/a", json!({"drive_id": "a"})),
            ("PATCH", "/network-interfaces/a", json!({"iface_id": "a"})),
            ("PATCH", "/pmem/a", json!({"id": "a"})),
            ("PATCH", "/balloon", json!({"amount_mib": 1})),
            ("GET", "/balloon/statistics", Value::Null),
            ("GET", "/hotplug/memory", Value::Null),
            ("DELETE", "/drives/a", Value::Null),
            ("PUT", "/actions", json!({"action_type": "FlushMetrics"})),
            ("PUT", "/actions", json!({"action_type": "SendCtrlAltDel"})),
            (
                "PUT",
                "/snapshot/create",
                json!({"snapshot_path": "/s", "mem_file_path": "/m"}),
            ),
        ];
        for (method, path, body) in after {
            let answer = machine.ask(method, path, body);
            answer.assert_refused("after the machine is started");
        }
        machine.describe(&config);
        machine.start();
        machine.vm.wait_for_line("probe: spin").unwrap();
        assert_eq!(machine.get("/")["state"], "Running");
        let load = json!({"snapshot_path": "/s", "mem_backend": {"backend_path": "/m", "backend_type": "File"}});
        for (path, body) in [
            ("/boot-source", config["boot-source"].clone()),
            ("/machine-config", config["machine-config"].clone()),
            ("/entropy", json!({})),
            ("/logger", json!({})),
            ("/metrics", json!({"metrics_path": "/m"})),
            ("/actions", json!({"action_type": "InstanceStart"})),
            ("/snapshot/load", load),
        ] {
            machine
                .put(path, body)
                .assert_refused("before the machine is started");
        }
        machine.act("FlushMetrics").assert_refused("--metrics-path");
        machine
            .patch("/drives/a", json!({"drive_id": "a"}))
            .assert_refused("no drive a");
        let snapshot = json!({"snapshot_path": "/s", "mem_file_path": "/m"});
        machine
            .put("/snapshot/create", snapshot)
            .assert_refused("a machine that is paused");
        machine.kill();
    }
}

#[test]
fn what_is_wrong_is_refused_and_what_was_there_stays() {
    for vm in both(|| Vm::probe("")) {
        let config = vm.config().clone();
        let broken = vm.path("broken");
        std::fs::write(&broken, "this is no kernel").unwrap();
        let broken = broken.to_str().unwrap().to_owned();
        let vm = vm.jailer_arg("--allow-open").jailer_arg(&broken);
        let mut machine = Machine::new(vm);
        machine.describe(&config);
        let drive = |id: &str, path: &str| json!({"drive_id": id, "path_on_host": path, "is_root_device": false});
        for (path, body, words) in [
            (
                "/machine-config",
                json!({"vcpu_count": 33, "mem_size_mib": 128}),
                "1 to 32",
            ),
            (
                "/machine-config",
                json!({"vcpu_count": 1, "mem_size_mib": 0}),
                "mem_size_mib",
            ),
            (
                "/boot-source",
                json!({"kernel_image_path": "/nonexistent"}),
                "/nonexistent",
            ),
            (
                "/boot-source",
                json!({"kernel_image_path": ""}),
                "kernel_image_path",
            ),
            ("/drives/a", drive("a", "/nonexistent"), "/nonexistent"),
            ("/drives/a", drive("b", "/nonexistent"), "about"),
            (
                "/drives/a",
                json!({"drive_id": "a", "is_root_device": false}),
                "socket",
            ),
            (
                "/network-interfaces/a",
                json!({"iface_id": "a", "host_dev_name": "no-such-tap0"}),
                "no-such-tap0",
            ),
            (
                "/vsock",
                json!({"guest_cid": 2, "uds_path": "/v"}),
                "guest_cid",
            ),
            ("/entropy", json!({"rate": 1}), "unknown field `rate`"),
            ("/nothing", json!({}), "no such operation"),
        ] {
            machine.put(path, body).assert_refused(words);
        }
        machine
            .patch("/machine-config", json!({"vcpu_count": 0}))
            .assert_refused("1 to 32");
        machine
            .patch("/machine-config", json!({"mem_size_mib": 64}))
            .assert_done();
        assert_eq!(machine.get("/machine-config")["mem_size_mib"], 64);
        // A kernel that is a file and no kernel is found out by the start, which can be tried again.
        machine
            .put("/boot-source", json!({"kernel_image_path": broken}))
            .assert_done();
        for _ in 0..2 {
            machine.act("InstanceStart").assert_refused(&broken);
        }
        assert_eq!(machine.get("/")["state"], "Not started");
        machine
            .put("/boot-source", config["boot-source"].clone())
            .assert_done();
        machine.start();
        machine.vm.wait().unwrap().assert_line("probe: boot ok");
    }
}

#[test]
fn a_name_that_was_not_granted_is_refused_with_the_flag_that_grants_it() {
    let vm = Vm::probe("");
    let disk = vm.path("disk");
    std::fs::write(&disk, [0; 512]).unwrap();
    let mut machine = Machine::new(vm);
    let body = json!({"drive_id": "a", "path_on_host": disk, "is_root_device": false});
    machine.put("/drives/a", body).assert_refused("--grant-rw");
    let body = json!({"iface_id": "a", "host_dev_name": "tap7"});
    machine
        .put("/network-interfaces/a", body)
        .assert_refused("--grant-tap");
    let body = json!({"guest_cid": 3, "uds_path": "/v.sock"});
    machine.put("/vsock", body).assert_done();
    machine.vm.signal(Signal::SIGTERM).unwrap();
    assert_eq!(machine.vm.wait().unwrap().code, exit::ENDED_BY_HOST);
}

#[test]
fn drives_come_from_requests_and_their_limits_change() {
    for jailed in [false, true] {
        let mut vm = Vm::probe("probe.task=blk").set("/x", json!(null));
        let disk = vm.path("disk");
        pattern_disk(&disk, 64).unwrap();
        if jailed {
            vm = vm
                .jailer_arg("--grant-ro")
                .jailer_arg(disk.to_str().unwrap());
        } else {
            vm = vm.unjailed();
        }
        let config = vm.config().clone();
        let mut machine = Machine::new(vm);
        machine.describe(&config);
        // Put twice: the second is the one that counts.
        for (id, read_only) in [("data", true), ("data", true)] {
            let path = format!("/drives/{id}");
            let body = json!({"drive_id": id, "path_on_host": disk, "is_root_device": false, "is_read_only": read_only});
            machine.put(&path, body).assert_done();
        }
        machine.start();
        let done = machine.vm.wait().unwrap();
        done.assert_line("probe: drive data sectors 64 read-only true");
        done.assert_line("probe: blk ok");
    }
}

#[test]
fn a_running_drive_gets_new_limits() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    pattern_disk(&disk, 64).unwrap();
    let vm = Vm::probe("probe.task=spin").unjailed();
    let config = vm.config().clone();
    let mut machine = Machine::new(vm);
    machine.describe(&config);
    let body = json!({"drive_id": "a", "path_on_host": disk, "is_root_device": false});
    machine.put("/drives/a", body).assert_done();
    machine.start();
    machine.vm.wait_for_line("probe: spin").unwrap();
    let ops = json!({"size": 10, "one_time_burst": null, "refill_time": 100});
    let limiter = json!({"ops": ops, "bandwidth": {"size": 0, "refill_time": 0}});
    let update = json!({"drive_id": "a", "rate_limiter": limiter});
    machine.patch("/drives/a", update).assert_done();
    let shown = machine.get("/vm/config");
    let expected = json!({"bandwidth": null, "ops": ops});
    assert_eq!(shown["drives"][0]["rate_limiter"], expected);
    machine.kill();
}

/// CPU time of the process so far, in clock ticks.
fn cpu_time(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields = stat.rsplit(')').next().unwrap();
    let fields: Vec<u64> = fields
        .split_whitespace()
        .map(|field| field.parse().unwrap_or(0))
        .collect();
    fields[11] + fields[12]
}

#[test]
fn a_paused_guest_runs_no_instruction() {
    for vm in both(|| Vm::probe("probe.task=spin")) {
        let jailed = vm.name().to_owned();
        let config = vm.config().clone();
        let mut machine = Machine::new(vm);
        machine.describe(&config);
        machine.start();
        machine.vm.wait_for_line("probe: spin").unwrap();
        let vmm = machine.vm.vmm_pid().unwrap();
        for _ in 0..2 {
            machine
                .patch("/vm", json!({"state": "Paused"}))
                .assert_done();
            assert_eq!(machine.get("/")["state"], "Paused", "{jailed}");
            let before = cpu_time(vmm);
            std::thread::sleep(std::time::Duration::from_millis(500));
            let spent = cpu_time(vmm) - before;
            assert!(spent < 20, "{spent} ticks while it was paused");
            machine
                .patch("/vm", json!({"state": "Resumed"}))
                .assert_done();
            assert_eq!(machine.get("/")["state"], "Running");
            // It spins again: this ends only if it does.
            let before = cpu_time(vmm);
            while cpu_time(vmm) < before + 20 {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
        machine
            .patch("/vm", json!({"state": "Stopped"}))
            .assert_refused("Stopped");
        machine.kill();
    }
}

#[test]
fn metrics_and_log_go_where_requests_say() {
    let vm = Vm::probe("probe.task=spin").unjailed();
    let (config, metrics, log) = (vm.config().clone(), vm.path("metrics"), vm.path("log"));
    let mut machine = Machine::new(vm);
    machine.describe(&config);
    let body = json!({"log_path": log, "level": "Info", "show_level": true});
    machine.put("/logger", body).assert_done();
    let body = json!({"metrics_path": metrics});
    machine.put("/metrics", body.clone()).assert_done();
    machine.put("/metrics", body).assert_refused("already");
    machine.start();
    machine.vm.wait_for_line("probe: spin").unwrap();
    machine.act("FlushMetrics").assert_done();
    let text = std::fs::read_to_string(&metrics).unwrap();
    let line: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert!(line.is_object(), "{text}");
    machine.act("FlushMetrics").assert_done();
    assert_eq!(
        std::fs::read_to_string(&metrics).unwrap().lines().count(),
        2
    );
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(said.contains(":INFO] kernel:"), "{said}");
    machine.kill();
}

#[test]
fn requests_and_what_devices_move_are_counted() {
    let vm = Vm::probe("probe.task=blk").unjailed();
    let (disk, lines) = (vm.path("disk"), tempfile::NamedTempFile::new().unwrap());
    pattern_disk(&disk, 64).unwrap();
    let config = vm.config().clone();
    let mut machine = Machine::new(vm);
    machine.describe(&config);
    machine
        .put("/metrics", json!({ "metrics_path": lines.path() }))
        .assert_done();
    machine
        .put(
            "/drives/none",
            json!({ "drive_id": "none", "path_on_host": "/nonexistent", "is_root_device": false }),
        )
        .assert_refused("/nonexistent");
    let drive = json!({ "drive_id": "data", "path_on_host": disk, "is_root_device": false });
    machine.put("/drives/data", drive).assert_done();
    machine.start();
    machine.vm.wait().unwrap().assert_line("probe: blk ok");
    let lines = std::fs::read_to_string(lines.path()).unwrap();
    let line: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(line["put_api_requests"]["drive_count"], 2, "{line}");
    assert_eq!(line["put_api_requests"]["drive_fails"], 1, "{line}");
    for (section, counter) in [
        ("block", "read_bytes"),
        ("block_data", "read_count"),
        ("uart", "write_count"),
        ("i8042", "reset_count"),
    ] {
        assert!(
            line[section][counter].as_u64() > Some(0),
            "{section}.{counter}: {line}"
        );
    }
}

/// As Firecracker's clients expect it; a guest that shall shut down is asked by `SendCtrlAltDel`.
#[test]
fn a_machine_that_a_request_started_ends_at_the_first_signal() {
    for vm in both(|| Vm::probe("probe.task=spin")) {
        let config = vm.config().clone();
        let mut machine = Machine::new(vm);
        machine.describe(&config);
        machine.start();
        machine.vm.wait_for_line("probe: spin").unwrap();
        let told = std::time::Instant::now();
        machine.vm.signal(Signal::SIGTERM).unwrap();
        assert_eq!(machine.vm.wait().unwrap().code, exit::ENDED_BY_HOST);
        // Not after the time that a guest from a config file has to shut down.
        assert!(told.elapsed().as_secs() < 4, "{:?}", told.elapsed());
    }
}

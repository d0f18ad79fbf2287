//! What requests change of a machine that runs, behind every wall.

use casemate_tests::{Machine, Netns, Vm, pattern_disk};
use serde_json::json;

#[test]
fn every_device_takes_its_changes() {
    let netns = Netns::with_tap(None);
    let vm = Vm::probe("probe.task=spin");
    let [first, second, pmem] = ["first", "second", "pmem"].map(|name| vm.path(name));
    pattern_disk(&first, 64).unwrap();
    pattern_disk(&second, 128).unwrap();
    pattern_disk(&pmem, 4096).unwrap();
    let vm = vm
        .drive("a", &first, false)
        .pmem("p", &pmem, false)
        .net("tap0", "06:00:ac:10:00:02")
        .jailer_arg("--netns")
        .jailer_arg(&netns.path())
        .jailer_arg("--grant-rw")
        .jailer_arg(second.to_str().unwrap())
        .set("/machine-config/max_vcpu_count", json!(2));
    let config = vm.config().clone();
    let mut machine = Machine::new(vm);
    machine.describe(&config);
    for (path, body) in [
        ("/drives/a", config["drives"][0].clone()),
        ("/pmem/p", config["pmem"][0].clone()),
        (
            "/network-interfaces/eth0",
            config["network-interfaces"][0].clone(),
        ),
        (
            "/balloon",
            json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 }),
        ),
        (
            "/mmds/config",
            json!({ "network_interfaces": ["eth0"], "version": "V2" }),
        ),
        ("/mmds", json!({ "a": 1 })),
    ] {
        machine.put(path, body).assert_done();
    }
    machine.start();
    machine.vm.wait_for_line("probe: spin").unwrap();

    let limiter = json!({ "bandwidth": { "size": 1000, "one_time_burst": null, "refill_time": 100 }, "ops": null });
    for (path, body) in [
        (
            "/drives/a",
            json!({ "drive_id": "a", "path_on_host": second, "rate_limiter": limiter }),
        ),
        ("/pmem/p", json!({ "id": "p", "rate_limiter": limiter })),
        (
            "/network-interfaces/eth0",
            json!({ "iface_id": "eth0", "rx_rate_limiter": limiter, "tx_rate_limiter": limiter }),
        ),
        ("/balloon", json!({ "amount_mib": 16 })),
        (
            "/balloon/statistics",
            json!({ "stats_polling_interval_s": 2 }),
        ),
        ("/mmds", json!({ "a": null, "b": { "c": 2 } })),
        ("/hotplug/vcpus", json!({ "vcpu_count": 2 })),
    ] {
        machine.patch(path, body).assert_done();
    }
    let shown = machine.get("/vm/config");
    for (place, expected) in [
        ("/drives/0/path_on_host", json!(second)),
        ("/drives/0/rate_limiter", limiter.clone()),
        ("/pmem/0/rate_limiter", limiter.clone()),
        ("/network-interfaces/0/rx_rate_limiter", limiter.clone()),
        ("/network-interfaces/0/tx_rate_limiter", limiter),
        ("/balloon/amount_mib", json!(16)),
        ("/balloon/stats_polling_interval_s", json!(2)),
    ] {
        assert_eq!(shown.pointer(place), Some(&expected), "{place}: {shown}");
    }
    assert_eq!(machine.get("/mmds"), json!({ "b": { "c": 2 } }));
    assert_eq!(machine.get("/hotplug/vcpus")["vcpu_count"], 2);
    for (path, body) in [
        ("/drives/b", json!({ "drive_id": "b" })),
        ("/pmem/q", json!({ "id": "q", "rate_limiter": {} })),
        ("/network-interfaces/eth1", json!({ "iface_id": "eth1" })),
        ("/hotplug/vcpus", json!({ "vcpu_count": 3 })),
        ("/balloon", json!({ "amount_mib": 4096 })),
    ] {
        assert_eq!(machine.patch(path, body).status, 400, "{path}");
    }
    machine.kill();
}

/// Whoever still has the file open, the lock is not this machine's any more: another one writes to it. What the
/// machine has by another drive is not given to it twice.
#[test]
fn a_replaced_image_is_free_for_another_machine() {
    for jailed in [false, true] {
        for engine in ["Sync", "Async"] {
            let vm = Vm::probe("probe.task=spin");
            let [first, second, other] = ["first", "second", "other"].map(|name| vm.path(name));
            for path in [&first, &second, &other] {
                pattern_disk(path, 64).unwrap();
            }
            let mut vm = vm
                .drive("a", &first, false)
                .set("/drives/0/io_engine", json!(engine))
                .drive("b", &other, false)
                .may_open(&second);
            if !jailed {
                vm = vm.unjailed();
            }
            let config = vm.config().clone();
            let mut machine = Machine::new(vm);
            machine.describe(&config);
            for (name, at) in [("a", 0), ("b", 1)] {
                let body = config["drives"][at].clone();
                machine.put(&format!("/drives/{name}"), body).assert_done();
            }
            machine.start();
            machine.vm.wait_for_line("probe: spin").unwrap();
            let write = |path| {
                let vm = Vm::probe("probe.task=blk probe.write=1").drive("a", path, false);
                vm.run().unwrap()
            };
            for (path, free) in [(&second, &first), (&first, &second)] {
                let to = |path| json!({ "drive_id": "a", "path_on_host": path });
                machine.patch("/drives/a", to(path)).assert_done();
                machine
                    .patch("/drives/a", to(&other))
                    .assert_refused("used twice");
                write(free).assert_line("probe: blk ok");
                for used in [path, &other] {
                    assert!(
                        write(used).stderr.contains("another machine uses"),
                        "{jailed} {engine}"
                    );
                }
            }
            machine.kill();
        }
    }
}

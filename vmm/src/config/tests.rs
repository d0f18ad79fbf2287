//! What a config may say, and the words with which another one is refused.

use super::*;
use crate::boot::Protocol;

/// A config with a `machine-config`, a `boot-source` and whatever else.
fn with(extra: &str) -> String {
    format!(
        r#"{{"boot-source":{{"kernel_image_path":"/k"}},
            "machine-config":{{"vcpu_count":1,"mem_size_mib":128}}{extra}}}"#
    )
}

fn machine(fields: &str) -> String {
    format!(r#"{{"boot-source":{{"kernel_image_path":"/k"}},"machine-config":{{{fields}}}}}"#)
}

#[track_caller]
fn refused(text: &str) -> String {
    let error = Config::from_json(text.as_bytes())
        .expect_err(text)
        .to_string();
    assert!(!error.contains('\n'), "one line: {error}");
    error
}

#[track_caller]
fn refused_with(text: &str, parts: &[&str]) {
    let error = refused(text);
    for part in parts {
        assert!(error.contains(part), "{part:?} in {error:?}");
    }
}

#[test]
fn reads_firecrackers_schema() {
    let text = r#"{
        "boot-source": {"kernel_image_path": "/k", "boot_args": "console=ttyS0", "initrd_path": "/i", "protocol": "pvh"},
        "machine-config": {"vcpu_count": 32, "mem_size_mib": 1, "smt": false, "track_dirty_pages": false, "huge_pages": "None", "pit": true},
        "drives": [
            {"drive_id": "data", "path_on_host": "/d", "is_root_device": false, "is_read_only": true, "io_engine": "Sync", "cache_type": "Writeback"},
            {"drive_id": "root", "path_on_host": "/r", "is_root_device": true, "partuuid": null}
        ],
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:AC:10:00:02", "mtu": 1400}],
        "vsock": {"guest_cid": 3, "uds_path": "/v.sock", "vsock_id": "x"},
        "entropy": {},
        "balloon": null
    }"#;
    let config = Config::from_json(text.as_bytes()).unwrap();
    assert_eq!(config.device_count(), 5);
    assert_eq!(config.memory_size(), 1 << 20);
    assert_eq!(config.boot_source.protocol, Some(Protocol::Pvh));
    let order: Vec<_> = config
        .drives_in_order()
        .map(|d| d.drive_id.as_str())
        .collect();
    assert_eq!(order, ["root", "data"]);
    assert_eq!(
        config.network_interfaces[0].guest_mac.unwrap().0,
        [6, 0, 0xac, 0x10, 0, 2]
    );
}

#[test]
fn refuses_what_it_does_not_know() {
    refused_with(
        &with(r#","drivez":[]"#),
        &["unknown field `drivez`", "line 2"],
    );
    refused_with(
        &machine(r#""vcpu_count":1,"mem_size_mib":1,"cpus":2"#),
        &["unknown field `cpus`", "vcpu_count"],
    );
    refused_with(
        &with(r#","vsock":{"guest_cid":3,"uds_path":"/v","x":1}"#),
        &["unknown field `x`"],
    );
    refused_with(&with(r#","entropy":{"x":1}"#), &["unknown field `x`"]);
    refused_with(
        r#"{"machine-config":{"vcpu_count":1,"mem_size_mib":1}}"#,
        &["missing field `boot-source`"],
    );
    for garbage in ["", "[", "{}", "null", "\u{0}", r#"{"boot-source":[]}"#] {
        refused(garbage);
    }
    refused(&"[".repeat(100_000));
}

#[test]
fn bounds_cpus_and_memory() {
    for count in ["0", "33", "255"] {
        refused_with(
            &machine(&format!(r#""vcpu_count":{count},"mem_size_mib":1"#)),
            &["machine-config.vcpu_count", count, "1 to 32"],
        );
    }
    for count in ["-1", "256", "1.5", "\"1\""] {
        refused(&machine(&format!(
            r#""vcpu_count":{count},"mem_size_mib":1"#
        )));
    }
    for size in ["0", "16777217", "18446744073709551615"] {
        refused_with(
            &machine(&format!(r#""vcpu_count":1,"mem_size_mib":{size}"#)),
            &["machine-config.mem_size_mib", size],
        );
    }
}

#[test]
fn vcpus_may_be_added_up_to_a_bound() {
    let with = |most: &str| machine(&format!(r#""vcpu_count":2,"mem_size_mib":1{most}"#));
    let config = |most| Config::from_json(with(most).as_bytes()).unwrap();
    let fixed = config("").machine_config;
    assert_eq!((fixed.max_vcpu_count, fixed.max_vcpus()), (None, 2));
    let least = config(r#","max_vcpu_count":2"#).machine_config;
    assert_eq!((least.max_vcpu_count, least.max_vcpus()), (Some(2), 2));
    let most = config(r#","max_vcpu_count":32"#).machine_config;
    assert_eq!((most.vcpu_count, most.max_vcpus()), (2, 32));
    for count in ["1", "33"] {
        refused_with(
            &with(&format!(r#","max_vcpu_count":{count}"#)),
            &["machine-config.max_vcpu_count", count, "`vcpu_count` to 32"],
        );
    }
}

#[test]
fn knows_engines_queues_and_layers_of_drives() {
    let drive = |fields: &str| {
        with(&format!(
            r#","drives":[{{"drive_id":"a","path_on_host":"/a",{fields}}}]"#
        ))
    };
    for good in [
        r#""io_engine":"Sync""#,
        r#""io_engine":"Async","queues":8"#,
        r#""io_engine":"Auto","queues":1"#,
        r#""copy_on_write":{"path_on_host":"/b","size_mib":1}"#,
    ] {
        Config::from_json(drive(good).as_bytes()).unwrap();
    }
    for (bad, field) in [
        (r#""queues":0"#, "drives[].queues"),
        (r#""queues":9"#, "drives[].queues"),
        (
            r#""copy_on_write":{"path_on_host":"","size_mib":1}"#,
            "copy_on_write.path_on_host",
        ),
        (
            r#""copy_on_write":{"path_on_host":"/a","size_mib":1}"#,
            "used twice",
        ),
        (
            r#""copy_on_write":{"path_on_host":"/b","size_mib":0}"#,
            "copy_on_write.size_mib",
        ),
        (
            r#""is_read_only":true,"copy_on_write":{"path_on_host":"/b","size_mib":1}"#,
            "drives[].copy_on_write",
        ),
    ] {
        refused_with(&drive(bad), &[field]);
    }
}

#[test]
fn knows_devices_that_another_process_works_for() {
    let shares = |extra: &str| {
        let config = Config::from_json(with(extra).as_bytes()).unwrap();
        (config.shares_memory(), config.device_count())
    };
    assert_eq!(shares(""), (false, 0));
    let drive = r#","drives":[{"drive_id":"a","socket":"/a"}]"#;
    assert_eq!(shares(drive), (true, 1));
    let fs = r#","fs":[{"tag":"a","socket":"/a"},{"tag":"b","socket":"/b"}]"#;
    assert_eq!(shares(fs), (true, 2));
    for (bad, field) in [
        (r#"{"tag":"","socket":"/a"}"#, "fs[].tag"),
        (r#"{"tag":"a b","socket":"/a"}"#, "fs[].tag"),
        (r#"{"tag":"a","socket":""}"#, "fs[].socket"),
        (
            r#"{"tag":"a","socket":"/a"},{"tag":"a","socket":"/b"}"#,
            "used twice",
        ),
        (
            r#"{"tag":"a","socket":"/a"},{"tag":"b","socket":"/a"}"#,
            "used twice",
        ),
    ] {
        refused_with(&with(&format!(r#","fs":[{bad}]"#)), &[field]);
    }
    let long = format!(r#","fs":[{{"tag":"{}","socket":"/a"}}]"#, "a".repeat(37));
    refused_with(&with(&long), &["fs[].tag"]);
}

#[test]
fn refuses_two_of_one_name() {
    refused_with(
        &with(
            r#","drives":[{"drive_id":"a","path_on_host":"/1"},{"drive_id":"a","path_on_host":"/2"}]"#,
        ),
        &["two drives", "\"a\""],
    );
    refused_with(
        &with(
            r#","drives":[{"drive_id":"a","path_on_host":"/1"},{"drive_id":"b","path_on_host":"/1"}]"#,
        ),
        &["path_on_host", "\"/1\"", "twice"],
    );
    refused_with(
        &with(
            r#","drives":[{"drive_id":"a","path_on_host":"/1","is_root_device":true},{"drive_id":"b","path_on_host":"/2","is_root_device":true}]"#,
        ),
        &["is_root_device"],
    );
    refused_with(
        &with(
            r#","network-interfaces":[{"iface_id":"a","host_dev_name":"t"},{"iface_id":"a","host_dev_name":"u"}]"#,
        ),
        &["two network-interfaces"],
    );
    refused_with(
        &with(
            r#","network-interfaces":[{"iface_id":"a","host_dev_name":"t"},{"iface_id":"b","host_dev_name":"t"}]"#,
        ),
        &["host_dev_name", "twice"],
    );
    refused_with(
        &with(r#","network-interfaces":[{"iface_id":"a"}]"#),
        &["host_dev_name", "`socket`"],
    );
    refused_with(
        &with(r#","network-interfaces":[{"iface_id":"a","host_dev_name":"t","socket":"s"}]"#),
        &["host_dev_name", "`socket`"],
    );
    refused_with(
        &with(r#","network-interfaces":[{"iface_id":"a","socket":"s","queues":2}]"#),
        &["socket", "one pair"],
    );
    refused_with(
        &with(r#","network-interfaces":[{"iface_id":"a","socket":"s","rx_rate_limiter":{}}]"#),
        &["socket", "rate limiter"],
    );
    refused_with(
        &with(
            r#","network-interfaces":[{"iface_id":"a","socket":"s"}],"mmds-config":{"network_interfaces":["a"]}"#,
        ),
        &["mmds-config", "back-end"],
    );
}

#[test]
fn refuses_bad_ids_and_values() {
    for id in ["", "a/b", "..", "a b", "é", &"x".repeat(65)] {
        refused_with(
            &with(&format!(
                r#","drives":[{{"drive_id":"{id}","path_on_host":"/1"}}]"#
            )),
            &["drive_id"],
        );
    }
    for path in ["", "a\\u0000b", "a\\nb"] {
        refused_with(
            &with(&format!(
                r#","drives":[{{"drive_id":"a","path_on_host":"{path}"}}]"#
            )),
            &["path_on_host"],
        );
    }
    for mac in [
        "",
        "06:00:ac:10:00",
        "06:00:ac:10:00:02:03",
        "+6:00:ac:10:00:02",
        "0g:00:ac:10:00:02",
        "01:00:5e:00:00:01",
    ] {
        refused_with(
            &with(&format!(
                r#","network-interfaces":[{{"iface_id":"a","host_dev_name":"t","guest_mac":"{mac}"}}]"#
            )),
            &["address"],
        );
    }
    refused_with(
        &with(r#","network-interfaces":[{"iface_id":"a","host_dev_name":"t","mtu":67}]"#),
        &["mtu", "67"],
    );
    for cid in ["0", "2", "4294967295", "18446744073709551615"] {
        refused_with(
            &with(&format!(
                r#","vsock":{{"guest_cid":{cid},"uds_path":"/v"}}"#
            )),
            &["vsock.guest_cid", cid],
        );
    }
    refused_with(
        r#"{"boot-source":{"kernel_image_path":"/k","boot_args":"a\u0000b"},"machine-config":{"vcpu_count":1,"mem_size_mib":1}}"#,
        &["boot_args"],
    );
}

#[test]
fn counts_interrupt_pins() {
    let drives = |count: usize| {
        let drives: Vec<_> = (0..count)
            .map(|n| format!(r#"{{"drive_id":"d{n}","path_on_host":"/{n}"}}"#))
            .collect();
        with(&format!(
            r#","entropy":{{}},"drives":[{}]"#,
            drives.join(",")
        ))
    };
    assert!(Config::from_json(drives(17).as_bytes()).is_ok());
    assert!(matches!(
        Config::from_json(drives(18).as_bytes()),
        Err(Error::NotEnoughInterruptPins {
            wanted: 19,
            available: 18
        })
    ));
}

/// What `GET /vm/config` shows: Firecracker's fields and no others, unless they were used.
#[test]
fn is_written_as_it_is_read() {
    let empty = serde_json::to_value(Config::default()).unwrap();
    assert_eq!(
        empty,
        serde_json::json!({
            "balloon": null, "drives": [],
            "boot-source": {"kernel_image_path": "", "initrd_path": null, "boot_args": null},
            "cpu-config": null, "logger": null,
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 128, "smt": false,
                "track_dirty_pages": false, "huge_pages": "None"},
            "metrics": null, "mmds-config": null, "network-interfaces": [], "vsock": null,
            "entropy": null, "pmem": [], "memory-hotplug": null,
        })
    );
    let text = with(
        r#","drives":[{"drive_id":"a","path_on_host":"/a","discard":false,
            "rate_limiter":{"ops":{"size":1,"refill_time":2}}}],
        "network-interfaces":[{"iface_id":"a","host_dev_name":"t","guest_mac":"06:00:AC:10:00:02"}]"#,
    );
    let config = Config::from_json(text.as_bytes()).unwrap();
    let written = serde_json::to_value(&config).unwrap();
    let drive = serde_json::json!({
        "drive_id": "a", "partuuid": null, "is_root_device": false, "cache_type": "Unsafe",
        "is_read_only": false, "path_on_host": "/a", "io_engine": null, "socket": null,
        "rate_limiter": {"bandwidth": null, "ops": {"size": 1, "one_time_burst": null, "refill_time": 2}},
        "discard": false,
    });
    assert_eq!(written["drives"][0], drive);
    assert_eq!(
        written["network-interfaces"][0]["guest_mac"],
        "06:00:ac:10:00:02"
    );
    let again = Config::from_json(written.to_string().as_bytes()).unwrap();
    assert_eq!(serde_json::to_value(&again).unwrap(), written);
}

#[test]
fn memory_of_other_processes_does_not_grow() {
    let hotplug = r#","memory-hotplug":{"total_size_mib":128}"#;
    assert!(Config::from_json(with(hotplug).as_bytes()).is_ok());
    let shared = format!(r#"{hotplug},"fs":[{{"tag":"a","socket":"/a"}}]"#);
    refused_with(&with(&shared), &["memory-hotplug", "would not see"]);
}

#[test]
fn checks_what_is_refused_later_anyway() {
    let config = |change: fn(&mut Config)| {
        let mut config = Config::from_json(with("").as_bytes()).unwrap();
        change(&mut config);
        let error = config.check_devices().unwrap_err();
        error.to_string()
    };
    let balloon = Balloon {
        amount_mib: 129,
        deflate_on_oom: false,
        stats_polling_interval_s: 0,
        free_page_hinting: false,
        free_page_reporting: false,
    };
    let mut too_much = Config::from_json(with("").as_bytes()).unwrap();
    too_much.balloon = Some(balloon);
    let error = too_much.check_devices().unwrap_err().to_string();
    assert!(error.contains("balloon.amount_mib"), "{error}");
    let mmds = |network_interfaces: &[&str], address: &str| MmdsConfig {
        version: MmdsVersion::V2,
        network_interfaces: network_interfaces.iter().map(|id| (*id).into()).collect(),
        ipv4_address: Some(address.parse().unwrap()),
        imds_compat: false,
    };
    let cards: [NetworkInterface; 1] =
        [serde_json::from_str(r#"{"iface_id":"a","host_dev_name":"t"}"#).unwrap()];
    assert!(mmds(&["a"], "169.254.7.7").check(&cards).is_ok());
    for wrong in [
        mmds(&["b"], "169.254.7.7"),
        mmds(&[], "169.254.7.7"),
        mmds(&["a"], "169.254.0.7"),
        mmds(&["a"], "10.0.0.1"),
    ] {
        assert!(wrong.check(&cards).is_err(), "{wrong:?}");
    }
    let hotplug = |total_size_mib, block_size_mib, slot_size_mib| MemoryHotplug {
        total_size_mib,
        block_size_mib,
        slot_size_mib,
        requested_size_mib: 0,
    };
    assert!(hotplug(1024, 2, 128).check().is_ok());
    for (total, block, slot) in [
        (0, 2, 128),
        (1024, 3, 128),
        (1024, 1, 128),
        (1024, 2, 64),
        (1000, 2, 128),
        (1024, 256, 128),
        (65536 + 128, 2, 128),
    ] {
        assert!(hotplug(total, block, slot).check().is_err());
    }
    for (requested, fits) in [(1024, true), (64, true), (63, false), (1026, false)] {
        let config = MemoryHotplug {
            requested_size_mib: requested,
            ..hotplug(1024, 2, 128)
        };
        assert_eq!(config.check().is_ok(), fits, "{requested}");
    }
    let both = config(|config| {
        let drive = r#"{"drive_id":"a","path_on_host":"/a","is_root_device":true}"#;
        let pmem = r#"{"id":"p","path_on_host":"/p","root_device":true}"#;
        config.drives.push(serde_json::from_str(drive).unwrap());
        config.pmem.push(serde_json::from_str(pmem).unwrap());
    });
    assert!(both.contains("\"a\" and \"p\""), "{both}");
    let neither = config(|config| {
        let drive = r#"{"drive_id":"a"}"#;
        config.drives.push(serde_json::from_str(drive).unwrap());
    });
    assert!(neither.contains("`socket`"), "{neither}");
}

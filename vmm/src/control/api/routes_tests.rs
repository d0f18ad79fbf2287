use super::*;

fn ask(method: Method, path: &str, body: &str) -> Result<Route, Error> {
    route(method, path, body.as_bytes())
}

#[track_caller]
fn refused(method: Method, path: &str, body: &str) -> String {
    ask(method, path, body)
        .expect_err(&format!("{path} {body}"))
        .to_string()
}

#[test]
fn every_path_has_its_action() {
    use Method::{Delete, Get, Patch, Put};
    let drive = r#"{"drive_id":"a","path_on_host":"/a","is_root_device":false}"#;
    let net = r#"{"iface_id":"a","host_dev_name":"t"}"#;
    let pmem = r#"{"id":"a","path_on_host":"/a"}"#;
    let load = r#"{"snapshot_path":"/s","mem_backend":{"backend_path":"/m","backend_type":"File"},"resume_vm":true}"#;
    for (method, path, body, expected) in [
        (Get, "/", "", "GetInstance"),
        (Get, "", "", "GetInstance"),
        (Get, "/version", "", "GetVersion"),
        (Get, "/vm/config", "", "GetConfig"),
        (Get, "/machine-config/", "", "GetMachineConfig"),
        (Get, "/mmds", "", "Mmds(Get)"),
        (Get, "/balloon", "", "Balloon(Get)"),
        (Get, "/balloon/statistics", "", "Balloon(GetStatistics)"),
        (
            Get,
            "/balloon/hinting/status",
            "",
            "Balloon(GetHintingStatus)",
        ),
        (Get, "/hotplug/memory", "", "MemoryHotplug(Get)"),
        (Get, "/hotplug/vcpus", "", "GetVcpus"),
        (
            Put,
            "/actions",
            r#"{"action_type":"InstanceStart"}"#,
            "InstanceStart",
        ),
        (
            Put,
            "/actions",
            r#"{"action_type":"FlushMetrics"}"#,
            "FlushMetrics",
        ),
        (
            Put,
            "/actions",
            r#"{"action_type":"SendCtrlAltDel"}"#,
            "SendCtrlAltDel",
        ),
        (
            Put,
            "/boot-source",
            r#"{"kernel_image_path":"/k"}"#,
            "PutBootSource(",
        ),
        (
            Put,
            "/machine-config",
            r#"{"vcpu_count":1,"mem_size_mib":2}"#,
            "PutMachineConfig(",
        ),
        (Put, "/cpu-config", "{}", "PutCpuConfig("),
        (Put, "/drives/a", drive, "PutDrive("),
        (Put, "/pmem/a", pmem, "PutPmem("),
        (Put, "/network-interfaces/a", net, "PutNetworkInterface("),
        (
            Put,
            "/vsock",
            r#"{"guest_cid":3,"uds_path":"/v"}"#,
            "PutVsock(",
        ),
        (Put, "/entropy", "{}", "PutEntropy("),
        (Put, "/serial", "{}", "PutSerial("),
        (Put, "/logger", r#"{"level":"warning"}"#, "PutLogger("),
        (Put, "/metrics", r#"{"metrics_path":"/m"}"#, "PutMetrics("),
        (
            Put,
            "/balloon",
            r#"{"amount_mib":1,"deflate_on_oom":true}"#,
            "PutBalloon(",
        ),
        (
            Put,
            "/hotplug/memory",
            r#"{"total_size_mib":128}"#,
            "PutMemoryHotplug(",
        ),
        (Put, "/mmds", r#"{"a":1}"#, "Mmds(Put("),
        (
            Put,
            "/mmds/config",
            r#"{"version":"V2","network_interfaces":["a"]}"#,
            "PutMmdsConfig(",
        ),
        (
            Put,
            "/snapshot/create",
            r#"{"snapshot_path":"/s","mem_file_path":"/m"}"#,
            "CreateSnapshot",
        ),
        (Put, "/snapshot/load", load, "LoadSnapshot"),
        (Patch, "/vm", r#"{"state":"Paused"}"#, "Pause"),
        (Patch, "/vm", r#"{"state":"Resumed"}"#, "Resume"),
        (
            Patch,
            "/machine-config",
            r#"{"smt":false}"#,
            "PatchMachineConfig(",
        ),
        (Patch, "/drives/a", r#"{"drive_id":"a"}"#, "PatchDrive("),
        (Patch, "/pmem/a", r#"{"id":"a"}"#, "PatchPmem("),
        (
            Patch,
            "/network-interfaces/a",
            r#"{"iface_id":"a"}"#,
            "PatchNetworkInterface(",
        ),
        (Patch, "/balloon", r#"{"amount_mib":1}"#, "Balloon(Patch("),
        (
            Patch,
            "/balloon/statistics",
            r#"{"stats_polling_interval_s":1}"#,
            "Balloon(PatchStatistics(",
        ),
        (
            Patch,
            "/balloon/hinting/start",
            "",
            "Balloon(StartHinting(StartHinting { acknowledge_on_stop: true",
        ),
        (
            Patch,
            "/balloon/hinting/start",
            r#"{"acknowledge_on_stop":false}"#,
            "Balloon(StartHinting(StartHinting { acknowledge_on_stop: false",
        ),
        (Patch, "/balloon/hinting/stop", "", "Balloon(StopHinting)"),
        (
            Patch,
            "/hotplug/memory",
            r#"{"requested_size_mib":1}"#,
            "MemoryHotplug(Patch(",
        ),
        (
            Patch,
            "/hotplug/vcpus",
            r#"{"vcpu_count":1}"#,
            "PatchVcpus(",
        ),
        (Patch, "/mmds", "{}", "Mmds(Patch("),
        (Delete, "/drives/a", "", r#"Remove(Drive("a"))"#),
        (Delete, "/pmem/a", "", r#"Remove(Pmem("a"))"#),
        (Delete, "/vsock", "", "Remove(Only(Vsock))"),
        (
            Delete,
            "/network-interfaces/a",
            "",
            r#"Remove(NetworkInterface("a"))"#,
        ),
    ] {
        let route = ask(method, path, body).expect(path);
        let found = format!("{:?}", route.action);
        assert!(found.starts_with(expected), "{path}: {found}");
        assert!(!route.deprecated, "{path}");
    }
}

#[test]
fn what_will_go_is_said() {
    for (path, body) in [
        (
            "/vsock",
            r#"{"vsock_id":"x","guest_cid":3,"uds_path":"/v"}"#,
        ),
        ("/mmds/config", r#"{"network_interfaces":["a"]}"#),
        (
            "/machine-config",
            r#"{"vcpu_count":1,"mem_size_mib":2,"cpu_template":"T2"}"#,
        ),
    ] {
        assert!(ask(Method::Put, path, body).unwrap().deprecated, "{path}");
    }
}

#[test]
fn everything_else_is_refused() {
    use Method::{Delete, Get, Patch, Put};
    for (method, path) in [
        (Get, "/nothing"),
        (Get, "/?x"),
        (Get, "/vm"),
        (Get, "/vm/config/x"),
        (Get, "//x"),
        (Get, "/drives/a"),
        (Get, "/a/b/c/d/e"),
        (Put, "/version"),
        (Put, "/snapshot"),
        (Put, "/snapshot/delete"),
        (Put, "/drives/a/b"),
        (Patch, "/actions"),
        (Delete, "/vsock/a"),
        (Delete, "/entropy"),
        (Delete, "/drives/a/b"),
    ] {
        let body = if matches!(method, Put | Patch) {
            "{}"
        } else {
            ""
        };
        let why = refused(method, path, body);
        assert!(why.contains("no such operation"), "{path}: {why}");
    }
    assert!(refused(Get, "/", "{}").contains("GET takes no body"));
    assert!(refused(Delete, "/drives/a", "{}").contains("DELETE takes no body"));
    assert!(refused(Put, "/entropy", "").contains("PUT needs a body"));
    for (path, body) in [("/vm", ""), ("/machine-config", "{}")] {
        assert!(refused(Patch, path, body).contains("PATCH needs a body"));
    }
    assert!(refused(Put, "/drives", "{}").contains("device's name"));
    assert!(refused(Delete, "/drives/", "").contains("device's name"));
    let drive = r#"{"drive_id":"b","path_on_host":"/a"}"#;
    assert!(refused(Put, "/drives/a", drive).contains(r#"about "a", and the body about "b""#));
    assert!(refused(Put, "/drives/a-b", drive).contains("a-b"));
    for (path, body, words) in [
        ("/entropy", r#"{"x":1}"#, "unknown field `x`"),
        ("/entropy", "{", "line 1"),
        ("/entropy", "\u{fffd}", "no JSON object"),
        ("/boot-source", "{}", "missing field `kernel_image_path`"),
        ("/actions", r#"{"action_type":"Explode"}"#, "Explode"),
        ("/vsock", r#"{"guest_cid":-1,"uds_path":"/v"}"#, "-1"),
    ] {
        let why = refused(Put, path, body);
        assert!(why.contains(words) && !why.contains('\n'), "{why}");
    }
    for (method, path, body) in [
        (Put, "/mmds", "[]"),
        (Patch, "/mmds", " null"),
        (Put, "/entropy", "[null]"),
    ] {
        let why = refused(method, path, body);
        assert!(why.contains("no JSON object"), "{path}: {why}");
    }
    refused(Put, "/entropy", r#"{"rate_limiter":[null,null]}"#);
    refused(Put, "/mmds", &format!(r#"{{"a":{}"#, "[".repeat(10_000)));
}

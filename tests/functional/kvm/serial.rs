//! The serial port's output in a file or a pipe, and its limit.

use casemate_tests::{ApiClient, Vm, exit};
use serde_json::{Value, json};

fn jailed_and_not(output: &str) -> [Vm; 2] {
    let vm = || Vm::probe("probe.task=rng").entropy();
    let jailed = vm();
    let path = jailed.path(output).to_str().unwrap().to_owned();
    [
        jailed.jailer_arg("--grant-append").jailer_arg(&path),
        vm().unjailed(),
    ]
}

#[test]
fn output_goes_to_a_file() {
    for vm in jailed_and_not("serial") {
        let output = vm.path("serial");
        let kept = tempfile::NamedTempFile::new().unwrap();
        std::fs::hard_link(kept.path(), &output).unwrap();
        let done = vm
            .set("/serial", json!({ "serial_out_path": output }))
            .run()
            .unwrap();
        assert_eq!(
            (done.code, &*done.stdout),
            (exit::GUEST_RESET, ""),
            "{done:#?}"
        );
        let text = std::fs::read_to_string(kept.path()).unwrap();
        assert!(text.contains("probe: rng ok\n"), "{text}");
    }
}

#[test]
fn a_limit_drops_what_is_beyond() {
    let limit =
        json!({ "rate_limiter": { "size": 4, "one_time_burst": 2, "refill_time": 3_600_000 } });
    let done = Vm::probe("probe.task=rng")
        .entropy()
        .set("/serial", limit)
        .run()
        .unwrap();
    assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
    assert_eq!(done.stdout, "probe:", "{done:#?}");
}

#[test]
fn a_request_names_the_file() {
    for vm in jailed_and_not("serial") {
        let (output, config) = (vm.path("serial"), vm.config().clone());
        let kept = tempfile::NamedTempFile::new().unwrap();
        std::fs::hard_link(kept.path(), &output).unwrap();
        let socket = vm.api_path();
        let running = vm.api().start().unwrap();
        let mut client = ApiClient::connect(&socket).unwrap();
        let mut put = |path: &str, body: &Value| client.ask("PUT", path, body).unwrap();
        put("/boot-source", &config["boot-source"]).assert_done();
        put("/entropy", &json!({})).assert_done();
        put("/serial", &json!({ "serial_out_path": "/nonexistent/x" }))
            .assert_refused("/nonexistent/x");
        put("/serial", &json!({ "serial_out_path": output })).assert_done();
        put("/actions", &json!({ "action_type": "InstanceStart" })).assert_done();
        let done = running.wait().unwrap();
        assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
        let text = std::fs::read_to_string(kept.path()).unwrap();
        assert!(text.contains("probe: rng ok\n"), "{text}");
    }
}

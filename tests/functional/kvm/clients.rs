//! Real clients drive the API, unmodified: schemathesis by our OpenAPI document, and Firecracker's Python SDK.
//! What they are and say is in `tests/clients`.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use casemate_tests::{ApiClient, Casemate, Finished, Netns, Running, Vm, bin, exit};
use nix::sys::signal::Signal;

/// A script of `tests/clients`, to be run by `command` and what follows in it.
fn script(mut command: Command, name: &str) -> Command {
    let python = std::env::var_os("CASEMATE_TEST_PYTHON").unwrap_or_else(|| {
        panic!(
            "CASEMATE_TEST_PYTHON is not set: start these tests with `cargo xtask test --tier kvm clients`, \
             or set it to the target/clients/bin/python that this makes"
        )
    });
    // No files beside the scripts, and each line as it comes.
    command.arg(python).args(["-B", "-u"]);
    command.arg(project().join("tests/clients").join(name));
    command
}

fn project() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}

/// Runs a script to its end, and shows what it says.
#[track_caller]
fn run(command: Command) -> Finished {
    let done = Running::start(command, None).and_then(Running::wait);
    let done = done.unwrap_or_else(|error| panic!("{error:#}"));
    println!("{}{}", done.stdout, done.stderr);
    assert_eq!(done.code, 0, "the script failed; it says why above");
    done
}

fn file(vm: &Vm, name: &str, size: u64) -> String {
    let path = vm.path(name);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(size).unwrap();
    path.display().to_string()
}

/// A jailed machine to be, with all that the examples of the OpenAPI document name; with a kernel only if it shall
/// be started.
fn granted(netns: &Netns, kernel: bool) -> Vm {
    let mut vm = Vm::probe("");
    let mut grants = vec![
        ("--netns", netns.path()),
        ("--grant-tap", "tap0".to_owned()),
    ];
    let mut grant = |option, name: &str, path: String| {
        grants.push((option, format!("{name}={path}")));
    };
    if kernel {
        let probe = bin("casemate-probe").display().to_string();
        grant("--grant-ro", "/images/vmlinux", probe);
    }
    grant("--grant-rw", "/images/root.img", file(&vm, "root", 1 << 20));
    grant(
        "--grant-rw",
        "/images/other.img",
        file(&vm, "other", 1 << 20),
    );
    grant(
        "--grant-ro",
        "/images/tools.img",
        file(&vm, "tools", 2 << 20),
    );
    let new = |name| vm.path(name).display().to_string();
    grant("--grant-listen", "/run/vsock", new("vsock"));
    grant("--grant-append", "/logs/vm.log", new("log"));
    grant("--grant-append", "/logs/vm.metrics", new("metrics"));
    grant("--grant-append", "/logs/vm.console", new("console"));
    for (option, value) in grants {
        vm = vm.jailer_arg(option).jailer_arg(&value);
    }
    vm.api()
}

#[track_caller]
fn conforms(state: &str, transport: &str) {
    let netns = Netns::with_tap(None);
    let mut vm = granted(&netns, state == "after");
    if transport == "pci" {
        vm = vm.pci();
    }
    let socket = vm.api_path();
    let place = vm.dir().to_owned();
    let machine = vm.start().unwrap();
    // It is there.
    ApiClient::connect(&socket).unwrap();
    let mut command = script(Command::new("env"), "conformance.py");
    // Where schemathesis finds no settings, and leaves what it keeps of a run.
    command.current_dir(place);
    command
        .arg("--document")
        .arg(project().join("docs/openapi.yaml"));
    command.arg("--socket").arg(&socket);
    command.args(["--state", state, "--transport", transport]);
    command.args(["--guest-args", "idle"]);
    if std::env::var_os("CASEMATE_LAB").is_some() {
        // Python, too, is emulated there.
        command.arg("--brief");
    }
    run(command).assert_line(&format!("conformance on {transport} {state} the start ok"));
    machine.signal(Signal::SIGTERM).unwrap();
    assert_eq!(machine.wait().unwrap().code, exit::ENDED_BY_HOST);
}

#[test]
fn schemathesis_finds_each_answer_as_documented_before_the_start() {
    conforms("before", "mmio");
}

#[test]
fn schemathesis_finds_each_answer_as_documented_after_the_start_on_mmio() {
    conforms("after", "mmio");
}

#[test]
fn schemathesis_finds_each_answer_as_documented_after_the_start_on_pci() {
    conforms("after", "pci");
}

/// In namespaces of its own: the SDK makes files in `/var/lib`, taps and nftables rules.
#[test]
fn firecrackers_python_sdk_configures_starts_pauses_inspects_and_stops_a_machine() {
    let netns = Netns::with_tap(Some("10.200.0.1/24"));
    netns.route_by("10.200.0.2");
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let (disk, scratch) = (dir.path().join("disk.img"), dir.path().join("scratch"));
    std::fs::write(&disk, [0; 4096]).unwrap();
    std::fs::create_dir(&scratch).unwrap();
    // With its processes, whatever becomes of the script.
    let mut command = netns.command("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    let mut command = script(command, "sdk.py");
    command.arg("--vmm").arg(bin("casemate-vmm"));
    command.arg("--kernel").arg(bin("casemate-probe"));
    command.arg("--disk").arg(&disk);
    command.arg("--scratch").arg(&scratch);
    run(command).assert_line("sdk ok");
}

/// What `casemate metrics` makes of a VMM's lines, as Prometheus reads it.
#[test]
fn prometheus_reads_the_metrics() {
    let vm = Vm::probe("probe.task=rng").entropy().unjailed();
    let dir = tempfile::tempdir().unwrap();
    let kept = dir.path().join("metrics");
    let vm = vm.vmm_arg("--metrics-path").vmm_arg(kept.to_str().unwrap());
    vm.run().unwrap().assert_line("probe: rng ok");
    let text = Casemate::new().call(&["metrics", kept.to_str().unwrap()]);
    let text = text.unwrap();
    assert_eq!(text.code, 0, "{text:#?}");
    let exposition = dir.path().join("text");
    std::fs::write(&exposition, text.stdout).unwrap();
    let mut command = script(Command::new("env"), "exposition.py");
    command.stdin(std::fs::File::open(exposition).unwrap());
    let done = command.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{done:?}");
    assert!(said.contains("entropy_bytes"), "{said}");
    println!("{said}");
}

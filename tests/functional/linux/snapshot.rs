//! A Linux guest goes on from a snapshot: its processors, clocks and drivers.

use std::path::Path;
use std::process::Command;

use casemate_tests::{Running, Vm, bin};
use serde_json::json;

use crate::guest::{Guest, linux};

const DRIVERS: [&str; 6] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_rng",
    "virtio_net",
    "vmw_vsock_virtio_transport",
];

/// Turn after turn, on one processor after the other: a sector of the disk, random bytes, and how long it has run.
const SCRIPT: &str = "
n=0
while :; do
    n=$((n + 1))
    cpu=$((n % 2 + 1))
    sector=$(taskset $cpu dd if=/dev/vda bs=512 count=1 skip=$((n % 16)) iflag=direct 2> /dev/null | head -c 6)
    random=$(head -c 8 /dev/hwrng | wc -c)
    echo \"turn $n $sector $random up $(cut -d . -f 1 /proc/uptime)\" > /dev/console
    sleep 0.5
done
";

fn machine(dir: &Path, pci: bool) -> Vm {
    let vm = linux("", &DRIVERS, SCRIPT, &[]);
    let vm = if pci { vm.pci() } else { vm };
    vm.set(
        "/machine-config",
        json!({ "vcpu_count": 2, "mem_size_mib": 128 }),
    )
    .drive("disk", &dir.join("disk"), true)
    .entropy()
    .vsock()
}

/// Where its memory comes from.
#[derive(Clone, Copy, PartialEq)]
enum Memory {
    File,
    PageHandler,
}

fn goes_on(pci: bool, from: Memory) {
    let dir = tempfile::tempdir().unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(dir.path(), open).unwrap();
    let text: String = (0..16)
        .map(|number| format!("{:<512}", format!("sec{number:03}")))
        .collect();
    std::fs::write(dir.path().join("disk"), text).unwrap();
    let vm = machine(dir.path(), pci).served();
    let place = format!("{}/", dir.path().display());
    let vm = vm.jailer_arg("--allow-create").jailer_arg(&place);
    let running = Running::start(vm.command().unwrap(), None).unwrap();
    let mut first = Guest::new(running, vm);
    first.says("turn 3 sec003 8");
    first.patch("/vm", &json!({ "state": "Paused" }));
    let (state, memory) = (dir.path().join("state"), dir.path().join("memory"));
    let body = json!({ "snapshot_path": state, "mem_file_path": memory });
    first.ask("PUT", "/snapshot/create", &body).assert_done();
    let said = first.vm.said();
    let turns = said
        .lines()
        .filter(|line| line.starts_with("turn "))
        .count();
    first.kill();
    let vm = machine(dir.path(), false).api();
    let socket = dir.path().join("pages");
    let handler = (from == Memory::PageHandler).then(|| {
        let mut command = Command::new(bin("casemate"));
        command.args(["snapshot", "serve", "--socket"]);
        command.arg(&socket).arg(&memory);
        let running = Running::start(command, None).unwrap();
        running.wait_for_line("listening on").unwrap();
        running
    });
    let (kind, path, grant) = match from {
        Memory::File => ("File", memory, "--grant-ro"),
        Memory::PageHandler => ("Uffd", socket, "--grant-connect"),
    };
    let vm = vm.jailer_arg("--grant-userfaultfd");
    let vm = vm
        .jailer_arg("--grant-ro")
        .jailer_arg(state.to_str().unwrap());
    let vm = vm.jailer_arg(grant).jailer_arg(path.to_str().unwrap());
    let running = Running::start(vm.command().unwrap(), None).unwrap();
    let mut second = Guest::new(running, vm);
    let memory = json!({ "backend_type": kind, "backend_path": path });
    let sockets = json!({ "uds_path": second.files.vsock_path() });
    let body = json!({ "snapshot_path": state, "mem_backend": memory, "vsock_override": sockets, "resume_vm": true });
    second.ask("PUT", "/snapshot/load", &body).assert_done();
    for turn in turns + 2..turns + 6 {
        second.says(&format!("turn {turn} sec{:03} 8 up ", turn % 16));
    }
    let said = second.vm.said();
    for trouble in [
        "lockup",
        "stall",
        "BUG",
        "WARNING",
        "I/O error",
        "clocksource",
    ] {
        assert!(!said.contains(trouble), "{said}");
    }
    second.kill();
    if let Some(handler) = handler {
        assert_eq!(handler.wait().unwrap().code, 0);
    }
}

#[test]
fn a_guest_goes_on_from_a_snapshot_on_mmio() {
    goes_on(false, Memory::File);
}

#[test]
fn a_guest_goes_on_from_a_snapshot_on_pci() {
    goes_on(true, Memory::File);
}

#[test]
fn a_guest_goes_on_with_memory_of_a_page_handler() {
    goes_on(false, Memory::PageHandler);
}

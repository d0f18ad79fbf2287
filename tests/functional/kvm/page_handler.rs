//! Machines whose memory a process brings, page by page: ours, and one that only knows Firecracker's handshake.

use std::path::{Path, PathBuf};
use std::process::Command;

use casemate_tests::{ApiAnswer, Machine, Running, Vm, exit, pattern_disk};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::probe;
use super::snapshot::{Place, drive, rounds, started};

/// A process that brings a snapshot's memory, and its socket.
struct Handler {
    running: Running,
    socket: PathBuf,
}

impl Handler {
    /// One that nobody of us has written for Casemate.
    fn foreign(place: &Place, how: &str) -> Self {
        let socket = place.path(&format!("{how}.sock"));
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
        let mut command = Command::new("/usr/bin/python3");
        command.arg(scripts.join("page_handler.py")).arg(&socket);
        command.arg(place.path("memory")).arg(how);
        let running = Running::start(command, None).unwrap();
        running.wait_for_line("listening").unwrap();
        Self { running, socket }
    }
}

/// A jail whose machine may have its memory from there, and its state from `place`.
fn granted(place: &Place, socket: &Path, vm: Vm) -> Vm {
    let (state, socket) = (place.path("state"), socket.display().to_string());
    vm.jailer_arg("--grant-userfaultfd")
        .jailer_arg("--grant-connect")
        .jailer_arg(&socket)
        .jailer_arg("--grant-ro")
        .jailer_arg(&state.display().to_string())
}

fn request(place: &Place, socket: &Path) -> Value {
    let memory = json!({ "backend_type": "Uffd", "backend_path": socket });
    json!({ "snapshot_path": place.path("state"), "mem_backend": memory, "resume_vm": true })
}

fn ask(place: &Place, socket: &Path, machine: &mut Machine) -> ApiAnswer {
    machine.put("/snapshot/load", request(place, socket))
}

/// A machine that goes on from `place`.
fn load(place: &Place, handler: &Handler, vm: Vm) -> Machine {
    let mut machine = Machine::new(vm);
    ask(place, &handler.socket, &mut machine).assert_done();
    machine
}

/// A guest that reads its disk, draws random bytes and counts a page up, saved after five rounds; and how many it had said.
fn saved(place: &Place, machine: impl Fn(&str) -> Vm) -> usize {
    let mut first = started(place.to_make(machine("probe.task=rounds")));
    first.vm.wait_for_line("probe: round 5").unwrap();
    Place::pause(&mut first);
    place.create(&mut first);
    let said = rounds(&first);
    first.kill();
    said
}

#[test]
fn a_guest_goes_on_with_memory_of_another_process() {
    for jailed in [false, true] {
        let place = Place::new();
        let disk = place.path("disk");
        pattern_disk(&disk, 8).unwrap();
        let machine = |task: &str| {
            let vm = drive(probe(task), &disk, "Sync").entropy();
            if jailed { vm } else { vm.unjailed() }
        };
        let said = saved(&place, machine);
        let handler = Handler::foreign(&place, "full");
        let second = load(
            &place,
            &handler,
            granted(&place, &handler.socket, machine("")),
        );
        for round in [said, said + 5] {
            second
                .vm
                .wait_for_line(&format!("probe: round {round}"))
                .unwrap();
        }
        assert!(!second.vm.said().contains("FAIL"), "{}", second.vm.said());
        second.kill();
        // It sees the end of its machine.
        let done = handler.running.wait().unwrap();
        assert_eq!(done.code, 0, "{done:#?}");
    }
}

//! Machines whose memory a process brings, page by page: ours, and one that only knows Firecracker's handshake.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use casemate_tests::{ApiAnswer, Machine, Running, Vm, bin, exit, pattern_disk};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::probe;
use super::snapshot::{Place, drive, merge, rounds, started};

/// A process that brings a snapshot's memory, and its socket.
struct Handler {
    running: Running,
    socket: PathBuf,
}

impl Handler {
    fn new(place: &Place, ours: bool) -> Self {
        match ours {
            true => Self::ours(place),
            false => Self::foreign(place, "full"),
        }
    }

    /// `casemate snapshot serve`.
    fn ours(place: &Place) -> Self {
        let socket = place.path("ours.sock");
        let mut command = Command::new(bin("casemate"));
        command.args(["snapshot", "serve", "--socket"]).arg(&socket);
        command.arg(place.path("memory"));
        let running = Running::start(command, None).unwrap();
        running.wait_for_line("listening on").unwrap();
        Self { running, socket }
    }

    /// One that only knows the protocol.
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

fn with_disk() -> Place {
    let place = Place::new();
    pattern_disk(&place.path("disk"), 8).unwrap();
    place
}

/// A machine with that disk.
fn rounds_on(place: &Place, jailed: bool, task: &str) -> Vm {
    let vm = drive(probe(task), &place.path("disk"), "Sync").entropy();
    if jailed { vm } else { vm.unjailed() }
}

/// The number after the last round that a guest has said.
fn rounds_said(machine: &Machine) -> usize {
    let said = machine.vm.said();
    let mut numbers = said
        .lines()
        .filter_map(|line| line.strip_prefix("probe: round "));
    let last = numbers.next_back().unwrap();
    last.trim().parse::<usize>().unwrap() + 1
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

/// The same of one that only counts.
fn saved_ticks(place: &Place) {
    let mut first = started(probe("probe.task=tick").unjailed());
    first.vm.wait_for_line("probe: tick 3").unwrap();
    Place::pause(&mut first);
    place.create(&mut first);
    first.kill();
}

#[test]
fn a_guest_goes_on_with_memory_of_another_process() {
    for (jailed, ours) in [(false, false), (true, false), (false, true), (true, true)] {
        let place = with_disk();
        let machine = |task: &str| rounds_on(&place, jailed, task);
        let said = saved(&place, machine);
        let handler = Handler::new(&place, ours);
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

/// A handler that dies takes its machine with it, by name, whoever waits for it: the guest never sees a page of zeroes.
#[test]
fn the_end_of_the_handler_is_a_named_end() {
    for (jailed, paused, ours) in [
        (false, false, true),
        (true, false, false),
        (true, false, true),
        (false, true, true),
    ] {
        let place = with_disk();
        let machine = |task: &str| rounds_on(&place, jailed, task);
        saved(&place, machine);
        let handler = Handler::new(&place, ours);
        let mut second = load(
            &place,
            &handler,
            granted(&place, &handler.socket, machine("")),
        );
        second.vm.wait_for_line("probe: round").unwrap();
        if paused {
            Place::pause(&mut second);
        }
        handler.running.signal(Signal::SIGKILL).unwrap();
        handler.running.wait().unwrap();
        let done = second.vm.wait().unwrap();
        assert_eq!(done.code, exit::VMM_FAILED, "{done:#?}");
        assert!(
            done.stderr.contains("the page handler has closed"),
            "{done:#?}"
        );
    }
}

/// So it is while the control thread waits for a page itself: here for the thread that saves the machine.
#[test]
fn a_vmm_that_waits_for_pages_ends_with_its_handler() {
    let place = Place::new();
    saved_ticks(&place);
    let handler = Handler::foreign(&place, "full");
    let mut machine = Machine::new(place.to_make(probe("").unjailed()));
    let mut body = request(&place, &handler.socket);
    body["resume_vm"] = json!(false);
    machine.put("/snapshot/load", body).assert_done();
    std::fs::write(place.path("full.sock.stall"), "").unwrap();
    let again =
        json!({ "snapshot_path": place.path("state2"), "mem_file_path": place.path("memory2") });
    let again = again.to_string();
    let head = format!(
        "PUT /snapshot/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
        again.len()
    );
    machine
        .client
        .send(format!("{head}{again}").as_bytes())
        .unwrap();
    handler.running.wait_for_line("stalled").unwrap();
    handler.running.signal(Signal::SIGKILL).unwrap();
    let done = machine.vm.wait().unwrap();
    assert_eq!(done.code, exit::VMM_FAILED, "{done:#?}");
    assert!(
        done.stderr.contains("the page handler has closed"),
        "{done:#?}"
    );
}

/// A handler that takes the connection and brings nothing, or hangs up, is a refusal; and so is none. The VMM can still
/// load the snapshot otherwise.
#[test]
fn a_handler_that_brings_nothing_is_refused() {
    let place = Place::new();
    saved_ticks(&place);
    let mut machine = Machine::new(probe("").unjailed());
    let nobody = place.path("nobody.sock");
    let answer = ask(&place, &nobody, &mut machine);
    answer.assert_refused("page handler");
    answer.assert_refused("No such file");
    for (how, words) in [
        ("silent", "first pages within 10 s"),
        ("refuse", "has closed its socket"),
    ] {
        let handler = Handler::foreign(&place, how);
        if how == "silent" {
            ask(&place, &handler.socket, &mut machine).assert_refused(words);
        } else {
            // Since a start failed, the VMM can connect to nobody.
            ask(&place, &handler.socket, &mut machine).assert_refused("start a new VMM");
            let mut other = Machine::new(probe("").unjailed());
            ask(&place, &handler.socket, &mut other).assert_refused(words);
            other.kill();
            handler.running.wait().unwrap();
        }
        assert_eq!(machine.get("/")["state"], "Not started");
    }
    let memory = json!({ "backend_type": "File", "backend_path": place.path("memory") });
    let body =
        json!({ "snapshot_path": place.path("state"), "mem_backend": memory, "resume_vm": true });
    machine.put("/snapshot/load", body).assert_done();
    machine.vm.wait_for_line("probe: tick 6").unwrap();
    machine.kill();
}

/// What does not go with a handler is refused before the handler hears of it: the same VMM can then load otherwise from it.
#[test]
fn huge_pages_are_refused_and_the_handler_is_still_there() {
    for jailed in [false, true] {
        let place = Place::new();
        saved_ticks(&place);
        let handler = Handler::ours(&place);
        let vm = granted(&place, &handler.socket, probe(""));
        let mut machine = Machine::new(if jailed { vm } else { vm.unjailed() });
        let mut body = request(&place, &handler.socket);
        body["huge_pages"] = json!("2M");
        let answer = machine.put("/snapshot/load", body.clone());
        answer.assert_refused("do not go together yet");
        body["huge_pages"] = json!("Transparent");
        machine.put("/snapshot/load", body).assert_done();
        machine.vm.wait_for_line("probe: tick 6").unwrap();
        machine.kill();
        assert_eq!(handler.running.wait().unwrap().code, 0);
    }
}

/// What the jail was not given is named.
#[test]
fn a_jail_says_what_to_grant() {
    let place = Place::new();
    saved_ticks(&place);
    let handler = Handler::foreign(&place, "full");
    let state = place.path("state").display().to_string();
    let jail = || probe("").jailer_arg("--grant-ro").jailer_arg(&state);
    let mut machine = Machine::new(jail());
    ask(&place, &handler.socket, &mut machine).assert_refused("--grant-userfaultfd");
    machine.kill();
    let mut machine = Machine::new(jail().jailer_arg("--grant-userfaultfd"));
    ask(&place, &handler.socket, &mut machine).assert_refused("--grant-connect");
    machine.kill();
}

/// A machine whose memory comes from a handler is saved whole: pages that have never come, too.
#[test]
fn what_a_handler_brought_can_be_saved_again() {
    for jailed in [false, true] {
        let place = with_disk();
        let machine = |task: &str| rounds_on(&place, jailed, task);
        let said = saved(&place, machine);
        let handler = Handler::ours(&place);
        let again = Place::new();
        let vm = again.to_make(granted(&place, &handler.socket, machine("")));
        let mut second = Machine::new(vm);
        let mut body = request(&place, &handler.socket);
        body["resume_vm"] = json!(false);
        second.put("/snapshot/load", body).assert_done();
        again.create(&mut second);
        second.kill();
        // Both files hold the same memory, but for the page that tells the guest that it is another machine.
        let [before, after] =
            [&place, &again].map(|place| std::fs::read(place.path("memory")).unwrap());
        assert_eq!(before.len(), after.len());
        let pages = before.chunks(4096).zip(after.chunks(4096));
        let differ = pages.filter(|(before, after)| before != after).count();
        // The generation's page, the clock's, and the trailer.
        assert!(differ <= 3, "{differ} pages differ");
        let third = again.load(again.to_read(machine("")), true);
        third
            .vm
            .wait_for_line(&format!("probe: round {}", said + 3))
            .unwrap();
        assert!(!third.vm.said().contains("FAIL"), "{}", third.vm.said());
        third.kill();
    }
}

/// What has changed since a handler's snapshot is saved alone, and merged with the file that the handler had.
#[test]
fn what_a_handler_brought_is_no_change() {
    let place = with_disk();
    let machine = |task: &str| rounds_on(&place, true, task);
    saved(&place, machine);
    let handler = Handler::ours(&place);
    let vm = place.to_make(granted(&place, &handler.socket, machine("")));
    let mut second = Machine::new(vm);
    let mut body = request(&place, &handler.socket);
    body["track_dirty_pages"] = json!(true);
    second.put("/snapshot/load", body).assert_done();
    second.vm.wait_for_line("probe: round 8").unwrap();
    Place::pause(&mut second);
    let next = rounds_said(&second);
    let answer = second.put(
        "/snapshot/create",
        json!({ "snapshot_type": "Diff", "snapshot_path": place.path("state2"), "mem_file_path": place.path("diff") }),
    );
    answer.assert_done();
    second.kill();
    let blocks = |name: &str| std::fs::metadata(place.path(name)).unwrap().blocks();
    assert!(
        blocks("diff") < blocks("memory"),
        "{} blocks",
        blocks("diff")
    );
    merge(&place, "memory", "diff", "memory2").unwrap();
    let third = Place::new();
    for (from, to) in [("state2", "state"), ("memory2", "memory")] {
        std::fs::copy(place.path(from), third.path(to)).unwrap();
    }
    let third = third.load(third.to_read(machine("")), true);
    third
        .vm
        .wait_for_line(&format!("probe: round {next}"))
        .unwrap();
    assert!(!third.vm.said().contains("FAIL"), "{}", third.vm.said());
    third.kill();
}

/// Memory that the guest gives back is zero afterwards, and not what the handler's file has there.
#[test]
fn what_a_balloon_gave_back_is_zero() {
    for ours in [false, true] {
        what_a_balloon_gave_back(ours);
    }
}

fn what_a_balloon_gave_back(ours: bool) {
    let place = Place::new();
    let vm = || {
        let balloon = json!({ "amount_mib": 8, "deflate_on_oom": true, "stats_polling_interval_s": 1,
                              "free_page_reporting": true });
        probe("probe.task=balloon")
            .unjailed()
            .set("/balloon", balloon)
    };
    let mut first = started(vm());
    first
        .vm
        .wait_for_line("probe: balloon wants 2048 pages")
        .unwrap();
    first.vm.write(b"\n").unwrap();
    first.vm.wait_for_line("probe: filled").unwrap();
    Place::pause(&mut first);
    place.create(&mut first);
    first.kill();
    let handler = Handler::new(&place, ours);
    let mut second = load(&place, &handler, vm());
    for line in ["inflated", "deflated", "reported", "balloon ok"] {
        second.vm.write(b"\n").unwrap();
        second.vm.wait_for_line(&format!("probe: {line}")).unwrap();
    }
    assert_eq!(second.vm.wait().unwrap().code, exit::GUEST_RESET);
    let done = handler.running.wait().unwrap();
    assert_eq!(done.code, 0, "{done:#?}");
    assert!(ours || done.stdout.contains("removed"), "{done:#?}");
}

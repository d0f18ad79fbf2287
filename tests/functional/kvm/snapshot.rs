//! Snapshots of the probe guest, and machines that go on from them.

use std::io::Write as _;
use std::net::Shutdown;
use std::path::{Path, PathBuf};

use casemate_tests::{ApiAnswer, Machine, Vm, bin, exit, pattern_disk};
use serde_json::{Value, json};

use super::probe;

/// A test's directory, which a jailed broker may make files in, and the snapshot's two files there.
pub(super) struct Place(tempfile::TempDir);

impl Place {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(dir.path(), open).unwrap();
        Self(dir)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A jail that may make them.
    pub(super) fn to_make(&self, vm: Vm) -> Vm {
        let dir = format!("{}/", self.0.path().display());
        vm.jailer_arg("--allow-create").jailer_arg(&dir)
    }

    /// A jail that may read them: they are of another user than its own.
    pub(super) fn to_read(&self, vm: Vm) -> Vm {
        ["state", "memory"].iter().fold(vm, |vm, name| {
            let path = self.path(name).display().to_string();
            vm.jailer_arg("--grant-ro").jailer_arg(&path)
        })
    }

    pub(super) fn pause(machine: &mut Machine) {
        machine
            .patch("/vm", json!({ "state": "Paused" }))
            .assert_done();
    }

    pub(super) fn create(&self, machine: &mut Machine) {
        self.create_as(machine, "Full", "state", "memory")
            .assert_done();
    }

    pub(super) fn create_as(
        &self,
        machine: &mut Machine,
        kind: &str,
        state: &str,
        memory: &str,
    ) -> ApiAnswer {
        let (state, memory) = (self.path(state), self.path(memory));
        let body =
            json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory });
        machine.put("/snapshot/create", body)
    }

    /// A machine that goes on from it.
    pub(super) fn load(&self, vm: Vm, resume: bool) -> Machine {
        self.load_from(vm, "state", "memory", json!({ "resume_vm": resume }))
    }

    fn load_from(&self, vm: Vm, state: &str, memory: &str, mut body: Value) -> Machine {
        let mut machine = Machine::new(vm);
        body["snapshot_path"] = json!(self.path(state));
        body["mem_backend"] = json!({ "backend_type": "File", "backend_path": self.path(memory) });
        machine.put("/snapshot/load", body).assert_done();
        machine
    }
}

pub(super) fn drive(vm: Vm, disk: &Path, engine: &str) -> Vm {
    vm.drive("disk", disk, true)
        .set("/drives/0/io_engine", json!(engine))
}

/// A machine that is described by requests, as `vm` is, and not started yet.
fn described(vm: Vm) -> Machine {
    let config = vm.config().clone();
    let mut machine = Machine::new(vm);
    machine.describe(&config);
    if let Some(drive) = config.pointer("/drives/0") {
        machine.put("/drives/disk", drive.clone()).assert_done();
    }
    for name in ["balloon", "entropy", "vsock"] {
        if let Some(device) = config.get(name) {
            machine
                .put(&format!("/{name}"), device.clone())
                .assert_done();
        }
    }
    machine
}

pub(super) fn started(vm: Vm) -> Machine {
    let mut machine = described(vm);
    machine.start();
    machine
}

/// How many rounds a guest has said so far.
pub(super) fn rounds(machine: &Machine) -> usize {
    let said = machine.vm.said();
    said.lines()
        .filter(|line| line.contains("probe: round"))
        .count()
}

#[test]
fn a_guest_and_its_devices_go_on_where_they_were() {
    for (jailed, engine) in [(false, "Sync"), (true, "Sync"), (true, "Async")] {
        let place = Place::new();
        let disk = place.path("disk");
        pattern_disk(&disk, 8).unwrap();
        let machine = |task: &str| {
            let vm = drive(probe(task), &disk, engine).entropy();
            if jailed { vm } else { vm.unjailed() }
        };
        let mut first = started(place.to_make(machine("probe.task=rounds")));
        first.vm.wait_for_line("probe: round 5").unwrap();
        Place::pause(&mut first);
        place.create(&mut first);
        let said = rounds(&first);
        let drives = first.get("/vm/config")["drives"].clone();
        let next = format!("probe: round {said}");
        // The one that was saved goes on, too.
        first
            .patch("/vm", json!({ "state": "Resumed" }))
            .assert_done();
        first.vm.wait_for_line(&next).unwrap();
        first.kill();
        for resume in [true, false] {
            let mut second = place.load(place.to_read(machine("")), resume);
            assert_eq!(second.get("/vm/config")["drives"], drives);
            if !resume {
                assert_eq!(second.get("/")["state"], "Paused");
                assert_eq!(rounds(&second), 0);
                second
                    .patch("/vm", json!({ "state": "Resumed" }))
                    .assert_done();
            }
            second.vm.wait_for_line(&next).unwrap();
            let later = format!("probe: round {}", said + 5);
            second.vm.wait_for_line(&later).unwrap();
            assert!(!second.vm.said().contains("FAIL"), "{}", second.vm.said());
            second.kill();
        }
    }
}

/// What cannot be saved is refused by name, leaves nothing behind, and runs on.
#[test]
fn what_cannot_be_saved_is_refused() {
    let place = Place::new();
    let mut machine = described(probe("probe.task=tick").unjailed());
    let room = json!({ "total_size_mib": 128 });
    machine.put("/hotplug/memory", room).assert_done();
    machine.start();
    let create = |machine: &mut Machine, kind: &str, memory: &str| {
        place.create_as(machine, kind, "state", memory)
    };
    create(&mut machine, "Full", "memory").assert_refused("a machine that is paused");
    Place::pause(&mut machine);
    create(&mut machine, "Diff", "memory").assert_refused("`track_dirty_pages`");
    create(&mut machine, "Full", "state").assert_refused("are one file");
    create(&mut machine, "Full", "memory").assert_refused("Mem device cannot be in a snapshot");
    let left: Vec<_> = std::fs::read_dir(place.0.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    machine
        .patch("/vm", json!({ "state": "Resumed" }))
        .assert_done();
    machine.vm.wait_for_line("probe: tick 5").unwrap();
    machine.kill();
}

/// What has changed is found whoever changed it: with it, each snapshot's memory becomes the next one's to the byte. One that
/// fails takes nothing from the next, and a machine that goes on from one is as good as that which was saved.
#[test]
fn differences_make_the_next_snapshot() {
    for (jailed, engine) in [(true, "Sync"), (false, "Async")] {
        let place = Place::new();
        let disk = place.path("disk");
        pattern_disk(&disk, 8).unwrap();
        let machine = |task: &str| {
            let vm = drive(probe(task), &disk, engine).entropy();
            let vm = vm.set("/machine-config/track_dirty_pages", json!(true));
            if jailed { vm } else { vm.unjailed() }
        };
        let mut first = started(place.to_make(machine("probe.task=rounds")));
        first.vm.wait_for_line("probe: round 3").unwrap();
        Place::pause(&mut first);
        // The first one has nothing that it could be against.
        let made = place.create_as(&mut first, "Diff", "state-1", "memory-1");
        made.assert_done();
        differ_by(&place, &mut first, (1, 2), jailed);
        first.kill();

        merge(&place, "memory-1", "diff-2", "merged-2").unwrap();
        let granted = ["state-2", "merged-2"]
            .iter()
            .fold(machine(""), |vm, name| {
                let path = place.path(name).display().to_string();
                vm.jailer_arg("--grant-ro").jailer_arg(&path)
            });
        let body = json!({ "resume_vm": true, "track_dirty_pages": true });
        let mut second = place.load_from(place.to_make(granted), "state-2", "merged-2", body);
        second.vm.wait_for_line("probe: round").unwrap();
        differ_by(&place, &mut second, (2, 3), jailed);
        assert!(!second.vm.said().contains("FAIL"), "{}", second.vm.said());
        second.kill();
        let error = merge(&place, "memory-1", "diff-3", "merged-4").unwrap_err();
        assert!(error.contains("against that of snapshot"), "{error}");
        let error = merge(&place, "diff-2", "diff-3", "merged-4").unwrap_err();
        assert!(error.contains("only what has changed"), "{error}");
        assert!(!place.path("merged-4").exists());
    }
}

/// Lets a machine run and be saved in both ways, as `diff-NEXT` and as `memory-NEXT`, after an attempt that fails, and finds
/// that both are one.
fn differ_by(place: &Place, machine: &mut Machine, (last, next): (u8, u8), jailed: bool) {
    let go = |machine: &mut Machine, state: &str| {
        machine
            .patch("/vm", json!({ "state": state }))
            .assert_done();
    };
    for attempt in 0..2 {
        go(machine, "Resumed");
        let line = format!("probe: round {}", rounds(machine) + 2);
        machine.vm.wait_for_line(&line).unwrap();
        go(machine, "Paused");
        if attempt == 0 && !jailed {
            limit_files(machine, "4096:");
            let failed = place.create_as(machine, "Diff", "state-failed", "failed");
            failed.assert_refused("allow it");
            limit_files(machine, "unlimited:");
        }
    }
    let (state, diff) = (format!("state-{next}"), format!("diff-{next}"));
    let made = place.create_as(machine, "Diff", &state, &diff);
    made.assert_done();
    let memory = format!("memory-{next}");
    let made = place.create_as(machine, "Full", "state-other", &memory);
    made.assert_done();
    let last = match last {
        1 => "memory-1".to_owned(),
        _ => format!("merged-{last}"),
    };
    let merged = format!("merged-{next}");
    merge(place, &last, &diff, &merged).unwrap();
    let [merged, whole, diff] =
        [merged, memory, diff].map(|name| std::fs::read(place.path(&name)).unwrap());
    // All but the trailer, which has another id.
    let end = whole.len() - 4096;
    assert_eq!(merged.len(), whole.len());
    assert!(merged[..end] == whole[..end], "the memories are different");
    assert!(diff[..end] != whole[..end], "all was written again");
}

/// Page faults of the machine's vCPU so far.
fn faults(machine: &Machine) -> u64 {
    let vmm = machine.vm.vmm_pid().unwrap();
    let threads = std::fs::read_dir(format!("/proc/{vmm}/task")).unwrap();
    let stat = threads
        .map(|thread| std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap())
        .find(|stat| stat.contains("(vcpu"));
    let stat = stat.unwrap();
    // Behind the name: state, ppid, pgrp, session, tty, tpgid, flags, minflt (proc_pid_stat(5)).
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').nth(7).unwrap().parse().unwrap()
}

/// The first machine that goes on from a snapshot records which pages it uses; the next one finds them there.
#[test]
fn the_second_machine_finds_the_pages_that_the_first_one_used() {
    for jailed in [true, false] {
        let place = Place::new();
        let machine = |task: &str| {
            let vm = probe(task).vmm_arg("--level").vmm_arg("info");
            if jailed { vm } else { vm.unjailed() }
        };
        let mut first = started(place.to_make(machine("probe.task=touch")));
        first.vm.wait_for_line("probe: touched 0").unwrap();
        Place::pause(&mut first);
        place.create(&mut first);
        first.kill();
        let set = place.path("memory.working-set");
        let mut counts = Vec::new();
        for round in 0..3 {
            let vm = place.to_make(place.to_read(machine("")));
            let vm = match (jailed, round) {
                (false, _) | (_, 0) => vm,
                _ => {
                    let path = set.display().to_string();
                    vm.jailer_arg("--grant-ro").jailer_arg(&path)
                }
            };
            let recorded = set.exists();
            assert_eq!(recorded, round > 0);
            let late = json!({ "working_set": { "record_after_ms": 3_600_000 } });
            let mut body = if round == 2 {
                json!({ "working_set": { "enabled": false } })
            } else {
                late
            };
            body["resume_vm"] = json!(true);
            let mut machine = place.load_from(vm, "state", "memory", body);
            if round == 1 {
                let there = "working set: all of it is there";
                machine.vm.wait_for_error_line(there).unwrap();
            }
            let before = faults(&machine);
            machine
                .vm
                .write(
                    b"
",
                )
                .unwrap();
            machine.vm.wait_for_line("probe: touched 1").unwrap();
            counts.push(faults(&machine) - before);
            // It is recorded at the latest when the guest stops.
            Place::pause(&mut machine);
            assert!(set.exists());
            machine.kill();
        }
        let [first, second, without] = counts[..] else {
            unreachable!()
        };
        assert!(first > 1200 && without > 1200, "{counts:?}");
        assert!(second * 10 <= first, "{counts:?}");
        // One that is damaged, or of another snapshot, is no reason not to go on.
        std::fs::write(&set, b"CASEMATE").unwrap();
        let vm = place.to_make(place.to_read(machine("")));
        let path = set.display().to_string();
        let vm = vm.jailer_arg("--grant-ro").jailer_arg(&path);
        let machine = place.load(vm, true);
        machine.vm.wait_for_error_line("is not used").unwrap();
        machine.kill();
    }
}

/// The largest file that a machine of our own user may write.
fn limit_files(machine: &Machine, soft: &str) {
    let pid = machine.vm.pid().to_string();
    let mut prlimit = std::process::Command::new("prlimit");
    let prlimit = prlimit.args(["--pid", &pid, &format!("--fsize={soft}")]);
    assert!(prlimit.status().unwrap().success());
}

/// What the VMM's program says of a merge.
pub(super) fn merge(place: &Place, base: &str, diff: &str, new: &str) -> Result<(), String> {
    let mut program = std::process::Command::new(bin("casemate-vmm"));
    program.arg("--merge-memory");
    let done = program.args([base, diff, new].map(|name| place.path(name)));
    let done = done.output().unwrap();
    match done.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&done.stderr).into_owned()),
    }
}

/// Files that are no snapshot, or not of one snapshot, are refused, and another one can be loaded afterwards.
#[test]
fn what_is_no_snapshot_is_refused() {
    let (place, other) = (Place::new(), Place::new());
    for place in [&place, &other] {
        let mut machine = started(probe("probe.task=tick").unjailed());
        machine.vm.wait_for_line("probe: tick 1").unwrap();
        Place::pause(&mut machine);
        place.create(&mut machine);
        machine.kill();
    }
    let state = std::fs::read(place.path("state")).unwrap();
    let memory = std::fs::read(place.path("memory")).unwrap();
    std::fs::write(place.path("half"), &state[..state.len() / 2]).unwrap();
    let mut flipped = state.clone();
    flipped[state.len() / 2] ^= 1;
    std::fs::write(place.path("flipped"), flipped).unwrap();
    std::fs::write(place.path("short"), &memory[..memory.len() - 4096]).unwrap();
    let mut machine = Machine::new(probe("").unjailed());
    let file = |path: PathBuf| json!({ "backend_type": "File", "backend_path": path });
    let (good, right) = (place.path("state"), file(place.path("memory")));
    for (state, memory, words) in [
        (place.path("none"), &right, "No such file"),
        (place.path("half"), &right, "cut off"),
        (place.path("flipped"), &right, "damaged"),
        (place.path("memory"), &right, "snapshot"),
        (good.clone(), &file(place.path("none")), "No such file"),
        (good.clone(), &file(place.path("short")), "memory"),
        (good.clone(), &file(place.path("state")), "memory"),
        (good.clone(), &file(other.path("memory")), "snapshot"),
    ] {
        let body = json!({ "snapshot_path": state, "mem_backend": memory });
        let answer = machine.put("/snapshot/load", body);
        answer.assert_refused(words);
        assert_eq!(machine.get("/")["state"], "Not started");
    }
    let cards = json!([{ "iface_id": "eth7", "host_dev_name": "tap0" }]);
    let body = json!({ "snapshot_path": good, "mem_backend": right, "network_overrides": cards });
    let answer = machine.put("/snapshot/load", body);
    answer.assert_refused("no network interface eth7");
    let body = json!({ "snapshot_path": good, "mem_backend": right, "mem_file_path": "/m" });
    let answer = machine.put("/snapshot/load", body);
    answer.assert_refused("one of");
    let body = json!({ "snapshot_path": good, "mem_backend": right, "resume_vm": true });
    machine.put("/snapshot/load", body.clone()).assert_done();
    machine.vm.wait_for_line("probe: tick 4").unwrap();
    machine
        .put("/snapshot/load", body.clone())
        .assert_refused("before the machine is started");
    machine.kill();
    // A machine that has been described is not loaded over.
    let mut machine = Machine::new(probe("").unjailed());
    machine.put("/entropy", json!({})).assert_done();
    machine
        .put("/snapshot/load", body)
        .assert_refused("configured already");
    machine.kill();
}

/// The other devices whose drivers wait: each hears what comes after the restore.
#[test]
fn drivers_that_wait_go_on_waiting() {
    let place = Place::new();
    let task = "probe.task=vsock probe.port=52";
    let mut first = started(probe(task).vsock().unjailed());
    first.vm.wait_for_line("probe: listening on 52").unwrap();
    Place::pause(&mut first);
    place.create(&mut first);
    first.kill();
    let vm = probe("").unjailed();
    let sockets = vm.vsock_path();
    let mut second = Machine::new(vm);
    let body = json!({
        "snapshot_path": place.path("state"),
        "mem_backend": { "backend_type": "File", "backend_path": place.path("memory") },
        "vsock_override": { "uds_path": sockets },
        "resume_vm": true,
    });
    second.put("/snapshot/load", body).assert_done();
    let (mut stream, answer) = super::vsock::connect(&sockets, 52);
    assert!(answer.starts_with("OK "), "{answer}");
    stream.write_all(b"still here").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(std::io::read_to_string(stream).unwrap(), "still here");
    second.vm.wait().unwrap().assert_line("probe: vsock ok");
}

/// Cut off under a machine that runs from it: an end that says so, whoever notices.
#[test]
fn a_memory_file_that_is_cut_off_is_a_named_end() {
    for (task, jailed) in [("tick", false), ("rounds", true)] {
        let place = Place::new();
        let disk = place.path("disk");
        pattern_disk(&disk, 8).unwrap();
        let machine = |task: &str| {
            let vm = drive(probe(task), &disk, "Sync").entropy();
            if jailed { vm } else { vm.unjailed() }
        };
        let mut first = started(place.to_make(machine(&format!("probe.task={task}"))));
        first.vm.wait_for_line("1").unwrap();
        Place::pause(&mut first);
        place.create(&mut first);
        first.kill();
        let second = place.load(place.to_read(machine("")), true);
        second.vm.wait_for_line("probe").unwrap();
        let mut writing = std::fs::File::options();
        let file = writing.write(true).open(place.path("memory"));
        file.unwrap().set_len(4096).unwrap();
        let done = second.vm.wait().unwrap();
        assert_eq!(done.code, exit::VMM_FAILED, "{done:#?}");
        assert!(done.stderr.contains("memory file was cut off"), "{done:#?}");
    }
}

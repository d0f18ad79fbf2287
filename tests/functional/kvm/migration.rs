//! Machines of the probe guest that move to another VMM while they run.

use std::path::{Path, PathBuf};

use casemate_tests::{ApiClient, Machine, Relay, Vm, exit, pattern_disk};
use serde_json::{Value, json};

use super::probe;

/// The probe with a drive and random bytes, which says round after round that all of it is as it should be.
fn rounds(disk: &Path, task: &str, jailed: bool) -> Vm {
    let vm = probe(task).drive("disk", disk, true).entropy();
    if jailed { vm } else { vm.unjailed() }
}

pub(super) struct Pair {
    _dir: tempfile::TempDir,
    disk: PathBuf,
    pub(super) source_api: PathBuf,
    pub(super) source: Machine,
    jailed: bool,
}

impl Pair {
    pub(super) fn new(jailed: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        pattern_disk(&disk, 8).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        let vm = rounds(&disk, "probe.task=rounds", jailed);
        let config = vm.config().clone();
        let source_api = vm.api_path();
        let mut source = Machine::new(vm);
        source.describe(&config);
        let drive = config["drives"][0].clone();
        source.put("/drives/disk", drive).assert_done();
        source.put("/entropy", json!({})).assert_done();
        source.start();
        source.vm.wait_for_line("probe: round 3").unwrap();
        Self {
            _dir: dir,
            disk,
            source_api,
            source,
            jailed,
        }
    }

    /// Another VMM, and a way to it.
    pub(super) fn target(&self) -> (Machine, PathBuf) {
        let vm = rounds(&self.disk, "", self.jailed);
        let api = vm.api_path();
        (Machine::new(vm), api)
    }

    /// Sends it to the VMM with this API; after `most` bytes, there or back, the link breaks.
    fn send(&self, to: &Path, limits: &Value, most: [Option<u64>; 2]) -> Relay {
        let connect = |path| ApiClient::connect(path).unwrap();
        let (to, _) = connect(to)
            .upgrade("/migration/receive", &json!({}))
            .unwrap();
        let from = connect(&self.source_api).upgrade("/migration/send", limits);
        Relay::join(from.unwrap(), to, most).unwrap()
    }

    /// It runs on here, and its API says why.
    pub(super) fn assert_stayed(&mut self, words: &str) {
        self.source.wait_until("the machine stays", |machine| {
            machine.get("/migration")["phase"] == "failed"
        });
        let progress = self.source.get("/migration");
        let error = progress["error"].as_str().unwrap_or_default();
        assert!(error.contains(words), "{words:?} not in {progress}");
        assert_eq!(self.source.get("/")["state"], "Running");
        let next = format!("probe: round {}", count(&self.source.vm.said()) + 2);
        self.source.vm.wait_for_line(&next).unwrap();
    }
}

fn count(said: &str) -> usize {
    said.matches("probe: round ").count()
}

/// The guest of which the machine that has gone `said` this runs on in `target`, and no round is missing or there twice.
#[track_caller]
pub(super) fn assert_goes_on(said: String, target: &Machine) {
    let far = format!("probe: round {}", count(&said) + 10);
    target.vm.wait_for_line(&far).unwrap();
    // One guest's words, though a line may have been cut in two.
    let all = said + &target.vm.said();
    assert!(!all.contains("FAIL"), "{all}");
    let rounds: Vec<usize> = all
        .lines()
        .filter_map(|line| line.strip_prefix("probe: round ")?.parse().ok())
        .collect();
    // The last one may be on its way.
    let said = &rounds[..rounds.len() - 1];
    assert!(said.iter().copied().eq(0..said.len()), "{all}");
}

const PATIENT: &str = r#"{"downtime_ms": 10000}"#;

/// The guest misses nothing and does nothing twice, wherever it is.
#[test]
fn a_machine_moves_while_it_runs() {
    for jailed in [true, false] {
        let pair = Pair::new(jailed);
        let (target, api) = pair.target();
        let limits = serde_json::from_str(PATIENT).unwrap();
        let relay = pair.send(&api, &limits, [None; 2]);
        let gone = pair.source.vm.wait().unwrap();
        assert_eq!(gone.code, exit::MOVED, "{gone:#?}");
        assert!(relay.wait() > 4096);
        assert_goes_on(gone.stdout, &target);
        // It can go on from there.
        let pair = Pair {
            source: target,
            source_api: api,
            ..pair
        };
        let (third, api) = pair.target();
        let _relay = pair.send(&api, &limits, [None; 2]);
        assert_eq!(pair.source.vm.wait().unwrap().code, exit::MOVED);
        third.vm.wait_for_line("probe: round").unwrap();
        third.kill();
    }
}

/// Wherever the link breaks, the guest runs on where it was, and can move afterwards.
#[test]
fn a_machine_whose_way_breaks_stays() {
    let mut pair = Pair::new(false);
    let limits: Value = serde_json::from_str(PATIENT).unwrap();
    for most in [0, 100, 3000, 50_000, 120_000] {
        let (mut target, api) = pair.target();
        pair.send(&api, &limits, [Some(most), None]).wait();
        pair.assert_stayed("connection");
        // And the other one can be something else.
        target.wait_until("it is as before", |it| {
            it.get("/")["state"] == "Not started"
        });
        target.put("/entropy", json!({})).assert_done();
        target.kill();
    }
    // One that dies.
    let (target, api) = pair.target();
    let to = ApiClient::connect(&api).unwrap();
    let (to, _) = to.upgrade("/migration/receive", &json!({})).unwrap();
    let from = ApiClient::connect(&pair.source_api).unwrap();
    let from = from.upgrade("/migration/send", &limits).unwrap();
    target.kill();
    Relay::join(from, to, [None; 2]).unwrap().wait();
    pair.assert_stayed("connection");
    // Nothing of all that is in the way.
    let (target, api) = pair.target();
    let _relay = pair.send(&api, &limits, [None; 2]);
    assert_eq!(pair.source.vm.wait().unwrap().code, exit::MOVED);
    target.vm.wait_for_line("probe: round").unwrap();
    target.kill();
}

/// The word that it runs there does not arrive: it stands still here until somebody knows.
#[test]
fn a_machine_that_may_run_elsewhere_stands_still() {
    let mut pair = Pair::new(false);
    let (target, api) = pair.target();
    let limits = serde_json::from_str(PATIENT).unwrap();
    // Consent, and word that it is built: 16 bytes each.
    pair.send(&api, &limits, [None, Some(32)]).wait();
    let source = &mut pair.source;
    source.wait_until("nobody knows", |it| {
        it.get("/migration")["phase"] == "unknown"
    });
    assert_eq!(source.get("/")["state"], "Paused");
    let said = source.vm.said();
    for (path, body) in [
        ("/migration/send", json!({})),
        (
            "/snapshot/create",
            json!({ "snapshot_path": "/s", "mem_file_path": "/m" }),
        ),
    ] {
        source.put(path, body).assert_refused("is being moved");
    }
    target.kill();
    assert_eq!(source.vm.said(), said);
    let resumed = source.patch("/vm", json!({ "state": "Resumed" }));
    resumed.assert_done();
    let next = format!("probe: round {}", count(&said) + 3);
    source.vm.wait_for_line(&next).unwrap();
    assert!(!source.vm.said().contains("FAIL"));
    pair.source.kill();
}

/// What makes no sense is refused in words, at either end.
#[test]
fn what_cannot_move_is_refused() {
    let mut pair = Pair::new(true);
    let (mut target, api) = pair.target();
    for machine in [&mut pair.source, &mut target] {
        machine
            .put("/migration/cancel", json!({}))
            .assert_refused("");
    }
    let refused = target.put("/migration/send", json!({}));
    refused.assert_refused("start");
    let refused = pair.source.put("/migration/receive", json!({}));
    refused.assert_refused("before the machine is started");
    pair.source
        .put("/migration/send", json!({ "downtime": 1 }))
        .assert_refused("downtime");
    // A guest that may not stand still at all.
    pair.send(
        &api,
        &json!({ "downtime_ms": 0, "max_rounds": 2 }),
        [None; 2],
    )
    .wait();
    pair.assert_stayed("after 2 rounds");
    // Nobody answers: it waits, is not to be changed, and gives up when it is told to.
    let (ours, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let from = ApiClient::connect(&pair.source_api).unwrap();
    let from = from.upgrade("/migration/send", &json!({})).unwrap();
    let _relay = Relay::join(from, ours, [None; 2]).unwrap();
    pair.source.wait_until("it is offered", |machine| {
        machine.get("/migration")["phase"] == "offered"
    });
    let pause = pair.source.patch("/vm", json!({ "state": "Paused" }));
    pause.assert_refused("is being moved");
    pair.source
        .put("/migration/cancel", json!({}))
        .assert_done();
    pair.assert_stayed("cancelled");
    // What comes is no machine.
    for (bytes, words) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "unknown"),
        (
            &[1, 0, 0, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'],
            "version",
        ),
        (
            &[1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'],
            "config",
        ),
        (
            &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            "expected",
        ),
    ] {
        let to = ApiClient::connect(&api).unwrap();
        let (mut to, _) = to.upgrade("/migration/receive", &json!({})).unwrap();
        std::io::Write::write_all(&mut to, bytes).unwrap();
        let mut answer = Vec::new();
        std::io::Read::read_to_end(&mut to, &mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.contains(words), "{words:?} not in {answer:?}");
    }
    // A drive that is written to.
    let vm = probe("probe.task=tick")
        .drive("disk", &pair.disk, false)
        .unjailed();
    let config = vm.config().clone();
    let mut writer = Machine::new(vm);
    writer.describe(&config);
    let drive = config["drives"][0].clone();
    // The other one has it as it is.
    let copy = pair.disk.with_extension("copy");
    std::fs::copy(&pair.disk, &copy).unwrap();
    let mut own = drive;
    own["path_on_host"] = json!(copy);
    writer.put("/drives/disk", own).assert_done();
    writer.start();
    writer
        .put("/migration/send", json!({}))
        .assert_refused("drive disk stays where it is");
    writer.kill();
    // A disk that is not there.
    std::fs::remove_file(&pair.disk).unwrap();
    let vm = rounds(&pair.disk, "", false);
    let elsewhere = vm.api_path();
    let other = Machine::new(vm);
    pair.send(&elsewhere, &json!({}), [None; 2]).wait();
    pair.assert_stayed("refuses the machine");
    other.kill();
    target.kill();
    pair.source.kill();
}

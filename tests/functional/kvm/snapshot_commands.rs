//! `casemate snapshot` as a user drives it, with the bare-metal guest.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_tests::{Casemate, Finished, Running, bin, exit, unique_id};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// casemate failed, as container tools have it.
const FAILED: u8 = 125;
/// What `verify` says of a snapshot that is not whole.
const DAMAGED: u8 = 1;

/// A data directory of a test's own.
struct Place {
    data: tempfile::TempDir,
    casemate: Casemate,
}

impl Place {
    fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let casemate = Casemate::new().with_data(data.path());
        Self { data, casemate }
    }

    fn snapshots(&self) -> PathBuf {
        self.data.path().join("snapshots")
    }

    /// A machine that counts.
    fn ticking(&self, id: &str, options: &[&str]) -> Running {
        let kernel = bin("casemate-probe");
        let words = ["run", "--bare", "--id", id, "--memory", "128", "--append"];
        let task = ["probe.task=tick acpi=off", "--kernel"];
        let words = [&words[..], &task, &[kernel.to_str().unwrap()], options];
        let run = Running::start(self.casemate.command(&words.concat()), None).unwrap();
        run.wait_for_line("probe: tick 3").unwrap();
        run
    }

    #[track_caller]
    fn call(&self, words: &[&str]) -> Finished {
        self.casemate.call(words).unwrap()
    }

    #[track_caller]
    fn done(&self, words: &[&str]) -> String {
        let done = self.call(words);
        assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{done:#?}");
        done.stdout
    }

    /// What is in the directory of snapshots, but for what machines that run have there.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.snapshots()).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name != ".new").collect();
        names.sort();
        names
    }

    /// What the machine's broker has made and nobody has taken.
    fn unsaved(&self, id: &str) -> usize {
        let files = self.snapshots().join(".new").join(id).join("files");
        fs::read_dir(files).unwrap().count()
    }

    #[track_caller]
    fn end(&self, run: Running, id: &str) {
        run.signal(Signal::SIGTERM).unwrap();
        run.wait().unwrap();
        self.casemate.assert_nothing_of(id);
        let left = self.snapshots().join(".new").join(id);
        assert!(!left.exists(), "{}", left.display());
    }
}

/// How far it has counted.
fn ticks(run: &Running) -> usize {
    let said = run.said();
    said.lines()
        .filter(|line| line.contains("probe: tick"))
        .count()
}

#[track_caller]
fn goes_on(run: &Running) {
    let next = format!("probe: tick {}", ticks(run) + 3);
    run.wait_for_line(&next).unwrap();
}

#[test]
fn a_machine_is_saved_and_goes_on() {
    let place = Place::new();
    let id = unique_id("saved");
    let run = place.ticking(&id, &["--snapshots"]);
    place.done(&["snapshot", "create", &id, "one"]);
    goes_on(&run);
    let path = place.data.path().join("two");
    place.done(&["snapshot", "create", &id, path.to_str().unwrap()]);
    goes_on(&run);
    place.end(run, &id);
    assert_eq!(place.names(), ["one"]);
    for directory in [place.snapshots().join("one"), path.clone()] {
        let mode = |path: &Path| {
            let data = fs::metadata(path).unwrap();
            (data.uid(), data.gid(), data.mode() & 0o777)
        };
        assert_eq!(mode(&directory), (0, 0, 0o700));
        let mut names = Vec::new();
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(mode(&entry.path()), (0, 0, 0o600), "{entry:?}");
            names.push(entry.file_name().into_string().unwrap());
        }
        names.sort();
        assert_eq!(names, ["memory", "snapshot.json", "state"]);
    }
    assert_eq!(place.done(&["snapshot", "ls", "--quiet"]), "one\n");
    let listed = place.done(&["snapshot", "ls"]);
    assert!(listed.contains(&id) && listed.contains("128M"), "{listed}");
    let listed: Value = serde_json::from_str(&place.done(&["snapshot", "ls", "--json"])).unwrap();
    assert_eq!(listed[0]["id"], id.as_str());
    assert!(listed[0]["bytes"].as_u64().unwrap() < 16 << 20, "{listed}");
    for name in ["one", path.to_str().unwrap()] {
        let said = place.done(&["snapshot", "describe", name]);
        for words in [&id, "128 MiB", "section vcpu, index 0", "state of snapshot"] {
            assert!(said.contains(words), "{words}: {said}");
        }
        let said = place.done(&["snapshot", "verify", name]);
        assert!(said.contains("pages are whole"), "{said}");
    }
    place.done(&["snapshot", "rm", "one", path.to_str().unwrap()]);
    assert!(place.names().is_empty() && !path.exists());
    assert_eq!(place.done(&["snapshot", "ls", "--quiet"]), "");
}

#[test]
fn what_cannot_be_saved_or_named_is_refused() {
    let place = Place::new();
    let (id, fixed) = (unique_id("saved"), unique_id("fixed"));
    let refused = |words: &[&str], said: &[&str]| place.call(words).assert_refused(FAILED, said);
    refused(
        &["snapshot", "create", "nobody", "s"],
        &["nobody", "does not exist"],
    );
    refused(
        &["snapshot", "create", "../etc", "s"],
        &["../etc", "does not exist"],
    );
    let other = place.ticking(&fixed, &[]);
    refused(
        &["snapshot", "create", &fixed, "s"],
        &[&fixed, "--snapshots"],
    );
    place.end(other, &fixed);

    let run = place.ticking(&id, &["--snapshots"]);
    for name in ["", ".new", "..", "a b", &"x".repeat(65)] {
        refused(
            &["snapshot", "create", &id, name],
            &["not the name of a snapshot"],
        );
    }
    refused(
        &["snapshot", "create", &id, "/nowhere/at/all"],
        &["/nowhere/at"],
    );
    place.done(&["snapshot", "create", &id, "taken"]);
    let before = fs::metadata(place.snapshots().join("taken/memory"))
        .unwrap()
        .ino();
    refused(&["snapshot", "create", &id, "taken"], &["taken", "exists"]);
    let path = place.data.path().join("here");
    fs::create_dir(&path).unwrap();
    refused(
        &["snapshot", "create", &id, path.to_str().unwrap()],
        &["here", "exists"],
    );
    let after = fs::metadata(place.snapshots().join("taken/memory"))
        .unwrap()
        .ino();
    assert_eq!(before, after);
    assert_eq!(
        (place.names(), place.unsaved(&id)),
        (vec!["taken".to_owned()], 0)
    );
    goes_on(&run);
    place.end(run, &id);
    for command in ["describe", "verify", "rm"] {
        for name in ["other", "/nowhere/at/all", path.to_str().unwrap()] {
            refused(&["snapshot", command, name], &[name, "does not exist"]);
        }
        refused(
            &["snapshot", command, ".."],
            &["not the name of a snapshot"],
        );
    }
}

#[test]
fn what_is_damaged_is_named() {
    let place = Place::new();
    let id = unique_id("saved");
    let run = place.ticking(&id, &["--snapshots"]);
    place.done(&["snapshot", "create", &id, "s"]);
    let directory = place.snapshots().join("s");
    let open = |name: &str| {
        fs::File::options()
            .write(true)
            .open(directory.join(name))
            .unwrap()
    };
    let memory = fs::read(directory.join("memory")).unwrap();
    let at = memory.iter().position(|byte| *byte != 0).unwrap();
    open("memory")
        .write_all_at(&[!memory[at]], at as u64)
        .unwrap();
    let done = place.call(&["snapshot", "verify", "s"]);
    done.assert_refused(DAMAGED, &["snapshot s", "memory file is damaged"]);
    open("memory")
        .write_all_at(&[memory[at]], at as u64)
        .unwrap();
    place.done(&["snapshot", "verify", "s"]);

    place.done(&["snapshot", "create", &id, "t"]);
    place.end(run, &id);
    fs::copy(place.snapshots().join("t/memory"), directory.join("memory")).unwrap();
    let done = place.call(&["snapshot", "verify", "s"]);
    done.assert_refused(DAMAGED, &["snapshot s", "the memory file that of"]);
    open("state").set_len(100).unwrap();
    for command in ["verify", "describe"] {
        let done = place.call(&["snapshot", command, "s"]);
        assert!(done.stderr.contains("cut off"), "{done:#?}");
    }
    fs::write(directory.join("snapshot.json"), "{}").unwrap();
    place
        .call(&["snapshot", "verify", "s"])
        .assert_refused(FAILED, &["snapshot.json"]);
    assert_eq!(place.done(&["snapshot", "ls", "--quiet"]), "t\n");
}

/// A file system with little room, while it lives.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(path: &'a Path, size: &str) -> Self {
        fs::create_dir(path).unwrap();
        let options = format!("size={size},mode=0700");
        let flags = MsFlags::empty();
        mount(
            Some("small"),
            path,
            Some("tmpfs"),
            flags,
            Some(options.as_str()),
        )
        .unwrap();
        Self(path)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = umount(self.0);
    }
}

#[test]
fn a_full_disk_leaves_no_half_snapshot_and_the_machine_goes_on() {
    let place = Place::new();
    let snapshots = place.snapshots();
    let other = place.data.path().join("other");
    let id = unique_id("saved");
    {
        let _small = Small::mount(&snapshots, "64k");
        let run = place.ticking(&id, &["--snapshots"]);
        let done = place.call(&["snapshot", "create", &id, "s"]);
        done.assert_refused(FAILED, &[&id, "No space left"]);
        goes_on(&run);
        assert_eq!((place.names(), place.unsaved(&id)), (vec![], 0));
        place.end(run, &id);
    }
    // Full where it is copied to, and not where it is made.
    let run = place.ticking(&id, &["--snapshots"]);
    let _small = Small::mount(&other, "64k");
    let path = other.join("s");
    let done = place.call(&["snapshot", "create", &id, path.to_str().unwrap()]);
    done.assert_refused(FAILED, &["other", "No space left"]);
    goes_on(&run);
    assert_eq!(fs::read_dir(&other).unwrap().count(), 0);
    assert_eq!(place.unsaved(&id), 0);
    place.end(run, &id);
}

#[test]
fn a_snapshot_on_another_file_system_is_a_copy() {
    let place = Place::new();
    let other = place.data.path().join("other");
    let _small = Small::mount(&other, "64m");
    let id = unique_id("saved");
    let run = place.ticking(&id, &["--snapshots"]);
    let path = other.join("s");
    let name = path.to_str().unwrap();
    place.done(&["snapshot", "create", &id, name]);
    goes_on(&run);
    place.end(run, &id);
    let said = place.done(&["snapshot", "verify", name]);
    assert!(said.contains("pages are whole"), "{said}");
    let memory = fs::metadata(path.join("memory")).unwrap();
    assert!(memory.len() > 128 << 20 && memory.blocks() * 512 < 16 << 20);
}

/// However `snapshot create` ends before the VMM has written all, the machine goes on, and nothing is left.
#[test]
fn one_that_is_interrupted_leaves_nothing_and_the_machine_goes_on() {
    let place = Place::new();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let id = unique_id("saved");
        let run = place.ticking(&id, &["--snapshots"]);
        // The VMM waits for its broker, which makes the files.
        let record = place.casemate.record(&id).unwrap();
        let jailer = Pid::from_raw(record["jailer"]["pid"].as_i64().unwrap() as i32);
        kill(jailer, Signal::SIGSTOP).unwrap();
        let words = ["snapshot", "create", &id, "s"];
        let create = Running::start(place.casemate.command(&words), None).unwrap();
        let staged = place.snapshots().join(format!(".s.new-{}", create.pid()));
        while !staged.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
        // Until the VMM was asked. If it was not yet, the rest holds all the same.
        std::thread::sleep(Duration::from_millis(500));
        create.signal(signal).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        kill(jailer, Signal::SIGCONT).unwrap();
        assert_eq!(create.wait().unwrap().code, exit::by_signal(signal as i32));
        goes_on(&run);
        // The guard's part, when `create` was killed.
        while staged.exists() || place.unsaved(&id) > 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(place.names().is_empty(), "{:?}", place.names());
        place.done(&["snapshot", "create", &id, "s"]);
        place.done(&["snapshot", "rm", "s"]);
        place.end(run, &id);
    }
}

#[test]
fn a_machine_is_left_paused_when_asked_to() {
    let place = Place::new();
    let id = unique_id("saved");
    let run = place.ticking(&id, &["--snapshots"]);
    place.done(&["snapshot", "create", "--leave-paused", &id, "one"]);
    let said = ticks(&run);
    // One that is paused stays so.
    place.done(&["snapshot", "create", &id, "two"]);
    assert_eq!(ticks(&run), said);
    place.end(run, &id);
    assert_eq!(place.names(), ["one", "two"]);
}

#[test]
fn what_killed_processes_left_is_collected() {
    let place = Place::new();
    let id = unique_id("saved");
    let run = place.ticking(&id, &["--snapshots"]);
    place.done(&["snapshot", "create", &id, "kept"]);
    fs::create_dir(place.snapshots().join(".half.new-1")).unwrap();
    run.signal(Signal::SIGKILL).unwrap();
    run.wait().unwrap();
    assert!(place.snapshots().join(".new").join(&id).exists());
    assert_eq!(place.done(&["gc"]), format!("removed {id}\n"));
    assert!(!place.snapshots().join(".new").join(&id).exists());
    assert_eq!(place.names(), ["kept"]);
    place.casemate.assert_nothing_of(&id);
}

/// Machines that go on count on from where the first was, and are not there any more afterwards.
#[test]
fn clones_go_on_from_where_it_was() {
    let place = Place::new();
    let (id, clone) = (unique_id("saved"), unique_id("clone"));
    let run = place.ticking(&id, &["--snapshots"]);
    place.done(&["snapshot", "create", &id, "s"]);
    goes_on(&run);
    let clones = |words: &[&str]| {
        let words = [
            &[
                "clone",
                "--id",
                &clone,
                "--timeout",
                "4",
                "--stop-grace",
                "1",
            ],
            words,
        ]
        .concat();
        Running::start(place.casemate.command(&words), None).unwrap()
    };
    let one = clones(&["--snapshots", "s"]);
    one.wait_for_line("probe: tick").unwrap();
    let listed = place.done(&["ps", "--quiet"]);
    let mut listed: Vec<&str> = listed.lines().collect();
    listed.sort_unstable();
    assert_eq!(listed, [clone.as_str(), id.as_str()]);
    place.done(&["inspect", "--confinement", &clone]);
    // One that goes on can be saved, too.
    place.done(&["snapshot", "create", &clone, "again"]);
    let done = one.wait().unwrap();
    assert_eq!(done.code, 124, "{done:#?}");
    let first = done.stdout.lines().next().unwrap();
    let number: usize = first.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(number > 3, "{first}");
    place.casemate.assert_state_has_only(&id);

    let several = clones(&["-n", "3", "again"]).wait().unwrap();
    assert_eq!(several.code, 124, "{several:#?}");
    for number in 1..=3 {
        let own = format!("{clone}-{number}\tprobe: tick ");
        let lines = several
            .stdout
            .lines()
            .filter_map(|line| line.strip_prefix(&own));
        let ticks: Vec<usize> = lines.map(|tick| tick.parse().unwrap()).collect();
        assert!(ticks.len() > 3 && ticks[0] > 3, "{several:#?}");
        assert!(
            ticks.windows(2).all(|pair| pair[0] + 1 == pair[1]),
            "{ticks:?}"
        );
    }
    goes_on(&run);
    place.end(run, &id);
}

/// What cannot go on is refused in one line, and nothing is left of it.
#[test]
fn what_cannot_go_on_is_refused() {
    let place = Place::new();
    let (id, clone) = (unique_id("saved"), unique_id("clone"));
    let disk = place.data.path().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let disk = disk.to_str().unwrap();
    let run = place.ticking(&id, &["--snapshots", "--disk", disk]);
    place.done(&["snapshot", "create", &id, "s"]);
    let refused = |words: &[&str], said: &[&str]| {
        let words = [&["clone", "--id", &clone], words].concat();
        place.call(&words).assert_refused(FAILED, said);
    };
    refused(&["none"], &["none", "does not exist"]);
    refused(&["-n", "2", "s"], &[disk, "only one machine"]);
    refused(&["--net", "tap0", "s"], &["--net", "0 network cards"]);
    let bad = place.call(&["clone", "--id", "a/b", "s"]);
    bad.assert_refused(FAILED, &["--id"]);
    // The first machine has it.
    refused(&["s"], &["disk0"]);
    place.end(run, &id);
    let one = [
        "clone",
        "--id",
        &clone,
        "--timeout",
        "2",
        "--stop-grace",
        "1",
        "s",
    ];
    let done = place.call(&one);
    assert_eq!(done.code, 124, "{done:#?}");
    fs::File::options()
        .write(true)
        .open(disk)
        .unwrap()
        .write_all_at(&[1], 5)
        .unwrap();
    refused(&["s"], &[disk, "has changed since"]);

    let directory = place.snapshots().join("s");
    let state = fs::read(directory.join("state")).unwrap();
    fs::write(directory.join("state"), &state[..state.len() / 2]).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(&directory, open).unwrap();
    refused(&["s"], &["others than root"]);
    place.casemate.assert_nothing_of(&clone);
}

#[test]
fn a_snapshot_that_is_damaged_starts_nothing() {
    let place = Place::new();
    let (id, clone) = (unique_id("saved"), unique_id("clone"));
    let run = place.ticking(&id, &["--snapshots"]);
    place.done(&["snapshot", "create", &id, "s"]);
    place.end(run, &id);
    let state = place.snapshots().join("s/state");
    fs::File::options()
        .write(true)
        .open(&state)
        .unwrap()
        .set_len(1000)
        .unwrap();
    let done = place.call(&["clone", "--id", &clone, "s"]);
    done.assert_refused(FAILED, &["the VMM refuses the snapshot", "cut off"]);
    fs::remove_file(&state).unwrap();
    let done = place.call(&["clone", "--id", &clone, "s"]);
    assert_eq!(done.code, FAILED, "{done:#?}");
    assert!(done.stderr.contains("state"), "{done:#?}");
    place.casemate.assert_nothing_of(&clone);
}

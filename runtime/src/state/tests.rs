//! The life of machines on disk.

use super::*;

pub fn places() -> (tempfile::TempDir, Places) {
    let directory = tempfile::tempdir().unwrap();
    let places = Places {
        data: directory.path().join("data"),
        state: directory.path().join("state"),
        libexec: directory.path().to_path_buf(),
    };
    (directory, places)
}

// User ids that no process has: dropping a machine kills those of its user.
const RANGE: UidRange = UidRange {
    first: 4_000_000_000,
    last: 4_000_000_001,
};

// Another one, for the test that has processes: the tests beside it must not see its numbers taken.
const RANGE_WITH_PROCESSES: UidRange = UidRange {
    first: 4_000_000_002,
    last: 4_000_000_003,
};

fn create(places: &Places, id: &str) -> Result<Machine, Error> {
    create_in(RANGE, places, id)
}

fn create_in(range: UidRange, places: &Places, id: &str) -> Result<Machine, Error> {
    Machine::create(places, &id.parse().unwrap(), range, Traits::default())
}

#[test]
fn a_machine_is_there_until_dropped() {
    let (_guard, places) = places();
    let one = create(&places, "one").unwrap();
    assert_eq!(list(&places).len(), 1);
    assert_eq!(find(&places, "one").unwrap().uid, one.uid());
    assert!(matches!(create(&places, "one"), Err(Error::Running(_))));
    drop(one);
    assert!(matches!(find(&places, "one"), Err(Error::Unknown(_))));
    assert_eq!(fs::read_dir(places.machines()).unwrap().count(), 0);
}

#[test]
fn user_ids_are_distinct_and_recycled() {
    let (_guard, places) = places();
    let one = create(&places, "one").unwrap();
    let two = create(&places, "two").unwrap();
    assert_ne!(one.uid(), two.uid());
    assert!(matches!(create(&places, "three"), Err(Error::NoUidLeft(_))));
    assert!(!places.machine("three").exists());
    let freed = one.uid();
    drop(one);
    assert_eq!(create(&places, "three").unwrap().uid(), freed);
}

#[test]
fn what_a_killed_owner_left_is_collected() {
    let (_guard, places) = places();
    let one = create(&places, "one").unwrap();
    let uid = one.uid();
    // As after SIGKILL: the lock is free, all else is there.
    let stale = places.machine("stale");
    fs::create_dir(&stale).unwrap();
    let mut record = one.record.clone();
    record.id = "stale".parse().unwrap();
    record.uid = 4_000_000_001;
    fs::write(stale.join(RECORD), serde_json::to_vec(&record).unwrap()).unwrap();
    fs::write(uids::directory(&places).join("4000000001"), "stale").unwrap();

    assert_eq!(gc::run(&places).unwrap(), ["stale"]);
    assert!(!stale.exists());
    assert!(find(&places, "one").is_ok());
    let left: Vec<_> = fs::read_dir(uids::directory(&places))
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| name != "last")
        .collect();
    assert_eq!(left, [uid.to_string()]);
}

#[test]
fn a_number_that_is_anothers_is_neither_killed_for_nor_given_back() {
    use std::os::unix::process::CommandExt;
    let (_guard, places) = places();
    let one = create_in(RANGE_WITH_PROCESSES, &places, "one").unwrap();
    let stale = places.machine("stale");
    fs::create_dir(&stale).unwrap();
    // Its number was given back and is `one`'s now.
    let mut record = one.record.clone();
    record.id = "stale".parse().unwrap();
    fs::write(stale.join(RECORD), serde_json::to_vec(&record).unwrap()).unwrap();
    let mut sleeper = std::process::Command::new("/bin/sleep")
        .arg("60")
        .uid(one.uid())
        .spawn()
        .unwrap();
    assert_eq!(gc::run(&places).unwrap(), ["stale"]);
    assert_eq!(sleeper.try_wait().unwrap(), None);
    assert!(uids::is_of(&places, one.uid(), "one"));
    let uid = one.uid();
    drop(one);
    sleeper.wait().unwrap();
    assert!(!uids::is_of(&places, uid, "one"));
}

#[test]
fn what_cannot_be_removed_is_not_called_removed() {
    let (_guard, places) = places();
    let uid = RANGE.first;
    drop(lock_all(&places).unwrap());
    let stale = places.machine("stale");
    fs::create_dir(&stale).unwrap();
    fs::write(stale.join("kept"), "x").unwrap();
    // Not even root removes what something is mounted on.
    let mount = stale.join("mount");
    fs::create_dir(&mount).unwrap();
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("x"), &mount, Some("tmpfs"), flags, None::<&str>).unwrap();
    assert_eq!(gc::run(&places).unwrap(), Vec::<String>::new());
    assert!(matches!(create(&places, "stale"), Err(Error::Stuck(_))));
    assert!(mount.exists());
    assert!(!uids::is_of(&places, uid, "stale"));
    nix::mount::umount(&mount).unwrap();
    assert_eq!(gc::run(&places).unwrap(), ["stale"]);
}

#[test]
fn whoever_looks_is_not_in_the_way() {
    let (_guard, places) = places();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                list(&places);
            }
        });
        let all: Vec<_> = (0..200).map(|_| create(&places, "one").map(drop)).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for one in all {
            one.unwrap();
        }
    });
}

#[test]
fn ids_are_never_paths() {
    let (_guard, places) = places();
    for bad in ["..", "a/b", "", "."] {
        assert!(
            matches!(find(&places, bad), Err(Error::Unknown(_))),
            "{bad:?}"
        );
    }
}

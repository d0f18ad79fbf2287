//! Files that the broker of a real jail makes, and those that it does not.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::support::*;

/// A directory that the user may write to.
fn place(directory: &tempfile::TempDir, name: &str, user: u32) -> PathBuf {
    let path = directory.path().join(name);
    std::fs::create_dir_all(&path).unwrap();
    chown(&path, Some(user), Some(user)).unwrap();
    path
}

fn names(directory: &Path) -> Vec<String> {
    let all = std::fs::read_dir(directory).unwrap();
    let mut all: Vec<_> = all
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    all.sort();
    all
}

/// A request, and what it is answered or what the error says.
type Case = (String, Result<&'static str, &'static str>);

/// What the probe was answered must be this, or say this.
fn assert_answers(running: &Running, wanted: &[Case]) {
    for (index, (request, wanted)) in wanted.iter().enumerate() {
        let answer = &running.report["answers"][index];
        match wanted {
            Ok(word) => assert!(
                *answer == json!(word)
                    || answer["text"]
                        .as_str()
                        .is_some_and(|text| text.starts_with(word)),
                "{request}: {answer}"
            ),
            Err(part) => {
                let error = answer["error"].as_str().unwrap_or_default();
                assert!(error.contains(part), "{request}: {answer}");
            }
        }
    }
}

fn words(cases: &[Case]) -> Vec<&str> {
    let requests = cases.iter().map(|(request, _)| request.as_str());
    std::iter::once("broker").chain(requests).collect()
}

#[test]
fn a_broker_makes_files_where_it_may() {
    let directory = directory();
    let mut jail = Jail::new("create");
    let (user, id) = (jail.user, jail.id.clone());
    let snapshots = place(&directory, "snapshots", user);
    let chroot = place(&directory, &format!("jails/jail-probe/{id}/root"), user);
    let single = place(&directory, "single", user);
    let sub = place(&directory, "snapshots/sub", user);
    let old = snapshots.join("old");
    std::fs::write(&old, "old").unwrap();
    std::fs::write(directory.path().join("secret"), "secret").unwrap();
    symlink("../secret", snapshots.join("link")).unwrap();
    // Root's, beneath what is the machine's.
    std::fs::create_dir(snapshots.join("roots")).unwrap();
    let tree = snapshots.display().to_string();
    let one = single.join("one").display().to_string();
    jail = jail.args(&[
        "--allow-create",
        &format!("snap={tree}/"),
        "--allow-create",
        &one,
        "--allow-open",
        &directory.path().display().to_string(),
        "--chroot-base-dir",
        &directory.path().join("jails").display().to_string(),
    ]);
    let here = directory.path().display();
    let cases = [
        ("create:snap/new".into(), Ok("made")),
        ("read:snap/new".into(), Err("ENOENT")),
        ("create:snap/new".into(), Err("being made already")),
        ("commit:snap/new".into(), Ok("done")),
        ("read:snap/new".into(), Ok("xxx")),
        ("write:snap/new".into(), Ok("xxx")),
        ("commit:snap/new".into(), Err("is not being made")),
        ("create:snap/old".into(), Ok("made")),
        ("commit:snap/old".into(), Ok("done")),
        ("create:snap/sub/new".into(), Ok("made")),
        ("commit:snap/sub/new".into(), Ok("done")),
        ("create:snap/given-up".into(), Ok("made")),
        ("discard:snap/given-up".into(), Ok("done")),
        (format!("create:{one}"), Ok("made")),
        (format!("commit:{one}"), Ok("done")),
        (format!("read:{one}"), Ok("xxx")),
        ("create:/in-chroot".into(), Ok("made")),
        ("commit:/in-chroot".into(), Ok("done")),
        ("read:/in-chroot".into(), Ok("xxx")),
        ("read:snap/sub".into(), Err("neither a regular file")),
        ("create:snap/link".into(), Err("a symbolic link")),
        ("create:snap/sub".into(), Err("a directory")),
        ("create:snap/../secret".into(), Err("..")),
        (
            "create:snap/roots/x".into(),
            Err("must be able to read and to write"),
        ),
        ("create:snap/none/x".into(), Err("ENOENT")),
        // What may be opened may not be made; beneath the chroot there is no such directory.
        (format!("create:{here}/snapshots/other"), Err("ENOENT")),
        (format!("create:{one}er"), Err("ENOENT")),
        // Left when the machine ends.
        ("create:snap/pending".into(), Ok("made")),
    ];
    let running = jail.start(&words(&cases));
    assert_answers(&running, &cases);
    let made = std::fs::metadata(&old).unwrap();
    assert_eq!((made.uid(), made.gid(), made.len()), (user, user, 8192));
    assert_eq!(made.permissions().mode() & 0o7777, 0o600);
    assert_eq!(running.end(), 0);
    assert_eq!(names(&snapshots), ["link", "new", "old", "roots", "sub"]);
    assert_eq!(names(&sub), ["new"]);
    assert_eq!(names(&single), ["one"]);
    assert_eq!(names(&chroot), ["in-chroot"]);
}

#[test]
fn what_may_only_be_opened_is_not_made() {
    let directory = directory();
    let mut jail = Jail::new("create-no");
    let tree = place(&directory, "tree", jail.user);
    let path = tree.join("x").display().to_string();
    let flag = "--allow-create /";
    let cases = [
        (format!("create:{path}"), Err(flag)),
        ("create:/etc/passwd".into(), Err(flag)),
        (format!("commit:{path}"), Err("is not being made")),
    ];
    jail = jail.args(&["--allow-open", &tree.display().to_string()]);
    let running = jail.start(&words(&cases));
    assert_answers(&running, &cases);
    assert_eq!(running.end(), 0);
    assert!(names(&tree).is_empty());
}

#[test]
fn a_kill_leaves_what_was_there() {
    for whom in ["VMM", "broker"] {
        let directory = directory();
        let mut jail = Jail::new("create-kill");
        let tree = place(&directory, "tree", jail.user);
        std::fs::write(tree.join("old"), "old").unwrap();
        let path = tree.join("old").display().to_string();
        jail = jail.args(&[
            "--new-pid-ns",
            "--allow-create",
            &tree.display().to_string(),
        ]);
        let cases = [(format!("create:{path}"), Ok("made"))];
        let mut running = jail.start(&words(&cases));
        assert_answers(&running, &cases);
        let meanwhile = names(&tree);
        let vmm = running.vmm();
        if whom == "VMM" {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(vmm).unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL).unwrap();
            assert_eq!(running.end(), 128 + 9);
            assert_eq!(names(&tree), ["old"]);
        } else {
            running.child.kill().unwrap();
            running.child.wait().unwrap();
            eventually("the VMM ends", || !is_alive(vmm));
            // Where a file without a name could be had, nothing is left either.
            assert_eq!(names(&tree), meanwhile);
            assert!(
                meanwhile
                    .iter()
                    .all(|name| name == "old" || name.starts_with(".old.casemate-"))
            );
        }
        assert_eq!(std::fs::read_to_string(tree.join("old")).unwrap(), "old");
    }
}

#[test]
fn a_full_disk_is_named_and_loses_nothing() {
    use nix::mount::{MsFlags, mount};
    let directory = directory();
    let mut jail = Jail::new("create-full");
    let user = jail.user;
    let [small, few] = ["small", "few"].map(|name| place(&directory, name, user));
    // Mounts of this thread's, which go with it: the first has room for one page, the second for one more file.
    let running = std::thread::scope(|scope| {
        let mounted = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            for (path, options) in [(&small, "size=4096"), (&few, "nr_inodes=2")] {
                let options = format!("{options},mode=755,uid={user},gid={user}");
                mount(
                    Some("t"),
                    path,
                    Some("tmpfs"),
                    MsFlags::empty(),
                    Some(options.as_str()),
                )
                .unwrap();
            }
            std::fs::write(few.join("old"), "old").unwrap();
            let cases = [
                ("create:small/x".into(), Err("No space left")),
                ("discard:small/x".into(), Ok("done")),
                ("create:few/old".into(), Err("No space left")),
                ("read:few/old".into(), Ok("old")),
                ("create:few/new".into(), Err("ENOSPC")),
            ];
            std::fs::set_permissions(few.join("old"), std::fs::Permissions::from_mode(0o644))
                .unwrap();
            for path in [&small, &few] {
                let name = path.file_name().unwrap().to_str().unwrap();
                jail = jail.args(&["--allow-create", &format!("{name}={}", path.display())]);
            }
            let running = jail.start(&words(&cases));
            assert_answers(&running, &cases);
            assert_eq!(names(&few), ["old"]);
            assert!(names(&small).is_empty());
            running
        });
        mounted.join().unwrap()
    });
    assert_eq!(running.end(), 0);
}

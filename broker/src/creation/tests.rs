use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::policy::{AllowedName, PassedFile};

/// A directory `d` in which everything may be made under `/d`, and beside it a file that may be made as `one`.
struct Place {
    base: TempDir,
    policy: BrokerPolicy,
}

/// Both ways to make a file; the second as where files without names cannot be had.
const WAYS: [First; 2] = [make_unnamed, |_| Ok(None)];

fn open_directory(path: &Path) -> OwnedFd {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, Mode::empty()).unwrap()
}

impl Place {
    fn new() -> Self {
        // Best a file system that surely has files without names.
        let base = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        Self::at(base.unwrap())
    }

    fn at(base: TempDir) -> Self {
        let directory = base.path().join("d");
        fs::create_dir_all(directory.join("sub")).unwrap();
        let allowed = |name: &str, directory: &Path, file: Option<&str>, create| AllowedName {
            name: name.into(),
            directory: open_directory(directory),
            file: file.map(Into::into),
            create,
        };
        let policy = BrokerPolicy {
            allowed: vec![
                allowed("/d/readable", &directory, Some("readable"), false),
                allowed("/d", &directory, None, true),
                allowed("one", base.path(), Some("single"), true),
                allowed("/open", &directory, None, false),
            ],
            ..BrokerPolicy::default()
        };
        Self { base, policy }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    /// What is in the directory, hidden names too.
    fn names(&self) -> Vec<String> {
        let all = fs::read_dir(self.path("d")).unwrap();
        let all = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut all: Vec<String> = all.filter(|name| name != "sub").collect();
        all.sort();
        all
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Makes a file with this in it, in one of the ways.
    fn make(&self, way: First, name: &str, text: &str) -> Creations {
        let creation = Creation::new(&self.policy, name, way).unwrap();
        write(&creation.file, text);
        Creations(vec![creation])
    }

    fn refusal(&self, name: &str) -> String {
        let refused = Creations::default().create(&self.policy, name);
        refused.unwrap_err().to_string()
    }
}

fn write(file: &Arc<OwnedFd>, text: &str) {
    fs::File::from(file.try_clone().unwrap())
        .write_all(text.as_bytes())
        .unwrap();
}

#[test]
fn a_file_has_its_name_once_it_is_committed() {
    for way in WAYS {
        let place = Place::new();
        let mut making = place.make(way, "/d/x", "new");
        let visible = place.names();
        // Without a name, where this host has that for us, there is nothing to see at all.
        let directory = fs::File::open(place.path("d")).unwrap();
        let unnamed = way(directory.as_fd()).unwrap().is_some();
        assert_eq!(visible.is_empty(), unnamed, "{visible:?}");
        assert!(visible.iter().all(|name| name.starts_with(".x.casemate-")));
        making.commit("/d/x").unwrap();
        assert_eq!(
            (place.names(), place.read("d/x")),
            (vec!["x".into()], "new".into())
        );
        let found = fs::metadata(place.path("d/x")).unwrap();
        assert_eq!((found.mode() & 0o7777, found.nlink()), (0o600, 1));
        assert!(matches!(
            making.commit("/d/x"),
            Err(CreateError::NotMade(_))
        ));
        drop(making);
        assert_eq!(place.names(), ["x"]);
        // One that is there is replaced; until then it is what it was, and its other names stay.
        fs::hard_link(place.path("d/x"), place.path("d/other")).unwrap();
        let mut making = place.make(way, "/d/x", "newer");
        assert_eq!(place.read("d/x"), "new");
        making.commit("/d/x").unwrap();
        assert_eq!(place.names(), ["other", "x"]);
        assert_eq!(
            (place.read("d/x"), place.read("d/other")),
            ("newer".into(), "new".into())
        );
    }
}

#[test]
fn what_is_not_committed_leaves_nothing() {
    for way in WAYS {
        let place = Place::new();
        fs::write(place.path("d/x"), "old").unwrap();
        let mut making = place.make(way, "/d/x", "new");
        making.discard("/d/x").unwrap();
        assert_eq!(
            (place.names(), place.read("d/x")),
            (vec!["x".into()], "old".into())
        );
        assert!(matches!(
            making.discard("/d/x"),
            Err(CreateError::NotMade(_))
        ));
        drop(place.make(way, "/d/x", "new"));
        assert_eq!(
            (place.names(), place.read("d/x")),
            (vec!["x".into()], "old".into())
        );
    }
}

#[test]
fn one_for_each_name_and_four_at_once() {
    let place = Place::new();
    let mut making = Creations::default();
    let mut create = |name: &str| making.create(&place.policy, name).map(drop);
    create("/d/0").unwrap();
    assert!(
        create("/d/0")
            .unwrap_err()
            .to_string()
            .contains("being made already")
    );
    for name in ["/d/1", "/d/sub/2", "one"] {
        create(name).unwrap();
    }
    let error = create("/d/4").unwrap_err();
    assert!(error.to_string().contains("4 files"), "{error}");
    making.discard("/d/1").unwrap();
    making.create(&place.policy, "/d/4").unwrap();
    for name in ["one", "/d/sub/2"] {
        making.commit(name).unwrap();
    }
    assert!(place.path("single").exists() && place.path("d/sub/2").exists());
}

#[test]
fn only_a_regular_file_is_replaced() {
    let place = Place::new();
    fs::write(place.path("outside"), "old").unwrap();
    symlink("../outside", place.path("d/link")).unwrap();
    symlink("nowhere", place.path("d/dangling")).unwrap();
    let pipe = place.path("d/pipe");
    nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(place.path("d/socket")).unwrap();
    for (name, found) in [
        ("link", "a symbolic link"),
        ("dangling", "a symbolic link"),
        ("pipe", "a pipe"),
        ("socket", "a socket"),
        ("sub", "a directory"),
    ] {
        let text = place.refusal(&format!("/d/{name}"));
        assert!(text.contains(found), "{text}");
        // Nor if it comes while the file is made.
        for way in WAYS {
            let mut making = place.make(way, "/d/x", "new");
            fs::rename(place.path(&format!("d/{name}")), place.path("d/x")).unwrap();
            let text = making.commit("/d/x").unwrap_err().to_string();
            assert!(text.contains(found), "{text}");
            fs::rename(place.path("d/x"), place.path(&format!("d/{name}"))).unwrap();
            // The file is not lost by that.
            making.commit("/d/x").unwrap();
            fs::remove_file(place.path("d/x")).unwrap();
        }
    }
    assert_eq!(place.read("outside"), "old");
    assert!(place.names().iter().all(|name| !name.starts_with('.')));
}

#[test]
fn a_directory_that_is_swapped_meanwhile_changes_nothing() {
    for way in WAYS {
        let place = Place::new();
        fs::create_dir(place.path("elsewhere")).unwrap();
        fs::write(place.path("elsewhere/x"), "old").unwrap();
        let mut making = place.make(way, "/d/sub/x", "new");
        fs::rename(place.path("d/sub"), place.path("d/moved")).unwrap();
        symlink("../elsewhere", place.path("d/sub")).unwrap();
        making.commit("/d/sub/x").unwrap();
        assert_eq!(place.read("d/moved/x"), "new");
        assert_eq!(place.read("elsewhere/x"), "old");
        assert_eq!(fs::read_dir(place.path("d/moved")).unwrap().count(), 1);
        let text = place.refusal("/d/sub/x");
        assert!(text.contains("symbolic link leads there"), "{text}");
    }
}

#[test]
fn names_are_those_that_are_allowed_and_files() {
    let mut place = Place::new();
    place.policy.passed.push(PassedFile {
        name: "/d/passed".into(),
        file: Arc::new(fs::File::open("/dev/null").unwrap().into()),
        writable: true,
    });
    for (name, word) in [
        ("", "empty"),
        ("/d/../x", ".."),
        ("/d/x\0", "control"),
        ("/d/x/", "no file's name"),
        ("/d/x/.", "no file's name"),
        ("/d/passed", "cannot be replaced"),
        ("/d", "--allow-create /d"),
        ("/dx", "--allow-create /dx"),
        ("/open/x", "--allow-create /open/x"),
        ("single", "--allow-create single"),
        ("one/x", "--allow-create one/x"),
        ("/etc/passwd", "--allow-create /etc/passwd"),
        ("/d/none/x", "ENOENT"),
        ("/d/readable/x", "ENOTDIR"),
    ] {
        fs::write(place.path("d/readable"), "").unwrap();
        let text = place.refusal(name);
        assert!(text.contains(word), "{name:?}: {text}");
    }
    let long = format!("/d/{}", "é".repeat(127));
    for way in WAYS {
        place.make(way, &long, "").commit(&long).unwrap();
    }
    let text = place.refusal(&format!("/d/{}", "x".repeat(256)));
    assert!(text.contains("ENAMETOOLONG"), "{text}");
    let hidden = hidden_name(&"é".repeat(127));
    assert!(hidden.len() < 256 && hidden != hidden_name(&"é".repeat(127)));
}

#[test]
fn an_operators_chroot_and_a_user_without_a_jail_allow_it() {
    let place = Place::at(tempfile::tempdir().unwrap());
    let chroot = BrokerPolicy {
        chroot: Some(open_directory(&place.path("d"))),
        ..BrokerPolicy::default()
    };
    let unconfined = BrokerPolicy {
        unconfined: true,
        ..BrokerPolicy::default()
    };
    symlink("/tmp", place.path("d/out")).unwrap();
    let free = place.path("d/sub/free").display().to_string();
    for (policy, name, path) in [
        (&chroot, "/sub/x", "d/sub/x"),
        (&chroot, "y", "d/y"),
        (&unconfined, free.as_str(), "d/sub/free"),
    ] {
        for text in ["first", "second"] {
            let mut making = Creations::default();
            write(&making.create(policy, name).unwrap(), text);
            making.commit(name).unwrap();
            assert_eq!(place.read(path), text);
        }
    }
    let refused = Creations::default().create(&chroot, "/out/x");
    assert!(refused.unwrap_err().to_string().contains("ELOOP"));
    let refused = Creations::default().create(&unconfined, "/dev/null");
    assert!(refused.unwrap_err().to_string().contains("a device"));
}

#[test]
fn says_what_to_do_where_it_is_known() {
    let said = |source| refused("make", "x")(source).to_string();
    assert!(said(Errno::EACCES).contains("must be able to read and to write"));
    assert!(said(Errno::ENOSPC).contains("No space left"));
    assert!(said(Errno::ENOSPC).starts_with("cannot make \"x\": ENOSPC"));
}

//! Real jails of helpers, seen from inside by a shell and from outside.

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::*;

/// Dynamically linked, and needs nothing else.
const SHELL: &str = "/usr/bin/dash";
/// Goes on until its standard input ends.
const STAY: &str = "echo '{}'; read x";

fn helper(name: &str, program: &str) -> Jail {
    let (id, user) = (id(name), user());
    let mut command = Command::new(JAILER);
    command
        .args(["helper", "--id", &id, "--exec-file", program])
        .args(["--uid", &user.to_string(), "--gid", &user.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Jail { id, user, command }
}

fn shell(name: &str) -> Jail {
    helper(name, SHELL)
}

/// Every file and directory that a process sees, but its `/proc`.
fn everything(pid: u32) -> BTreeSet<PathBuf> {
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let (mut found, mut left) = (BTreeSet::new(), vec![root.clone()]);
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            let inside = Path::new("/").join(path.strip_prefix(&root).unwrap());
            if entry.file_type().unwrap().is_dir() {
                left.push(path);
            } else {
                found.insert(inside);
            }
        }
    }
    found
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn a_helper_sees_what_it_is_linked_with_and_given() {
    let directory = directory();
    let (data, image) = (
        directory.path().join("data"),
        directory.path().join("image"),
    );
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("file"), "x").unwrap();
    std::fs::write(directory.path().join("secret"), "x").unwrap();
    std::fs::write(&image, "x").unwrap();
    let jail = shell("sees").args(&["--bind-ro", &text(&data), "--bind-rw", &text(&image)]);
    let user = jail.user;
    let running = jail.start(&["-c", STAY]);
    let pid = running.vmm();
    let files = everything(pid);
    let own = [data.join("file"), image, SHELL.into(), "/dev/null".into()];
    let libraries: Vec<_> = files
        .difference(&own.into())
        .map(|path| text(path))
        .collect();
    assert_eq!(libraries.len(), 2, "{libraries:?}");
    assert!(libraries.iter().any(|path| path.ends_with("/libc.so.6")));
    assert!(libraries.iter().any(|path| path.contains("ld-linux")));
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    for line in mounts.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        let has = |option| fields[3].split(',').any(|one| one == option);
        let (is_image, is_null) = (fields[1].ends_with("/image"), fields[1] == "/dev/null");
        assert!(has("nosuid"), "{line}");
        assert_eq!(has("ro"), !is_image && !is_null, "{line}");
        assert_eq!(has("nodev"), !is_null, "{line}");
        let code = [SHELL, "ld-linux-x86-64.so.2", "libc.so.6"];
        let code = code.iter().any(|name| fields[1].ends_with(name));
        assert_eq!(has("noexec"), !code, "{line}");
    }
    assert_eq!(mounts.lines().count(), 7, "{mounts}");
    // Nothing of it is anywhere else.
    let here = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(
        !here.contains("/helper") && !here.contains("/image"),
        "{here}"
    );
    for half in [pid, running.child.id()] {
        assert_eq!(status(half, "Uid"), format!("{user} {user} {user} {user}"));
        assert_eq!(status(half, "Gid"), format!("{user} {user} {user} {user}"));
        assert_eq!(status(half, "Groups"), "");
        assert_eq!(status(half, "NoNewPrivs"), "1");
        eventually("it is sealed", || status(half, "Seccomp") == "2");
        for kind in ["net", "mnt", "ipc", "uts", "cgroup"] {
            let host = namespace(std::process::id(), kind);
            assert_ne!(namespace(half, kind), host, "{kind}");
        }
    }
    for kind in ["user", "pid"] {
        assert_ne!(namespace(pid, kind), namespace(running.child.id(), kind));
    }
    assert_eq!(everything(running.child.id()), BTreeSet::new());
    let map = |name| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    for map in [map("uid_map"), map("gid_map")] {
        let words: Vec<_> = map.split_whitespace().collect();
        assert_eq!(words, ["0", &user.to_string(), "1"]);
    }
    let interfaces = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    assert_eq!(interfaces.lines().count(), 3, "lo alone: {interfaces}");
    assert_eq!(running.end(), 1, "read at the end of its input");
}

#[test]
fn a_helper_does_what_it_may_and_no_more() {
    let directory = directory();
    let (data, image) = (
        directory.path().join("data"),
        directory.path().join("image"),
    );
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("file"), "hello").unwrap();
    std::fs::write(&image, "").unwrap();
    for path in [&data, &data.join("file"), &image] {
        let all = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(path, all).unwrap();
    }
    let (data, image) = (text(&data), text(&image));
    let tries = [
        (
            "reads",
            format!("read x < {data}/file; test \"$x\" = hello"),
            true,
        ),
        ("writes", format!("echo x > {image}"), true),
        ("null", "echo x > /dev/null".into(), true),
        ("writes-ro", format!("echo x > {data}/file"), false),
        ("creates-ro", format!("echo x > {data}/new"), false),
        ("creates", "echo x > /new".into(), false),
        ("replaces", format!("echo x > {SHELL}"), false),
        ("passwd", "read x < /etc/passwd".into(), false),
        ("upwards", "read x < ../../../../etc/passwd".into(), false),
        ("beside", format!("read x < {data}/../secret"), false),
        ("proc", "read x < /proc/self/status".into(), false),
        ("kvm", "read x < /dev/kvm".into(), false),
        ("forks", "(exit 0)".into(), false),
        ("lists", "set -- /*; test -e \"$1\"".into(), false),
    ];
    for (name, what, works) in tries {
        let jail = shell(name).args(&["--bind-ro", &data, "--bind-rw", &image]);
        let (code, said) = jail.finish(&["-c", &format!("{{ {what}; }} || exit 77")]);
        let expected = if works {
            code == 0
        } else {
            code == 77 || code == 2
        };
        assert!(expected, "{name}: {code} {said}");
    }
}

#[test]
fn a_helper_has_the_capabilities_that_it_was_given() {
    for (options, mask) in [
        (&[][..], "0000000000000000"),
        (
            &[
                "--cap",
                "chown",
                "--cap",
                "CAP_SYS_CHROOT",
                "--id-count",
                "1000",
            ],
            "0000000000040001",
        ),
    ] {
        let running = shell("caps").args(options).start(&["-c", STAY]);
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(running.vmm(), set), mask, "{set}");
            assert_eq!(status(running.child.id(), set), "0000000000000000", "{set}");
        }
        let map = std::fs::read_to_string(format!("/proc/{}/uid_map", running.vmm())).unwrap();
        let count = if options.is_empty() {
            " 1\n"
        } else {
            " 1000\n"
        };
        assert!(map.ends_with(count), "{map}");
    }
}

#[test]
fn sockets_are_descriptors_from_three_on() {
    let directory = directory();
    let paths = ["a", "b"].map(|name| text(&directory.path().join(name)));
    let jail = shell("listen").args(&["--listen", &paths[0], "--listen", &paths[1]]);
    let running = jail.start(&["-c", STAY]);
    let fds = format!("/proc/{}/fd", running.vmm());
    let mut open: Vec<_> = std::fs::read_dir(&fds)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    open.sort_unstable();
    assert_eq!(open, ["0", "1", "2", "3", "4"]);
    for path in &paths {
        let metadata = std::fs::metadata(path).unwrap();
        assert_eq!((metadata.uid(), metadata.mode() & 0o777), (0, 0o600));
        UnixStream::connect(path).unwrap();
    }
    let (code, said) = shell("listen2")
        .args(&["--listen", &paths[0]])
        .finish(&["-c", "exit"]);
    assert_eq!(code, 125);
    assert!(said.contains("remove it"), "{said}");
}

#[test]
fn a_helper_finds_itself_in_proc_and_nobody_else() {
    let jail = shell("proc").args(&["--proc"]);
    let inside = ": < /proc/self/stat && : < /proc/sys/fs/file-max && \
                  ! read x < /proc/1/stat && ! read x < /proc/stat && ! read x < /proc/sys/kernel/ostype";
    let (code, said) = jail.finish(&["-c", inside]);
    assert_eq!(code, 0, "{said}");
}

#[test]
fn its_end_is_the_jailers_end_and_the_other_way_round() {
    assert_eq!(shell("exit").finish(&["-c", "exit 9"]), (9, String::new()));
    let term = ["-c", "trap 'exit 7' TERM; echo '{}'; while :; do :; done"];
    let running = shell("term").start(&term);
    let parent = running.child.id();
    eventually("the parent serves", || status(parent, "Seccomp") == "2");
    let pid = nix::unistd::Pid::from_raw(parent as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).unwrap();
    assert_eq!(running.end(), 7);
    let mut running = shell("kill").start(&["-c", STAY]);
    let pid = running.vmm();
    running.child.kill().unwrap();
    running.child.wait().unwrap();
    eventually("the helper ends", || !is_alive(pid));
}

#[test]
fn a_helper_has_a_cgroup() {
    let jail = shell("cgroup").args(&["--cgroup", "pids.max=33"]);
    let id = jail.id.clone();
    let running = jail.start(&["-c", STAY]);
    let directories = cgroups_of(&id);
    assert_eq!(directories.len(), 1);
    let processes = std::fs::read_to_string(directories[0].join("cgroup.procs")).unwrap();
    assert!(
        processes
            .lines()
            .any(|line| line == running.vmm().to_string())
    );
    drop(running);
    assert_eq!(cgroups_of(&id), Vec::<PathBuf>::new());
}

#[test]
fn bad_input_is_refused_before_anything_is_made() {
    let directory = directory();
    let path = |name: &str| text(&directory.path().join(name));
    let file = |name: &str, bytes: &[u8], mode| {
        std::fs::write(path(name), bytes).unwrap();
        std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(mode)).unwrap();
        path(name)
    };
    let program = std::fs::read(SHELL).unwrap();
    let script = file("script", b"#!/bin/sh\n", 0o755);
    let setuid = file("setuid", &program, 0o4755);
    let plain = file("plain", b"x", 0o644);
    std::os::unix::fs::symlink(&plain, path("link")).unwrap();
    nix::unistd::mkfifo(path("fifo").as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let data = text(directory.path());
    let (link, fifo) = (path("link"), path("fifo"));
    let cases: [(&str, &[&str], i32, &str); 17] = [
        ("dash", &[], 2, "absolute"),
        (&script, &[], 125, "a script"),
        (&setuid, &[], 125, "setuid"),
        (&plain, &[], 125, "not an ELF program"),
        (&path("none"), &[], 125, "ENOENT"),
        (SHELL, &["--bind-ro", "data"], 2, "absolute"),
        (SHELL, &["--bind-ro", "/srv/../etc"], 2, "`..`"),
        (SHELL, &["--bind-ro", "/"], 2, "not the root"),
        (SHELL, &["--bind-ro", "/proc/self"], 2, "--proc"),
        (SHELL, &["--bind-ro", &link], 125, "symbolic link"),
        (SHELL, &["--bind-ro", &fifo], 125, "neither"),
        (
            SHELL,
            &["--bind-ro", &data, "--bind-rw", &plain],
            125,
            "bound too",
        ),
        (
            SHELL,
            &["--bind-ro", &plain, "--bind-rw", &plain],
            125,
            "bound twice",
        ),
        (SHELL, &["--cap", "sys_admin"], 2, "not one that a helper"),
        (SHELL, &["--id-count", "0"], 2, "1 or more"),
        (SHELL, &["--id-count", "4294967295"], 2, "do not exist"),
        (SHELL, &["--grant-ro", &plain], 2, "--grant-ro"),
    ];
    let socket = path("socket");
    for (program, options, code, word) in cases {
        let jail = helper("bad", program).args(&["--listen", &socket, "--cgroup", "pids.max=33"]);
        let id = jail.id.clone();
        let (got, said) = jail.args(options).finish(&["-c", "exit 55"]);
        assert_eq!(got, code, "{options:?}: {said}");
        assert!(
            said.contains(word) && said.lines().count() == 1,
            "{word}: {said}"
        );
        assert!(!Path::new(&socket).exists(), "{word}: a socket is left");
        assert!(cgroups_of(&id).is_empty(), "{word}: a cgroup is left");
    }
}

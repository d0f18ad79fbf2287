//! Real jails around a probe, seen from inside and from outside.

#[path = "support/creation.rs"]
mod creation;
#[path = "support/helper_jail.rs"]
mod helper_jail;
mod support;

use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};

use serde_json::{Value, json};
use support::*;

/// What must hold for each half of every jail, read from the kernel.
fn assert_confined(pid: u32, user: u32) {
    let ids = format!("{user} {user} {user} {user}");
    assert_eq!(status(pid, "Uid"), ids);
    assert_eq!(status(pid, "Gid"), ids);
    assert_eq!(status(pid, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    for kind in ["net", "mnt", "ipc", "uts", "cgroup"] {
        assert_ne!(
            namespace(pid, kind),
            namespace(std::process::id(), kind),
            "{kind}"
        );
    }
    let root = format!("/proc/{pid}/root");
    assert_eq!(
        std::fs::read_dir(&root).unwrap().count(),
        0,
        "the root is not empty"
    );
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for option in ["tmpfs", "ro,", "nosuid", "nodev", "noexec"] {
        assert!(mounts.contains(option), "{option} in {mounts}");
    }
}

#[test]
fn a_jail_without_a_broker() {
    let directory = directory();
    let (ro, rw) = (directory.path().join("ro"), directory.path().join("rw"));
    std::fs::write(&ro, "read").unwrap();
    std::fs::write(&rw, "write").unwrap();
    let (ro, rw) = (ro.display().to_string(), rw.display().to_string());
    // Left open by the caller, to leak if it can.
    let leak = std::fs::File::open("/etc/passwd").unwrap();
    let leak = nix::fcntl::fcntl(&leak, nix::fcntl::FcntlArg::F_DUPFD(100)).unwrap();
    let mut jail =
        Jail::new("plain").args(&["--grant-ro", &format!("config={ro}"), "--grant-rw", &rw]);
    jail.command.env("SECRET", "x");
    let user = jail.user;
    let id = jail.id.clone();
    let running = jail.start(&["report"]);
    let vmm = running.vmm();
    assert_eq!(
        vmm,
        running.child.id(),
        "no broker is needed, so there is no fork"
    );
    assert_confined(vmm, user);
    let report = &running.report;
    assert_eq!(report["id"], json!(id));
    assert_eq!(report["jailed"], json!(true));
    assert_eq!(report["uids"], json!([user, user, user]));
    assert_eq!(report["gids"], json!([user, user, user]));
    assert_eq!(report["groups"], json!(0));
    assert_eq!(report["environment"], json!(0));
    assert_eq!(report["contents"], json!({"config": "read", &rw: "write"}));
    assert_eq!(
        report["named"],
        json!([[rw, "FileRw"], ["config", "FileRo"], ["kvm", "Kvm"]])
    );
    let open = report["open"].as_array().unwrap();
    assert_eq!(
        open.len(),
        3 + 3 + 1,
        "streams, what is named, the table: {open:?}"
    );
    assert!(!open.contains(&json!(leak)));
    for attempt in report["attempts"].as_array().unwrap() {
        assert_eq!(attempt[1], json!(false), "{attempt}");
    }
    for what in ["create", "readdir", "chroot", "setuid"] {
        assert_eq!(report[what], json!(false), "{what}");
    }
    let lo = report["interfaces"].as_array().unwrap();
    assert_eq!((lo.len(), &lo[0][0]), (1, &json!("lo")), "{lo:?}");
    assert_eq!(lo[0][1].as_i64().unwrap() & 1, 0, "lo is up");
    assert_ne!(report["tcp"], Value::Null);
    assert_eq!(report["arguments"][0], json!("jail-probe"));
    assert_eq!(running.end(), 0);
    let _ = nix::unistd::close(leak);
}

#[test]
fn a_pid_namespace_of_its_own() {
    let jail = Jail::new("pidns").args(&["--new-pid-ns"]);
    let user = jail.user;
    let running = jail.start(&["report"]);
    assert_eq!(running.report["pid"], json!(1));
    assert_eq!(running.report["parent"], json!(0));
    let (vmm, parent) = (running.vmm(), running.child.id());
    assert_ne!(vmm, parent);
    assert_ne!(namespace(vmm, "pid"), namespace(std::process::id(), "pid"));
    // SIGTERM and SIGINT wait until it asks: the kernel would drop them before.
    assert_eq!(status(vmm, "SigBlk"), "0000000000004002");
    assert_confined(vmm, user);
    eventually("the parent is sealed", || status(parent, "Seccomp") == "2");
    assert_confined(parent, user);
    assert_eq!(running.end(), 0);
}

#[test]
fn the_exit_code_goes_through() {
    for (arguments, code) in [(&[][..], 10), (&["--new-pid-ns"][..], 11)] {
        let jail = Jail::new(&format!("exit{code}")).args(arguments);
        assert_eq!(
            jail.finish(&["exit", &code.to_string()]),
            (code, String::new())
        );
    }
}

#[test]
fn signals_go_through() {
    for name in ["SIGTERM", "SIGKILL"] {
        let running = Jail::new(name).args(&["--new-pid-ns"]).start(&["signal"]);
        let (vmm, parent) = (running.vmm(), running.child.id());
        eventually("the parent serves", || status(parent, "Seccomp") == "2");
        let pid = |number: u32| nix::unistd::Pid::from_raw(i32::try_from(number).unwrap());
        if name == "SIGTERM" {
            nix::sys::signal::kill(pid(parent), nix::sys::signal::SIGTERM).unwrap();
            assert_eq!(running.end(), 12);
        } else {
            nix::sys::signal::kill(pid(vmm), nix::sys::signal::SIGKILL).unwrap();
            assert_eq!(running.end(), 128 + 9);
        }
    }
}

#[test]
fn the_vmm_ends_with_its_broker() {
    let mut running = Jail::new("orphan")
        .args(&["--new-pid-ns"])
        .start(&["report"]);
    let vmm = running.vmm();
    running.child.kill().unwrap();
    running.child.wait().unwrap();
    eventually("the VMM ends", || !is_alive(vmm));
}

#[test]
fn the_vmm_dies_with_the_caller_if_asked() {
    let jail = Jail::new("with-caller").args(&["--die-with-parent", "--new-pid-ns"]);
    let (user, id) = (jail.user.to_string(), jail.id.clone());
    // A shell in between, which is killed.
    let script = format!(
        "{JAILER} --id {id} --exec-file {PROBE} --uid {user} --gid {user} --die-with-parent -- signal & wait"
    );
    let mut shell = std::process::Command::new("/bin/sh")
        .args(["-c", &script])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0];
    shell.stdout.take().unwrap().read_exact(&mut byte).unwrap();
    let vmm = children(shell.id())[0];
    assert!(is_alive(vmm));
    shell.kill().unwrap();
    shell.wait().unwrap();
    eventually("the VMM ends", || !is_alive(vmm));
}

#[test]
fn a_caller_that_was_gone_before_is_noticed() {
    for more in [&[][..], &["--new-pid-ns"]] {
        let own = std::process::id();
        let (code, text) = Jail::new("gone")
            .args(&[&format!("--die-with-parent={own}")])
            .args(more)
            .finish(&["exit", "3"]);
        assert_eq!((code, text.as_str()), (3, ""));
        // As when the caller has ended and another process is the jailer's parent by now.
        let (code, text) = Jail::new("gone")
            .args(&["--die-with-parent=999999999"])
            .args(more)
            .finish(&["exit", "3"]);
        assert_eq!(code, 125);
        assert!(text.contains("has ended"), "{text}");
    }
}

/// `/proc/<pid>/stat`, field 19 and on: nice value, …, real-time priority (40), policy (41).
fn scheduling(pid: u32) -> (String, String) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    (fields[16].to_owned(), fields[38].to_owned())
}

#[test]
fn a_callers_advantages_are_not_the_guests() {
    let mut tried = false;
    for starter in [&["nice", "-n", "-5"][..], &["chrt", "-f", "1"]] {
        let jail = Jail::new("sched");
        let mut command = std::process::Command::new(starter[0]);
        command.args(&starter[1..]).arg(JAILER);
        command.args(jail.command.get_args()).args(["--", "signal"]);
        command.stdout(std::process::Stdio::piped());
        // Not every root may give such advantages; what cannot be given cannot be passed on.
        let probe = std::process::Command::new(starter[0])
            .args(&starter[1..])
            .args(["grep", "-q", "Threads", "/proc/self/status"])
            .stderr(std::process::Stdio::null())
            .status();
        if !probe.is_ok_and(|status| status.success()) {
            continue;
        }
        tried = true;
        let mut child = command.spawn().unwrap();
        let mut byte = [0];
        child.stdout.take().unwrap().read_exact(&mut byte).unwrap();
        let (nice, policy) = scheduling(child.id());
        let _ = child.kill();
        let _ = child.wait();
        assert_eq!((nice.as_str(), policy.as_str()), ("0", "0"), "{starter:?}");
    }
    if !tried {
        eprintln!("neither nice nor chrt may give an advantage here");
    }
}

/// A host program behind port 5000, allowed to the machine's user; what it receives.
fn listen(path: &str, user: u32) -> std::thread::JoinHandle<String> {
    let listener = UnixListener::bind(path).unwrap();
    std::os::unix::fs::chown(path, Some(user), Some(user)).unwrap();
    std::thread::spawn(move || {
        let mut text = String::new();
        listener
            .accept()
            .unwrap()
            .0
            .read_to_string(&mut text)
            .unwrap();
        text
    })
}

#[test]
fn the_broker_opens_and_connects_what_it_may() {
    let directory = directory();
    let base = directory.path().display().to_string();
    let file = |name: &str, mode| {
        let path = format!("{base}/{name}");
        std::fs::create_dir_all(std::path::Path::new(&path).parent().unwrap()).unwrap();
        std::fs::write(&path, name).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    let passed = file("passed", 0o600);
    let allowed = file("allowed", 0o666);
    let sibling = file("sibling", 0o666);
    let beneath = file("tree/sub/beneath", 0o644);
    let secret = file("tree/secret", 0o600);
    let tree = format!("{base}/tree");
    let later = format!("{base}/tree/later");
    let socket = format!("{base}/v.sock");
    let mut jail = Jail::new("broker");
    let (user, id) = (jail.user, jail.id.clone());
    let chroot = format!("{base}/jails/jail-probe/{id}/root");
    let inside = file(&format!("jails/jail-probe/{id}/root/img/inside"), 0o644);
    std::os::unix::fs::symlink("/etc/passwd", format!("{chroot}/link")).unwrap();
    nix::unistd::mkfifo(
        format!("{chroot}/fifo").as_str(),
        nix::sys::stat::Mode::from_bits_truncate(0o666),
    )
    .unwrap();
    let host = listen(&format!("{socket}_5000"), user);
    jail = jail.args(&[
        "--grant-listen",
        &socket,
        "--grant-ro",
        &passed,
        "--allow-open",
        &allowed,
        "--allow-open",
        &tree,
        "--chroot-base-dir",
        &format!("{base}/jails"),
    ]);
    let cases: Vec<(String, Result<&str, &str>)> = vec![
        (format!("connect:{socket}:5000"), Ok("connected")),
        (format!("connect:{socket}:5001"), Err("ENOENT")),
        (format!("connect:{socket}:4294967295"), Err("port")),
        (format!("connect:{socket}/../v.sock:5000"), Err("..")),
        ("connect:/run/other.sock:5000".into(), Err("--grant-listen")),
        (format!("read:{passed}"), Ok("passed")),
        (format!("write:{passed}"), Err("--grant-rw")),
        (format!("write:{allowed}"), Ok("allowed")),
        (format!("read:{sibling}"), Err("--allow-open")),
        (format!("read:{beneath}"), Ok("tree/sub/beneath")),
        (format!("read:{tree}"), Err("--allow-open")),
        // Landlock is before the check: the broker cannot open a directory at all.
        (format!("read:{tree}/sub"), Err("EACCES")),
        (format!("read:{tree}/../sibling"), Err("..")),
        (format!("read:{secret}"), Err("EACCES")),
        (format!("read:{later}"), Err("ENOENT")),
        (
            "read:/img/inside".into(),
            Ok(inside.strip_prefix(&format!("{base}/")).unwrap()),
        ),
        (
            "read:img/inside".into(),
            Ok(inside.strip_prefix(&format!("{base}/")).unwrap()),
        ),
        ("read:/link".into(), Err("ELOOP")),
        ("read:/fifo".into(), Err("neither")),
        ("read:/etc/passwd".into(), Err("--allow-open")),
        ("read:/".into(), Err("")),
        ("read:.".into(), Err("")),
    ];
    let mut words = vec!["broker"];
    words.extend(cases.iter().map(|(request, _)| request.as_str()));
    let running = jail.start(&words);
    let parent = running.child.id();
    assert_confined(parent, user);
    assert_confined(running.vmm(), user);
    // The broker's is where it connects to.
    let link = |name| std::fs::read_link(format!("/proc/{}/{name}", running.vmm())).unwrap();
    assert_eq!(link("cwd"), link("root"));
    assert_eq!(status(parent, "Seccomp"), "2");
    for (index, (request, wanted)) in cases.iter().enumerate() {
        let answer = &running.report["answers"][index];
        match wanted {
            Ok(text) => assert!(
                answer == &json!(text) || answer["text"] == json!(text),
                "{request}: {answer}"
            ),
            Err(part) => {
                let error = answer["error"]
                    .as_str()
                    .unwrap_or_else(|| panic!("{request}: {answer}"));
                assert!(error.contains(part), "{request}: {error}");
            }
        }
    }
    // A directory's descriptor is the broker's alone.
    for entry in std::fs::read_dir(format!("/proc/{}/fd", running.vmm())).unwrap() {
        let path = entry.unwrap().path();
        if let Ok(metadata) = std::fs::metadata(&path) {
            assert!(!metadata.is_dir(), "{path:?}");
        }
    }
    assert_eq!(host.join().unwrap(), "from the jail");
    assert_eq!(running.end(), 0);
}

#[test]
fn a_broken_request_ends_the_conversation_and_not_the_machine() {
    let directory = directory();
    let socket = format!("{}/v.sock", directory.path().display());
    let running = Jail::new("broken")
        .args(&["--grant-listen", &socket])
        .start(&["misbehave"]);
    let gone = running.report["gone"].as_str().unwrap();
    assert!(gone.contains("ended"), "{gone}");
    assert!(is_alive(running.vmm()));
    assert_eq!(running.end(), 0);
}

#[test]
fn a_listener_is_the_machines() {
    let directory = directory();
    let socket = format!("{}/v.sock", directory.path().display());
    let jail = Jail::new("listen").args(&["--grant-listen", &format!("v={socket}")]);
    let user = jail.user;
    let running = jail.start(&["accept", "v"]);
    let metadata = std::fs::metadata(&socket).unwrap();
    assert_eq!(
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o777),
        (user, user, 0o600)
    );
    let mut text = [0; 5];
    UnixStream::connect(&socket)
        .unwrap()
        .read_exact(&mut text)
        .unwrap();
    assert_eq!(&text, b"hello");
    assert_eq!(running.end(), 0);
    // Its name stays for the caller to remove; until then nobody else gets it.
    let (code, text) = Jail::new("again")
        .args(&["--grant-listen", &socket])
        .finish(&["exit", "0"]);
    assert_eq!(code, 125);
    assert!(text.contains("remove it"), "{text}");
}

#[test]
fn a_daemon_reports_how_it_went() {
    let directory = directory();
    let path = directory.path().join("log");
    let log = std::fs::File::create(&path).unwrap();
    // `signal` keeps the probe alive without standard input.
    let jail = Jail::new("daemon").args(&["--daemonize", "--new-pid-ns"]);
    let (id, user) = (jail.id.clone(), jail.user);
    let (code, text) = jail.finish(&["signal"]);
    assert_eq!((code, text.as_str()), (0, ""));
    drop(log);
    let mut daemons = Vec::new();
    eventually("the daemon runs", || {
        daemons = processes_with(&id);
        daemons.len() == 1
    });
    let vmm = daemons[0];
    let parent: u32 = status(vmm, "PPid").parse().unwrap();
    for pid in [vmm, parent] {
        for stream in 0..3 {
            let target = std::fs::read_link(format!("/proc/{pid}/fd/{stream}")).unwrap();
            assert!(target.ends_with("null"), "{target:?}");
        }
        assert_confined(pid, user);
    }
    eventually("the parent serves", || status(parent, "Seccomp") == "2");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(parent).unwrap()),
        nix::sys::signal::SIGTERM,
    )
    .unwrap();
    eventually("the daemon ends", || !is_alive(vmm));

    let (code, text) = Jail::new("daemon2")
        .args(&["--daemonize", "--grant-ro", "/nowhere"])
        .finish(&["signal"]);
    assert_eq!(code, 125);
    assert!(text.contains("/nowhere"), "{text}");
}

#[test]
fn what_a_daemon_says_goes_to_its_log() {
    let directory = directory();
    let path = directory.path().join("log");
    let log = std::fs::File::create(&path).unwrap();
    let number = nix::fcntl::fcntl(&log, nix::fcntl::FcntlArg::F_DUPFD(400)).unwrap();
    for more in [&[][..], &["--new-pid-ns"]] {
        let log_fd = number.to_string();
        let jail = Jail::new("daemon-log").args(&["--daemonize", "--log-fd", &log_fd]);
        let jail = jail.args(more);
        let id = jail.id.clone();
        // No code: it panics, as a VMM refuses a bad config.
        let (code, text) = jail.finish(&["exit", "nonsense"]);
        assert_eq!((code, text.as_str()), (0, ""));
        let said = || std::fs::read_to_string(&path).unwrap();
        eventually("the daemon ends", || processes_with(&id).is_empty());
        eventually("its last words are there", || {
            said().contains("ParseIntError")
        });
        std::fs::write(&path, "").unwrap();
    }
    let _ = nix::unistd::close(number);
}

#[test]
fn a_daemon_that_cannot_fork_says_so() {
    // The caller's side of the hand-over has no room for the descriptors of the halves.
    let jail = Jail::new("daemon-fork").args(&["--daemonize", "--new-pid-ns"]);
    let mut limited = std::process::Command::new("/bin/sh");
    limited.args(["-c", "ulimit -n 8; exec \"$0\" \"$@\"", JAILER]);
    limited.args(jail.command.get_args());
    let output = limited.args(["--", "signal"]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("fork"), "{text}");
}

/// VMMs (not jailers) whose command line has this id.
fn processes_with(id: &str) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        (words.first() == Some(&&b"jail-probe"[..]) && words.contains(&id.as_bytes()))
            .then_some(pid)
    })
    .collect()
}

#[test]
fn the_log_descriptor_goes_across() {
    let directory = directory();
    let log = std::fs::File::create(directory.path().join("log")).unwrap();
    let number = nix::fcntl::fcntl(&log, nix::fcntl::FcntlArg::F_DUPFD(200)).unwrap();
    let running = Jail::new("log")
        .args(&["--log-fd", &number.to_string()])
        .start(&["report"]);
    let _ = nix::unistd::close(number);
    assert_eq!(
        running.report["named"],
        json!([["kvm", "Kvm"], ["log", "Log"]])
    );
    assert!(
        running.report["open"]
            .as_array()
            .unwrap()
            .contains(&json!(number))
    );
    // Nobody overwrites what is in the log already, wherever the probe would write.
    let flags = std::fs::read_to_string(format!("/proc/{}/fdinfo/{number}", running.vmm()));
    let flags = flags.unwrap();
    let flags = flags.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = i32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
    assert_eq!(flags & 0o2000, 0o2000, "O_APPEND in {flags:o}");
    assert_eq!(running.end(), 0);
    let (code, text) = Jail::new("nolog")
        .args(&["--log-fd", "987"])
        .finish(&["report"]);
    assert_eq!(code, 125);
    assert!(text.contains("--log-fd 987"), "{text}");
}

#[test]
fn limits_hold() {
    let running = Jail::new("limits")
        .args(&["--resource-limit", "no-file=77"])
        .start(&["report"]);
    assert_eq!(running.report["no_file"], json!([77, 77]));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", running.vmm())).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core"))
        .unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("1"), "{core}");
    assert_eq!(running.end(), 0);
}

/// Soft and hard limit on the size of a file.
fn file_size_limit(running: &Running) -> [String; 2] {
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", running.vmm())).unwrap();
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max file size"));
    let mut words = line.unwrap().split_whitespace().map(str::to_owned);
    [words.next().unwrap(), words.next().unwrap()]
}

#[test]
fn disks_do_not_grow() {
    let directory = directory();
    let disk = |name: &str, size: u64| {
        let path = directory.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        path.display().to_string()
    };
    let (small, large) = (disk("small", 5000), disk("large", 123_456));
    let base = directory.path().display().to_string();
    let log = std::fs::File::create(directory.path().join("log")).unwrap();
    let log = nix::fcntl::fcntl(&log, nix::fcntl::FcntlArg::F_DUPFD(300))
        .unwrap()
        .to_string();
    let unlimited = {
        let limit = nix::sys::resource::Resource::RLIMIT_FSIZE;
        nix::sys::resource::getrlimit(limit).unwrap().1 == nix::sys::resource::RLIM_INFINITY
    };
    let none = if unlimited { "unlimited" } else { "" };
    let cases: &[(&[&str], &str)] = &[
        (&[], "0"),
        (&["--new-pid-ns", "--grant-ro", &large], "0"),
        (&["--grant-rw", &small, "--grant-rw", &large], "123456"),
        (&["--grant-rw", &large, "--resource-limit", "fsize=7"], "7"),
        (&["--grant-rw", &large, "--log-fd", &log], none),
        (&["--grant-rw", &large, "--allow-open", &base], none),
        (&["--grant-rw", &large, "--allow-create", &base], none),
    ];
    for (arguments, limit) in cases {
        let running = Jail::new("growth").args(arguments).start(&["signal"]);
        if !limit.is_empty() {
            assert_eq!(file_size_limit(&running), [*limit, *limit], "{arguments:?}");
        }
    }
    let _ = nix::unistd::close(log.parse::<i32>().unwrap());
}

#[test]
fn bad_input_is_one_line_and_leaves_nothing() {
    let directory = directory();
    let base = directory.path().display().to_string();
    let file = format!("{base}/file");
    std::fs::write(&file, "x").unwrap();
    std::os::unix::fs::symlink(&file, format!("{base}/link")).unwrap();
    std::os::unix::fs::symlink(&base, format!("{base}/dirlink")).unwrap();
    std::fs::write(format!("{base}/script"), "#!/bin/sh\n").unwrap();
    let link = format!("{base}/link");
    let through = format!("{base}/dirlink/file");
    let listen_through = format!("{base}/dirlink/v.sock");
    let script = format!("{base}/script");
    let fifo = format!("{base}/fifo");
    nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let socket = format!("{base}/v.sock");
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--uid", "0"], 2, "--uid"),
        (&["--id", "../x"], 2, "--id"),
        (&["--grant-ro", "/nowhere"], 125, "/nowhere"),
        (&["--grant-ro", "/"], 125, "directory"),
        (&["--grant-rw", &base], 125, "directory"),
        (&["--grant-ro", "/dev/null"], 125, "neither"),
        (&["--grant-ro", &link], 125, "symbolic link"),
        (&["--grant-rw", &through], 125, "symbolic link"),
        (&["--grant-listen", &listen_through], 125, "symbolic link"),
        (&["--grant-listen", &file], 125, "remove it"),
        (&["--allow-open", &through], 125, "symbolic link"),
        (&["--allow-create", &through], 125, "symbolic link"),
        (&["--allow-create", "/nowhere/"], 125, "/nowhere/"),
        (&["--exec-file", &through], 125, "symbolic link"),
        (&["--exec-file", "/nowhere"], 125, "/nowhere"),
        (&["--exec-file", &script], 125, "statically"),
        (&["--exec-file", &base], 125, "regular file"),
        (&["--chroot-base-dir", &through], 125, "chroot"),
        (&["--netns", "/nowhere"], 125, "/nowhere"),
        (&["--netns", &file], 125, "network namespace"),
        (&["--netns", &fifo], 125, "network namespace"),
        (
            &["--grant-tap", "jtnone0", "--grant-listen", &socket],
            125,
            "no such interface",
        ),
        (&["--cgroup", "nosuch.max=1"], 125, "nosuch"),
        (&["--cgroup", "pids.nosuch=1"], 125, "pids.nosuch"),
        (&["--cgroup", "pids.max=nonsense"], 125, "nonsense"),
        (
            &["--cgroup", "pids.max=9", "--grant-tap", "jtnone0"],
            125,
            "no such interface",
        ),
    ];
    for (arguments, code, word) in cases {
        let jail = Jail::new("bad").args(arguments);
        let id = jail.id.clone();
        let mut jail = jail;
        jail.command
            .arg("--")
            .arg("report")
            .stdin(std::process::Stdio::null());
        let output = jail.command.output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(*code), "{arguments:?}: {text}");
        assert!(output.stdout.is_empty(), "the VMM has run: {arguments:?}");
        assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
        assert!(text.contains(word), "{arguments:?}: {text}");
        let left = cgroups_of(&id);
        remove_cgroups(&left);
        assert_eq!(
            left,
            Vec::<std::path::PathBuf>::new(),
            "{arguments:?} leaves cgroups"
        );
        assert!(
            !std::path::Path::new(&socket).exists(),
            "{arguments:?} leaves a socket"
        );
    }
}

#[test]
fn cgroups_hold_the_machine() {
    let running = Jail::new("cgroup").args(&[
        "--cgroup",
        "pids.max=33",
        "--cgroup",
        "memory.max=64M",
        "--cgroup-if-there",
        "memory.nosuch=1",
        "--new-pid-ns",
    ]);
    // Version 1 has other names for memory.
    let running = if has_unified_memory() {
        running
    } else {
        let jail = Jail::new("cgroup");
        jail.args(&[
            "--cgroup",
            "pids.max=33",
            "--cgroup",
            "memory.limit_in_bytes=64M",
            "--cgroup",
            "cpuset.cpus=0",
            "--cgroup-if-there",
            "memory.nosuch=1",
            "--new-pid-ns",
        ])
    };
    let id = running.id.clone();
    let running = running.start(&["report"]);
    let directories = cgroups_of(&id);
    assert!(!directories.is_empty());
    let holds = |name: &str, value: &str| {
        directories.iter().any(|directory| {
            std::fs::read_to_string(directory.join(name)).is_ok_and(|text| text.trim() == value)
        })
    };
    assert!(holds("pids.max", "33"));
    assert!(holds("memory.max", "67108864") || holds("memory.limit_in_bytes", "67108864"));
    for directory in &directories {
        let processes = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap();
        let processes: Vec<u32> = processes
            .lines()
            .map(|line| line.parse().unwrap())
            .collect();
        assert!(processes.contains(&running.vmm()) && processes.contains(&running.child.id()));
        assert_eq!(
            directory.parent().unwrap().file_name().unwrap(),
            "jail-probe"
        );
    }
    // A second machine of this id is refused, and takes nothing away.
    let (code, text) = {
        let mut jail = Jail::new("cgroup").args(&["--cgroup", "pids.max=33"]);
        jail.command
            .arg("--")
            .arg("report")
            .stdin(std::process::Stdio::null());
        let output = jail.command.output().unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    assert_eq!(code, 125);
    assert!(text.contains("runs in this cgroup"), "{text}");
    assert!(directories.iter().all(|directory| directory.exists()));
    assert_eq!(running.end(), 0);
    remove_cgroups(&directories);
    assert_eq!(cgroups_of(&id), Vec::<std::path::PathBuf>::new());
}

fn has_unified_memory() -> bool {
    std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
        .is_ok_and(|text| text.contains("memory"))
}

/// A network namespace with a tap in it, gone at the end.
struct Netns(String);

impl Netns {
    fn new(name: &str) -> Self {
        let name = format!("jt{}{name}", std::process::id());
        ip(&["netns", "add", &name]);
        let netns = Self(name);
        ip(&["-n", &netns.0, "tuntap", "add", "jtap0", "mode", "tap"]);
        let several = ["tuntap", "add", "jmulti0", "mode", "tap", "multi_queue"];
        ip(&[&["-n", &netns.0][..], &several].concat());
        ip(&["-n", &netns.0, "link", "add", "jdummy0", "type", "bridge"]);
        netns
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.0]);
    }
}

fn ip(arguments: &[&str]) {
    let output = std::process::Command::new("ip").args(arguments).output();
    let output = output.expect("`ip` is needed: install iproute2");
    assert!(
        output.status.success(),
        "ip {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_tap_has_several_queues() {
    let netns = Netns::new("m");
    let path = format!("/var/run/netns/{}", netns.0);
    for (grant, names) in [
        ("net0=jmulti0:3", &["kvm", "net0", "net0:1", "net0:2"][..]),
        ("jmulti0:1", &["jmulti0", "kvm"]),
        ("jmulti0", &["jmulti0", "kvm"]),
    ] {
        let jail = Jail::new("taps").args(&["--netns", &path, "--grant-tap", grant]);
        let running = jail.start(&["report"]);
        let named = running.report["named"].as_array().unwrap();
        let found: Vec<_> = named.iter().map(|pair| pair[0].as_str().unwrap()).collect();
        assert_eq!(found, names);
        assert_eq!(running.end(), 0);
    }
}

#[test]
fn a_tap_comes_from_its_namespace_and_the_vmm_does_not() {
    let netns = Netns::new("a");
    // By its usual name, which on many hosts goes through a symbolic link.
    let path = format!("/var/run/netns/{}", netns.0);
    let jail = Jail::new("tap").args(&["--netns", &path, "--grant-tap", "net0=jtap0"]);
    let user = jail.user;
    let running = jail.start(&["report"]);
    assert_eq!(
        running.report["named"],
        json!([["kvm", "Kvm"], ["net0", "Tap"]])
    );
    let lo = running.report["interfaces"].as_array().unwrap();
    assert_eq!((lo.len(), &lo[0][0]), (1, &json!("lo")), "{lo:?}");
    assert_confined(running.vmm(), user);
    let inode = std::fs::metadata(&path).unwrap().ino();
    assert_ne!(
        namespace(running.vmm(), "net"),
        std::path::Path::new(&format!("net:[{inode}]"))
    );

    // While it is in use, no second machine gets it; nor one that is no tap, or is not there.
    for (name, word) in [
        ("jtap0", "uses this tap"),
        ("jdummy0", "not a tap"),
        ("jtap0:2", "not a tap interface, or one with a single queue"),
        ("jtap1", "no such interface"),
    ] {
        let (code, text) = Jail::new("tap2")
            .args(&["--netns", &path, "--grant-tap", name])
            .finish(&["report"]);
        assert_eq!(code, 125, "{name}");
        assert!(text.contains(word), "{name}: {text}");
    }
    assert_eq!(running.end(), 0);
    let list = std::process::Command::new("ip")
        .args(["-n", &netns.0, "link"])
        .output()
        .unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    assert!(list.contains("jtap0") && !list.contains("jtap1"), "{list}");
}

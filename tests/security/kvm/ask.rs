//! Attacks on the broker: what was not granted is not had, and no flood or nonsense ends the machine.

use std::os::unix::net::UnixListener;

use crate::outside::*;

/// A jail with a broker, and what it may open: `disk`, and `tree` with what is in it.
fn jail() -> Jail {
    let jail = Jail::new();
    let disk = jail.file("disk", "disk");
    jail.file("secret", "secret");
    jail.file("tree/ok", "ok");
    jail.file("tree/sub/ok", "sub ok");
    std::os::unix::fs::symlink("../secret", jail.path("tree/link")).unwrap();
    std::os::unix::fs::symlink("/etc", jail.path("tree/etc")).unwrap();
    let fifo = jail.path("tree/fifo");
    nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (socket, tree) = (jail.path("v.sock"), jail.path("tree"));
    jail.args(&[
        "--new-pid-ns",
        "--grant-ro",
        &format!("disk={disk}"),
        "--grant-listen",
        &format!("v={socket}"),
        "--allow-open",
        &tree,
    ])
}

/// Has a prisoner ask all of it, and looks at the answers.
#[track_caller]
fn ask(jail: Jail, cases: &[(String, &str)]) {
    let mut words = vec!["ask"];
    words.extend(cases.iter().map(|(word, _)| word.as_str()));
    let mut running = jail.start(&words);
    running.wait_for_line("stays").unwrap();
    running.close_stdin();
    let done = running.wait().unwrap();
    assert_eq!(done.code, 0, "{done:#?}");
    assert_answers(cases, &done.stdout);
}

/// Each attack must have ended as the line that begins like this.
#[track_caller]
fn assert_answers(cases: &[(String, &str)], stdout: &str) {
    for ((word, answer), line) in cases.iter().zip(stdout.lines()) {
        let wanted = format!("{word}: {answer}");
        assert!(line.starts_with(&wanted), "{line}, not {wanted}");
    }
}

#[test]
fn names_lead_nowhere_else() {
    let jail = jail();
    let user = jail.user;
    let here = jail.directory.path().display().to_string();
    // A host program that the machine may connect to, and two that it may not.
    let listen = |name: &str| {
        let path = jail.path(name);
        let listener = UnixListener::bind(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(user), Some(user)).unwrap();
        listener
    };
    let _listeners = [listen("v.sock_7"), listen("w.sock_7"), listen("other")];
    std::os::unix::fs::symlink("other", jail.path("v.sock_8")).unwrap();
    let cases = [
        ("read:disk".to_owned(), "got \"disk\""),
        (format!("read:{here}/tree/ok"), "got \"ok\""),
        (format!("read:{here}/tree/sub/../ok"), "no: "),
        ("connect:v:7".to_owned(), "connected"),
        (
            "write:disk".to_owned(),
            "no: \"disk\" is granted for reading only",
        ),
        ("read:/etc/passwd".to_owned(), "no: "),
        ("read:../../../etc/passwd".to_owned(), "no: "),
        (format!("read:{here}/secret"), "no: "),
        (format!("read:{here}/tree/../secret"), "no: "),
        (format!("read:{here}/tree/link"), "no: "),
        (format!("read:{here}/tree/etc/passwd"), "no: "),
        (format!("read:{here}/tree/fifo"), "no: "),
        (format!("read:{here}/tree/sub"), "no: "),
        (format!("read:{here}/tree//etc/passwd"), "no: "),
        (format!("read:{here}/tree"), "no: "),
        (format!("read:{here}/tree/"), "no: "),
        (format!("read:{here}/tree/."), "no: "),
        (format!("read:{here}/tree/\\0"), "no: "),
        ("read:disk\\0".to_owned(), "no: "),
        ("read:".to_owned(), "no: "),
        ("read:/proc/self/exe".to_owned(), "no: "),
        ("read:kvm".to_owned(), "no: "),
        ("read:v".to_owned(), "no: "),
        (format!("read:{}", "x".repeat(3000)), "no: "),
        ("connect:v:8".to_owned(), "no: "),
        ("connect:v:9".to_owned(), "no: "),
        ("connect:v:4294967295".to_owned(), "no: "),
        ("connect:w:7".to_owned(), "no: "),
        (format!("connect:{here}/w.sock:7"), "no: "),
        (format!("connect:{here}/v.sock:7"), "no: "),
        ("connect:v/../w.sock:7".to_owned(), "no: "),
        ("connect:v\\0:7".to_owned(), "no: "),
        ("connect::7".to_owned(), "no: "),
    ];
    ask(jail, &cases);
}

/// What lies beneath a directory in which files may be made is the machine's; all else is as it was.
#[test]
fn files_are_made_nowhere_else() {
    let jail = jail();
    jail.file("snapshots/old", "old");
    std::os::unix::fs::symlink("../secret", jail.path("snapshots/link")).unwrap();
    std::os::unix::fs::symlink("../tree", jail.path("snapshots/tree")).unwrap();
    std::fs::create_dir(jail.path("snapshots/sub")).unwrap();
    let (snapshots, user) = (jail.path("snapshots"), Some(jail.user));
    for path in ["snapshots", "snapshots/old", "tree"] {
        std::os::unix::fs::chown(jail.path(path), user, user).unwrap();
    }
    let here = jail.directory.path().display().to_string();
    let mut jail = jail.args(&["--allow-create", &format!("s={snapshots}/")]);
    let no = "no: ";
    let cases = [
        ("create:s/new".to_owned(), "made"),
        ("commit:s/new".to_owned(), "done"),
        ("read:s/new".to_owned(), "got \"made\""),
        ("create:s/old".to_owned(), "made"),
        ("create:s/old".to_owned(), no),
        ("discard:s/old".to_owned(), "done"),
        ("commit:s/old".to_owned(), no),
        ("create:disk".to_owned(), no),
        ("create:kvm".to_owned(), no),
        (format!("create:{here}/tree/ok"), no),
        (format!("create:{here}/tree/new"), no),
        (format!("create:{snapshots}/new"), no),
        (
            "create:s/link".to_owned(),
            "no: \"s/link\" is a symbolic link",
        ),
        ("create:s/sub".to_owned(), "no: \"s/sub\" is a directory"),
        ("create:s/tree/ok".to_owned(), no),
        ("create:s/tree/../x".to_owned(), no),
        ("create:s/../secret".to_owned(), no),
        ("create:s".to_owned(), no),
        ("create:s/".to_owned(), no),
        ("create:s/.".to_owned(), no),
        ("create:s//etc/x".to_owned(), no),
        ("create:s/x\\0".to_owned(), no),
        ("create:/etc/x".to_owned(), no),
        ("create:".to_owned(), no),
        (format!("create:s/{}", "x".repeat(3000)), no),
        ("commit:s/link".to_owned(), no),
        ("discard:s/new".to_owned(), no),
        // Four at once, and none of them ends up anywhere.
        ("create:s/1".to_owned(), "made"),
        ("create:s/2".to_owned(), "made"),
        ("create:s/3".to_owned(), "made"),
        ("create:s/4".to_owned(), "made"),
        (
            "create:s/5".to_owned(),
            "no: \"s/5\" cannot be made: 4 files",
        ),
    ];
    // Kept until it has been looked at.
    let directory = std::mem::replace(&mut jail.directory, tempfile::tempdir().unwrap());
    ask(jail, &cases);
    let names = |name: &str| {
        let all = std::fs::read_dir(directory.path().join(name)).unwrap();
        all.map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect::<std::collections::BTreeSet<_>>()
    };
    let made = ["link", "new", "old", "sub", "tree"].map(str::to_owned);
    assert_eq!(names("snapshots"), made.into());
    let before = ["etc", "fifo", "link", "ok", "sub"].map(str::to_owned);
    assert_eq!(names("tree"), before.into());
    for (file, text) in [
        ("secret", "secret"),
        ("snapshots/old", "old"),
        ("tree/ok", "ok"),
    ] {
        assert_eq!(
            std::fs::read_to_string(directory.path().join(file)).unwrap(),
            text
        );
    }
}

#[test]
fn floods_are_answered_and_leave_nothing_in_the_broker() {
    let mut running = jail().start(&["ask", "flood:200:disk", "read:disk", "flood:5000:nothing"]);
    running.wait_for_line("stays").unwrap();
    let broker = running.pid().as_raw().unsigned_abs();
    let before = descriptors(broker).len();
    let memory: u64 = status(&broker.to_string(), "VmRSS")
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(before < 20, "{:?}", descriptors(broker));
    assert!(memory < 8 << 10, "{memory} KiB");
    running.close_stdin();
    let done = running.wait().unwrap();
    assert_eq!(done.code, 0, "{done:#?}");
    assert!(done.stdout.contains("200 of 200 granted"), "{done:#?}");
    assert!(done.stdout.contains("read:disk: got \"disk\""), "{done:#?}");
    assert!(done.stdout.contains("0 of 5000 granted"), "{done:#?}");
}

#[test]
fn nonsense_ends_the_conversation_and_not_the_machine() {
    for word in ["long", "garbage", "gift"] {
        let mut running = jail().start(&["ask", "read:disk", word]);
        running.wait_for_line("stays").unwrap();
        let (broker, prisoner) = (running.pid().as_raw().unsigned_abs(), prisoner_of(&running));
        assert!(is_alive(broker) && is_alive(prisoner));
        running.close_stdin();
        let done = running.wait().unwrap();
        assert_eq!(done.code, 0, "{done:#?}");
        done.assert_line(&format!("{word}: the end"));
        assert!(
            done.stderr.contains("broke the broker's protocol"),
            "{done:#?}"
        );
    }
}

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
    let mut words = vec!["ask"];
    words.extend(cases.iter().map(|(word, _)| word.as_str()));
    let mut running = jail.start(&words);
    running.wait_for_line("stays").unwrap();
    running.close_stdin();
    let done = running.wait().unwrap();
    assert_eq!(done.code, 0, "{done:#?}");
    for ((word, answer), line) in cases.iter().zip(done.stdout.lines()) {
        let wanted = format!("{word}: {answer}");
        assert!(line.starts_with(&wanted), "{line}, not {wanted}");
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

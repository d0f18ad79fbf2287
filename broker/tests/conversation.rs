//! A client and a server over a real socket pair, and hostile clients.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use casemate_broker::{
    AllowedName, BrokerPolicy, Client, ClientError, ConnectTarget, MAX_IN_FLIGHT, Operation,
    PassedFile, Request, Server, ServerError, ServerEvent, fdpass, protocol,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::Mode;

const WAIT: Duration = Duration::from_secs(5);

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
}

fn directory(path: &std::path::Path) -> OwnedFd {
    open(
        path,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .unwrap()
}

fn open_op(name: &str, write: bool) -> Operation {
    Operation::Open {
        name: name.into(),
        write,
    }
}

/// Serves a policy in a thread until the client is gone.
fn serve(
    policy: BrokerPolicy,
) -> (
    Client,
    std::thread::JoinHandle<Result<ServerEvent, ServerError>>,
) {
    let (ours, theirs) = pair();
    let server = std::thread::spawn(move || Server::new(theirs, policy).serve(None));
    (Client::new(ours), server)
}

fn refusal(client: &mut Client, op: Operation) -> String {
    match client.call(op, WAIT) {
        Err(ClientError::Refused(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn taps_come_from_whoever_was_told_how_and_in_a_jail_from_nobody() {
    let tap = |name: &str| Operation::Tap {
        name: name.into(),
        several: true,
    };
    let (mut client, server) = serve(BrokerPolicy::default());
    assert!(refusal(&mut client, tap("tap0")).contains("--grant-tap tap0"));
    let path = "/run/v.sock".to_owned();
    let refused = refusal(&mut client, Operation::Listen { path });
    assert!(refused.contains("--grant-listen /run/v.sock"), "{refused}");
    drop(client);
    server.join().unwrap().unwrap();
    let (mut client, server) = serve(BrokerPolicy {
        tap: Some(|name, several| match (name, several) {
            ("tap0", true) => Ok(pair().0),
            _ => Err(std::io::ErrorKind::NotFound.into()),
        }),
        ..BrokerPolicy::default()
    });
    client.call(tap("tap0"), WAIT).unwrap();
    assert!(refusal(&mut client, tap("tap1")).contains("cannot use tap \"tap1\""));
    assert!(refusal(&mut client, tap("tap\n0")).contains("control character"));
    drop(client);
    server.join().unwrap().unwrap();
}

#[test]
fn files_come_from_what_was_passed_the_allow_list_and_the_chroot() {
    let base = tempfile::tempdir().unwrap();
    let write = |name: &str| {
        let path = base.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, name).unwrap();
        path
    };
    let passed = write("passed");
    write("tree/a");
    write("tree/sub/b");
    write("single");
    write("root/disk");
    write("root/passed-name");
    std::os::unix::fs::symlink("/etc/passwd", base.path().join("root/link")).unwrap();
    std::os::unix::fs::symlink("../single", base.path().join("tree/link")).unwrap();
    let allowed = |name: &str, directory: OwnedFd, file: Option<&str>| AllowedName {
        name: name.into(),
        directory,
        file: file.map(Into::into),
        create: false,
    };
    let (mut client, server) = serve(BrokerPolicy {
        passed: vec![PassedFile {
            name: "passed-name".into(),
            file: Arc::new(std::fs::File::open(passed).unwrap().into()),
            writable: false,
        }],
        allowed: vec![
            allowed("/allowed", directory(&base.path().join("tree")), None),
            allowed("/one/single", directory(base.path()), Some("single")),
        ],
        chroot: Some(directory(&base.path().join("root"))),
        connections: Vec::new(),
        ..BrokerPolicy::default()
    });
    for (name, text) in [
        ("passed-name", "passed"),
        ("/allowed/a", "tree/a"),
        ("/allowed/sub/b", "tree/sub/b"),
        ("/one/single", "single"),
        ("/disk", "root/disk"),
        ("disk", "root/disk"),
    ] {
        let mut file = std::fs::File::from(client.call(open_op(name, false), WAIT).unwrap());
        let mut found = String::new();
        file.read_to_string(&mut found).unwrap();
        assert_eq!(found, text, "{name}");
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).unwrap());
        assert!(!flags.contains(OFlag::O_NONBLOCK), "{name}");
    }
    let mut file = std::fs::File::from(client.call(open_op("/disk", true), WAIT).unwrap());
    file.write_all(b"new").unwrap();
    for (name, write, word) in [
        ("passed-name", true, "--grant-rw"),
        ("/allowed", false, "--allow-open"),
        ("/allowed/", false, "--allow-open"),
        ("/allowedx", false, "--allow-open"),
        ("/allowed/link", false, "ELOOP"),
        ("/allowed/sub", false, "neither"),
        ("/allowed/none", false, "ENOENT"),
        ("/one", false, "--allow-open"),
        ("/one/other", false, "--allow-open"),
        ("/link", false, "ELOOP"),
        ("/etc/passwd", false, "--allow-open"),
        ("/allowed/../single", false, ".."),
        ("..", false, ".."),
        ("", false, "empty"),
        ("/", false, ""),
        (".", false, ""),
        ("//", false, ""),
        ("a\0b", false, "control"),
        ("/disk\n", false, "control"),
    ] {
        let text = refusal(&mut client, open_op(name, write));
        assert!(text.contains(word), "{name:?}: {text}");
    }
    drop(client);
    assert_eq!(server.join().unwrap().unwrap(), ServerEvent::Closed);
}

#[test]
fn connections_go_to_the_port_and_never_wait() {
    let base = tempfile::tempdir().unwrap();
    let connect = |device: &str, port| Operation::Connect {
        device: device.into(),
        port,
    };
    let (mut client, _server) = serve(BrokerPolicy {
        connections: vec![ConnectTarget {
            device: "/v.sock".into(),
            directory: directory(base.path()),
            base_name: "v.sock".into(),
        }],
        ..BrokerPolicy::default()
    });
    let listener = UnixListener::bind(base.path().join("v.sock_7")).unwrap();
    let mut stream =
        std::os::unix::net::UnixStream::from(client.call(connect("/v.sock", 7), WAIT).unwrap());
    stream.write_all(b"x").unwrap();
    drop(stream);
    let mut text = String::new();
    listener
        .accept()
        .unwrap()
        .0
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "x");

    // A listener that accepts nobody: refused once its backlog is full, and no wait before that.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
    let mut open = Vec::new();
    let refused = (0..10).find_map(|_| match client.call(connect("/v.sock", 7), WAIT) {
        Ok(stream) => {
            open.push(stream);
            None
        }
        Err(error) => Some(error.to_string()),
    });
    assert!(refused.unwrap().contains("EAGAIN"));

    for (device, port, word) in [
        ("/v.sock", 8, "ENOENT"),
        ("/v.sock", u32::MAX, "port"),
        ("/other", 7, "--grant-listen"),
        ("", 7, "empty"),
        ("/x/../v.sock", 7, ".."),
        ("/v.sock\0", 7, "control"),
    ] {
        let text = refusal(&mut client, connect(device, port));
        assert!(text.contains(word), "{device:?}: {text}");
    }
}

#[test]
fn what_is_no_request_ends_the_conversation() {
    let long = vec![b' '; protocol::MAX_MESSAGE + 1];
    let deep = b"[".repeat(protocol::MAX_MESSAGE);
    let name = "x".repeat(protocol::MAX_MESSAGE);
    let large = format!(r#"{{"id":1,"op":{{"open":{{"name":"{name}","write":true}}}}}}"#);
    for bad in [
        &long[..],
        &deep,
        large.as_bytes(),
        b"{",
        b"\0",
        b"{\"id\":1,\"op\":{\"connect\":{\"device\":\"a\",\"port\":99999999999}}}",
        b"{\"id\":1,\"op\":\"open\"}",
    ] {
        let (ours, theirs) = pair();
        fdpass::send(ours.as_fd(), bad, None).unwrap();
        let error = Server::new(theirs, BrokerPolicy::default())
            .serve(None)
            .unwrap_err();
        assert!(matches!(error, ServerError::Protocol(_)), "{error}");
    }
    // A descriptor that nobody asked for.
    let (ours, theirs) = pair();
    let request = protocol::encode(&Request {
        id: 1,
        op: open_op("x", false),
    })
    .unwrap();
    fdpass::send(ours.as_fd(), &request, Some(ours.as_fd())).unwrap();
    assert!(
        Server::new(theirs, BrokerPolicy::default())
            .serve(None)
            .is_err()
    );
}

#[test]
fn a_client_bounds_itself() {
    let (ours, _theirs) = pair();
    let mut client = Client::new(ours);
    for _ in 0..MAX_IN_FLIGHT {
        client.submit(open_op("x", false)).unwrap();
    }
    assert!(matches!(
        client.submit(open_op("x", false)),
        Err(ClientError::Busy)
    ));
    assert_eq!(client.in_flight(), MAX_IN_FLIGHT);
    assert!(client.receive().unwrap().is_none());
    let (ours, theirs) = pair();
    drop(theirs);
    let gone = Client::new(ours).call(open_op("x", false), WAIT);
    assert!(matches!(gone, Err(ClientError::Gone)));
}

#[test]
fn a_client_times_out() {
    let (ours, _theirs) = pair();
    let error = Client::new(ours)
        .call(open_op("x", false), Duration::from_millis(20))
        .unwrap_err();
    assert!(matches!(error, ClientError::Timeout(_)), "{error}");
}

/// A VMM that floods and never reads: the server holds one answer, stops, and goes on when it reads.
#[test]
fn a_flood_stops_itself() {
    let base = tempfile::tempdir().unwrap();
    std::fs::write(base.path().join("f"), "x").unwrap();
    let (ours, theirs) = pair();
    let policy = BrokerPolicy {
        chroot: Some(directory(base.path())),
        ..BrokerPolicy::default()
    };
    let server = std::thread::spawn(move || Server::new(theirs, policy).serve(None));
    let request = |id| {
        protocol::encode(&Request {
            id,
            op: open_op("f", false),
        })
        .unwrap()
    };
    let mut sent = 0;
    let mut full = 0;
    while full < 50 {
        match fdpass::send(ours.as_fd(), &request(sent), None) {
            Ok(()) => sent += 1,
            Err(nix::errno::Errno::EAGAIN) => {
                full += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
        assert!(sent < 100_000, "nothing stops a flood");
    }
    let mut answered = 0;
    let mut buffer = [0; protocol::MAX_MESSAGE];
    while answered < sent {
        match fdpass::receive(ours.as_fd(), &mut buffer) {
            Ok(received) => {
                assert!(received.length > 0, "the server has ended after {answered}");
                answered += 1;
            }
            Err(nix::errno::Errno::EAGAIN) => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => panic!("{error}"),
        }
    }
    drop(ours);
    assert_eq!(server.join().unwrap().unwrap(), ServerEvent::Closed);
}

/// A policy under which everything may be made beneath a directory, as `/d`.
fn may_create(base: &std::path::Path) -> BrokerPolicy {
    BrokerPolicy {
        allowed: vec![AllowedName {
            name: "/d".into(),
            directory: directory(base),
            file: None,
            create: true,
        }],
        ..BrokerPolicy::default()
    }
}

fn create(name: &str) -> Operation {
    Operation::Create { name: name.into() }
}

fn commit(name: &str) -> Operation {
    Operation::Commit { name: name.into() }
}

fn discard(name: &str) -> Operation {
    Operation::Discard { name: name.into() }
}

#[test]
fn files_are_made_committed_and_opened_again() {
    let base = tempfile::tempdir().unwrap();
    let (mut client, server) = serve(may_create(base.path()));
    for text in ["first", "second"] {
        let mut file = std::fs::File::from(client.call(create("/d/x"), WAIT).unwrap());
        file.write_all(text.as_bytes()).unwrap();
        file.sync_all().unwrap();
        client.order(commit("/d/x"), WAIT).unwrap();
        for write in [false, true] {
            let opened = client.call(open_op("/d/x", write), WAIT).unwrap();
            let found = std::io::read_to_string(std::fs::File::from(opened)).unwrap();
            assert_eq!(found, text);
        }
    }
    drop(client.call(create("/d/x"), WAIT).unwrap());
    assert!(refusal(&mut client, create("/d/x")).contains("already"));
    client.order(discard("/d/x"), WAIT).unwrap();
    for op in [commit("/d/x"), discard("/d/x")] {
        match client.order(op, WAIT) {
            Err(ClientError::Refused(text)) => assert!(text.contains("is not being made")),
            other => panic!("{other:?}"),
        }
    }
    assert!(refusal(&mut client, create("/e/x")).contains("--allow-create /e/x"));
    // What gives no descriptor is not called, nor the other way round.
    assert!(matches!(
        client.call(commit("/d/x"), WAIT),
        Err(ClientError::Misused)
    ));
    assert!(matches!(
        client.order(create("/d/x"), WAIT),
        Err(ClientError::Misused)
    ));
    assert_eq!(client.in_flight(), 0);
    drop(client);
    assert_eq!(server.join().unwrap().unwrap(), ServerEvent::Closed);
    assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 1);
    assert_eq!(std::fs::read(base.path().join("x")).unwrap(), b"second");
}

#[test]
fn what_is_being_made_ends_with_its_conversation() {
    let base = tempfile::tempdir().unwrap();
    let held = |client: &mut Client| {
        let file = client.call(create("/d/x"), WAIT).unwrap();
        std::fs::File::from(file.try_clone().unwrap())
            .write_all(b"x")
            .unwrap();
        file
    };
    // The VMM's two threads: what one makes is not the other's, and ends without it.
    let ((first, first_server), (second, second_server)) = (pair(), pair());
    let policy = may_create(base.path());
    let sockets = vec![first_server, second_server];
    let server = std::thread::spawn(move || Server::with_sockets(sockets, policy).serve(None));
    let (mut first, mut second) = (Client::new(first), Client::new(second));
    let file = held(&mut first);
    assert!(second.order(commit("/d/x"), WAIT).is_err());
    drop(held(&mut second));
    drop(first);
    second.order(commit("/d/x"), WAIT).unwrap();
    drop(second);
    assert_eq!(server.join().unwrap().unwrap(), ServerEvent::Closed);
    drop(file);
    let left = || std::fs::read_dir(base.path()).unwrap().count();
    assert_eq!(left(), 1);
    std::fs::remove_file(base.path().join("x")).unwrap();

    // What is no request ends it as well.
    let (ours, theirs) = pair();
    let policy = may_create(base.path());
    let server = std::thread::spawn(move || Server::new(theirs, policy).serve(None));
    let more = ours.try_clone().unwrap();
    let mut client = Client::new(ours);
    drop(held(&mut client));
    fdpass::send(more.as_fd(), b"{", None).unwrap();
    assert!(server.join().unwrap().is_err());
    assert_eq!(left(), 0);
}

#[test]
fn an_answer_that_comes_too_late_is_nobodys() {
    let base = tempfile::tempdir().unwrap();
    let (ours, theirs) = pair();
    let mut client = Client::new(ours);
    let short = Duration::from_millis(1);
    for op in [create("/d/x"), open_op("/d/none", false)] {
        let late = client.call(op, short);
        assert!(matches!(late, Err(ClientError::Timeout(_))), "{late:?}");
    }
    let late = client.order(commit("/d/x"), short);
    assert!(matches!(late, Err(ClientError::Timeout(_))), "{late:?}");
    let policy = may_create(base.path());
    let server = std::thread::spawn(move || Server::new(theirs, policy).serve(None));
    // What was made meanwhile has been given up: there was nothing to commit, and it can be made again.
    client.call(create("/d/x"), WAIT).unwrap();
    assert_eq!(client.in_flight(), 0);
    drop(client);
    server.join().unwrap().unwrap();
    assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 0);
}

#[test]
fn a_hostile_broker_is_noticed() {
    for (reply, gift) in [
        (&br#"{"id":1,"ok":true}"#[..], true),
        (br#"{"id":1,"error":"no"}"#, true),
        (br#"{"id":2,"ok":true}"#, false),
        (br#"{"id":1}"#, false),
    ] {
        let (ours, theirs) = pair();
        fdpass::send(theirs.as_fd(), reply, gift.then(|| theirs.as_fd())).unwrap();
        let error = Client::new(ours).order(commit("x"), WAIT).unwrap_err();
        assert!(matches!(error, ClientError::Unexpected(_)), "{error}");
    }

    for reply in [
        &br#"{"id":2,"ok":true}"#[..],
        br#"{"id":1,"ok":true}"#,
        br#"{"id":1}"#,
        br#"{"id":1,"ok":true,"error":"x"}"#,
        br#"nonsense"#,
    ] {
        let (ours, theirs) = pair();
        let mut client = Client::new(ours);
        client.submit(open_op("x", false)).unwrap();
        fdpass::send(theirs.as_fd(), reply, None).unwrap();
        assert!(client.receive().is_err());
    }
}

#[test]
fn a_watched_descriptor_interrupts() {
    let (_ours, theirs) = pair();
    let (read, write) = nix::unistd::pipe().unwrap();
    nix::unistd::write(&write, b"x").unwrap();
    let mut server = Server::new(theirs, BrokerPolicy::default());
    assert_eq!(
        server.serve(Some(read.as_fd())).unwrap(),
        ServerEvent::Watched
    );
}

/// A guest that opens connections until its VMM has no descriptor left must not lose the broker.
#[test]
fn a_descriptor_without_room_costs_one_request() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use std::os::fd::AsRawFd;
    // In a process of its own, for other tests need descriptors.
    const MARK: &str = "CASEMATE_TEST_ALONE";
    if std::env::var_os(MARK).is_none() {
        let name = "a_descriptor_without_room_costs_one_request";
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(MARK, "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let (ours, theirs) = pair();
    let mut client = Client::new(ours);
    let answer = |id: u64, limit: Option<u64>| {
        let file = std::fs::File::open("/dev/null").unwrap();
        let bytes = format!(r#"{{"id":{id},"ok":true}}"#);
        fdpass::send(theirs.as_fd(), bytes.as_bytes(), Some(file.as_fd())).unwrap();
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let number = file.as_raw_fd() as u64;
        drop(file);
        setrlimit(
            Resource::RLIMIT_NOFILE,
            limit.map_or(most, |_| number),
            most,
        )
        .unwrap();
    };
    let id = client.submit(open_op("a", false)).unwrap();
    answer(id, Some(0));
    let refused = client.receive().unwrap().unwrap();
    assert!(refused.result.unwrap_err().contains("RLIMIT_NOFILE"));
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let id = client.submit(open_op("a", false)).unwrap();
    answer(id, None);
    assert!(client.receive().unwrap().unwrap().result.is_ok());

    // A file that was made for nothing is given up.
    answer(id + 1, Some(0));
    let refused = client.call(create("a"), WAIT).unwrap_err();
    assert!(refused.to_string().contains("RLIMIT_NOFILE"), "{refused}");
    let mut buffer = [0; protocol::MAX_MESSAGE];
    let next = || {
        let received = fdpass::receive(theirs.as_fd(), &mut buffer).unwrap();
        protocol::decode::<Request>(&buffer[..received.length]).unwrap()
    };
    let last = std::iter::repeat_with(next).take(4).last().unwrap();
    assert_eq!(last.op, discard("a"));
}

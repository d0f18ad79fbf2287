use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::net::UnixListener;

use nix::sys::socket::{SockFlag, socketpair};

use super::*;

fn table(descriptors: Vec<Descriptor>) -> HandoverTable {
    HandoverTable {
        version: VERSION,
        id: "vm-1".parse().unwrap(),
        jailed: true,
        descriptors,
    }
}

fn entry(name: &str, fd: RawFd, kind: Kind) -> Descriptor {
    Descriptor {
        name: name.into(),
        fd,
        kind,
    }
}

/// Descriptors of tests live at numbers that no other test's files get.
fn high(fd: OwnedFd) -> RawFd {
    static NEXT: std::sync::atomic::AtomicI32 = std::sync::atomic::AtomicI32::new(500);
    let at = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(at)).unwrap()
}

fn raw(table: &str) -> OwnedFd {
    let memfd = memfd_create(c"t", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::write(&memfd, table.as_bytes()).unwrap();
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(all_seals())).unwrap();
    memfd
}

fn open(path: &str, flags: OFlag) -> RawFd {
    high(nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty()).unwrap())
}

#[test]
fn a_table_goes_across() {
    let file = open("/etc/passwd", OFlag::O_RDONLY);
    let (broker, _other) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::empty(),
    )
    .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("v.sock")).unwrap();
    let memfd = Handover::write_memfd(&table(vec![
        entry("/etc/passwd", file, Kind::FileRo),
        entry("broker", high(broker), Kind::Broker),
        entry("/run/v.sock", high(listener.into()), Kind::Listener),
        entry("log", open("/dev/null", OFlag::O_WRONLY), Kind::Log),
    ]))
    .unwrap();
    assert_eq!(nix::unistd::write(&memfd, b"x"), Err(Errno::EPERM));

    let mut handover = Handover::read(memfd).unwrap();
    assert_eq!(handover.id().as_str(), "vm-1");
    assert!(handover.jailed());
    let error = handover.take("/etc/passwd", &[Kind::FileRw]).unwrap_err();
    assert!(error.to_string().contains("--grant-rw"), "{error}");
    let fd = handover.take("/etc/passwd", &[Kind::FileRo]).unwrap();
    assert_eq!(fd.as_raw_fd(), file);
    let error = handover.take("/etc/passwd", &[Kind::FileRo]).unwrap_err();
    assert!(matches!(error, HandoverError::Missing(..)));
    handover.take("broker", &[Kind::Broker]).unwrap();
    handover.take("/run/v.sock", &[Kind::Listener]).unwrap();
    assert_eq!(
        handover.remaining().collect::<Vec<_>>(),
        [("log", Kind::Log)]
    );
}

#[test]
fn a_table_that_can_still_change_is_refused() {
    let memfd = memfd_create(c"t", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    assert!(matches!(
        Handover::read(memfd),
        Err(HandoverError::NotSealed)
    ));
    let file = std::fs::File::open("/etc/passwd").unwrap();
    assert!(matches!(
        Handover::read(file.into()),
        Err(HandoverError::NotSealed)
    ));
}

#[test]
fn hostile_tables_are_refused() {
    let head = r#"{"version":1,"id":"a","jailed":true,"descriptors":"#;
    for bad in [
        String::new(),
        "[".repeat(60_000),
        format!("{head}[]"),
        format!("{head}[],\"more\":1}}"),
        format!(r#"{head}[{{"name":"x","fd":3000000000,"kind":"kvm"}}]}}"#),
        format!(r#"{head}[{{"name":"x","fd":3,"kind":"directory"}}]}}"#),
        r#"{"version":1,"id":"../a","jailed":true,"descriptors":[]}"#.to_owned(),
    ] {
        assert!(matches!(
            Handover::read(raw(&bad)),
            Err(HandoverError::Malformed(_))
        ));
    }
    assert!(matches!(
        Handover::read(raw(&" ".repeat(MAX_TABLE + 1))),
        Err(HandoverError::TooLong(_))
    ));
    let old = r#"{"version":2,"id":"a","jailed":true,"descriptors":[]}"#;
    assert!(matches!(
        Handover::read(raw(old)),
        Err(HandoverError::Version(2))
    ));
}

#[test]
fn hostile_numbers_are_refused() {
    let refused = |entries| {
        let memfd = Handover::write_memfd(&table(entries)).unwrap();
        Handover::read(memfd).unwrap_err()
    };
    for number in [-1, 0, 1, 2, 999_999] {
        let error = refused(vec![entry("x", number, Kind::FileRo)]);
        assert!(matches!(error, HandoverError::Number { .. }), "{error}");
    }
    let file = open("/etc/passwd", OFlag::O_RDONLY);
    let error = refused(vec![
        entry("x", file, Kind::FileRo),
        entry("y", file, Kind::FileRo),
    ]);
    assert!(matches!(
        error,
        HandoverError::Number {
            source: AdoptError::Twice(_),
            ..
        }
    ));
    let error = refused(vec![
        entry("x", open("/etc/passwd", OFlag::O_RDONLY), Kind::FileRo),
        entry("x", open("/etc/passwd", OFlag::O_RDONLY), Kind::FileRo),
    ]);
    assert!(matches!(error, HandoverError::NamedTwice(_)), "{error}");
    // The table cannot name itself.
    let memfd = memfd_create(c"t", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let own = memfd.as_raw_fd();
    let text = serde_json::to_vec(&table(vec![entry("x", own, Kind::FileRo)])).unwrap();
    nix::unistd::write(&memfd, &text).unwrap();
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(all_seals())).unwrap();
    assert!(matches!(
        Handover::read(memfd),
        Err(HandoverError::Number { .. })
    ));
}

#[test]
fn a_descriptor_must_be_what_its_kind_says() {
    let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
    let network = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let cases = [
        (open("/dev/null", OFlag::O_RDWR), Kind::Kvm),
        (open("/dev/null", OFlag::O_RDWR), Kind::Tap),
        (open("/dev/null", OFlag::O_RDONLY), Kind::FileRo),
        (
            open("/", OFlag::O_RDONLY | OFlag::O_DIRECTORY),
            Kind::FileRo,
        ),
        (open("/", OFlag::O_PATH | OFlag::O_DIRECTORY), Kind::Log),
        (open("/etc/passwd", OFlag::O_RDONLY), Kind::FileRw),
        (open("/etc/passwd", OFlag::O_RDONLY), Kind::Append),
        (
            open("/dev/null", OFlag::O_WRONLY | OFlag::O_APPEND),
            Kind::Append,
        ),
        (open("/etc/passwd", OFlag::O_RDONLY), Kind::Log),
        (open("/etc/passwd", OFlag::O_RDONLY), Kind::Broker),
        (stream.as_raw_fd(), Kind::Listener),
        (listener.into_raw_fd(), Kind::Stream),
        (network.into_raw_fd(), Kind::Stream),
        (open("/etc/passwd", OFlag::O_RDONLY), Kind::Stream),
        (stream.into_raw_fd(), Kind::Broker),
        (open("/dev/null", OFlag::O_RDWR), Kind::Userfaultfd),
        (open("/etc/passwd", OFlag::O_RDWR), Kind::Userfaultfd),
    ];
    for (number, kind) in cases {
        let memfd = Handover::write_memfd(&table(vec![entry("x", number, kind)])).unwrap();
        let error = Handover::read(memfd).unwrap_err();
        assert!(
            matches!(
                error,
                HandoverError::WrongKind { .. } | HandoverError::Number { .. }
            ),
            "{kind:?}: {error}"
        );
    }
}

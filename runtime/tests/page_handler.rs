//! `casemate snapshot serve` and those who connect to it, honest and hostile; without any machine. It changes to a user of
//! its own, which needs root, and so does this.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use casemate_broker::fdpass;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const RAM: u64 = 64 * 4096;
const ONE: &str = r#"[{"base_host_virt_addr":4096,"size":262144,"offset":0,"page_size":4096}]"#;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "run this as root: a page handler changes identities"
        );
        let place = Self(tempfile::tempdir().unwrap());
        let file = File::create(place.path("memory")).unwrap();
        file.set_len(RAM).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_casemate"));
        command.args(["snapshot", "serve", "--socket"]);
        command.arg(self.path("s")).arg(self.path("memory"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// A handler that listens, and a connection to it.
    fn connected(&self, more: &[&str]) -> (Child, UnixStream) {
        let mut child = self.command().args(more).spawn().unwrap();
        let mut line = String::new();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        said.read_line(&mut line).unwrap();
        assert!(line.starts_with("listening on"), "{line}");
        let stream = UnixStream::connect(self.path("s")).unwrap();
        (child, stream)
    }
}

fn end(mut child: Child) -> (Option<i32>, String) {
    let code = child.wait().unwrap().code();
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    (code, said)
}

#[test]
fn has_nothing_when_it_listens() {
    let place = Place::new();
    let (child, stream) = place.connected(&["--uid", "1234"]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    for line in [
        "Uid:\t1667301378\t1667301378\t1667301378\t1667301378",
        "Gid:\t1667301378\t1667301378\t1667301378\t1667301378",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "Groups:\t ",
    ] {
        assert!(status.contains(line), "no {line} in {status}");
    }
    let socket = std::fs::metadata(place.path("s")).unwrap();
    assert_eq!(
        (socket.uid(), socket.permissions().mode() & 0o777),
        (1234, 0o600)
    );
    // Nobody else is served.
    let second = UnixStream::connect(place.path("s"));
    drop(stream);
    drop(second);
    let (code, said) = end(child);
    assert_eq!((code, said.as_str()), (Some(0), ""));
}

#[test]
fn hostile_messages_end_it_in_one_line() {
    let place = Place::new();
    let many = format!("[{}]", vec![ONE.trim_matches(['[', ']']); 65].join(","));
    let other = ONE.replace("262144", "4096");
    let beyond = ONE.replace("\"offset\":0", "\"offset\":4096");
    let huge = ONE.replace("262144", "18446744073709547520");
    let pages = ONE.replace("\"page_size\":4096", "\"page_size\":2097152");
    let long = " ".repeat(17 << 10);
    for (message, words) in [
        ("x", "no list of regions"),
        ("[]", "0 regions"),
        ("[\"\u{1b}[2J\"]", "no list of regions"),
        (&many, "65 regions"),
        (&other, "another machine's"),
        (&beyond, "another machine's"),
        (&huge, "not whole pages"),
        (&pages, "pages of 2097152 bytes"),
        (&long, "longer than"),
        (ONE, "no userfaultfd came"),
    ] {
        let (child, stream) = place.connected(&[]);
        fdpass::send(stream.as_fd(), message.as_bytes(), None).unwrap();
        let (code, said) = end(child);
        assert_eq!(code, Some(125), "{message:.80}: {said}");
        assert!(said.contains(words) && said.lines().count() == 1, "{said}");
        assert!(!said.contains('\u{1b}'));
    }
}

/// A VMM whose load was refused may describe another attempt's memory, by the same connection.
#[test]
fn a_vmm_may_describe_itself_again() {
    let place = Place::new();
    let (child, stream) = place.connected(&[]);
    // Descriptors by which nothing is said, as by a userfaultfd whose memory nobody touches.
    for _ in 0..3 {
        let (reading, writing) = nix::unistd::pipe().unwrap();
        fdpass::send(stream.as_fd(), ONE.as_bytes(), Some(reading.as_fd())).unwrap();
        drop(reading);
        // Then it lets go of the one before.
        let other = ONE.replace("4096,\"size", "8192,\"size");
        let (later, _writing) = nix::unistd::pipe().unwrap();
        fdpass::send(stream.as_fd(), other.as_bytes(), Some(later.as_fd())).unwrap();
        wait_until_unread(&writing);
    }
    drop(stream);
    assert_eq!(end(child), (Some(0), String::new()));
}

/// Waits until nobody has the other end of this pipe.
fn wait_until_unread(pipe: &OwnedFd) {
    let mut watched = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
    let two_minutes = PollTimeout::try_from(120_000).unwrap();
    assert_eq!(poll(&mut watched, two_minutes), Ok(1));
}

#[test]
fn another_descriptor_than_a_userfaultfd_ends_it() {
    let place = Place::new();
    let (reading, writing) = nix::unistd::pipe().unwrap();
    nix::unistd::write(&writing, &[0; 64]).unwrap();
    let file = tempfile::tempfile().unwrap();
    let descriptors: [OwnedFd; 3] = [
        reading,
        file.into(),
        File::open("/dev/zero").unwrap().into(),
    ];
    for descriptor in &descriptors {
        let (child, stream) = place.connected(&[]);
        let message = ONE.as_bytes();
        fdpass::send(stream.as_fd(), message, Some(descriptor.as_fd())).unwrap();
        let (code, said) = end(child);
        assert_eq!(code, Some(125), "{said}");
        assert!(said.contains("the VMM's descriptor is refused"), "{said}");
    }
}

#[test]
fn what_cannot_be_served_is_refused() {
    let place = Place::new();
    let refused = |words: &str| {
        let output = place.command().output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(said.contains(words) && said.lines().count() == 1, "{said}");
    };
    {
        let _listening = UnixListener::bind(place.path("s")).unwrap();
        refused("Address already in use");
    }
    std::fs::remove_file(place.path("s")).unwrap();
    std::fs::write(place.path("s"), "a file").unwrap();
    refused("Address already in use");
    assert_eq!(std::fs::read(place.path("s")).unwrap(), b"a file");
    std::fs::remove_file(place.path("s")).unwrap();
    std::fs::write(place.path("memory"), "short").unwrap();
    refused("shorter than a page");
    std::fs::write(place.path("memory"), vec![1; 4097]).unwrap();
    // What the attempt before left is in nobody's way.
    refused("not whole pages");
    std::fs::remove_file(place.path("memory")).unwrap();
    refused("No such file");
    std::fs::create_dir(place.path("memory")).unwrap();
    refused("not a regular file");
}

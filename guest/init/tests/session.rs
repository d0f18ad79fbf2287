//! The session with a real command on this host, over a socket pair in place of vsock.
//!
//! It runs without the usual harness: like PID 1, a session blocks signals for its process and reaps every child.

use casemate_init::Error;
use casemate_init::command;
use casemate_init::freezer::Freezer;
use casemate_init::hardware::Hardware;
use casemate_init::link::{Again, Link};
use casemate_init::protocol::{
    Decoder, ENTROPY_BYTES, Exited, FailureKind, Frame, Identity, MAX_PAYLOAD, Resumed,
    STDIN_WINDOW, Sender, Spec, VERSION,
};
use casemate_init::session::{self, Signals};
use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

fn main() {
    let signals = Signals::block().unwrap();
    type Case = (&'static str, fn(&Signals));
    let cases: &[Case] = &[
        ("output_and_code", output_and_code),
        ("killed_by_signal", killed_by_signal),
        ("killed_by_real_time_signal", killed_by_real_time_signal),
        ("input_to_its_end", input_to_its_end),
        ("much_output_to_a_slow_host", much_output_to_a_slow_host),
        ("signal_passes_unread_input", signal_passes_unread_input),
        (
            "input_for_a_command_that_closed_it",
            input_for_a_command_that_closed_it,
        ),
        ("terminal", terminal),
        ("terminal_end_of_input", terminal_end_of_input),
        (
            "left_behind_processes_do_not_delay",
            left_behind_processes_do_not_delay,
        ),
        ("host_goes_away", host_goes_away),
        ("host_talks_nonsense", host_talks_nonsense),
        (
            "another_host_after_a_snapshot",
            another_host_after_a_snapshot,
        ),
        ("an_identity_that_is_none", an_identity_that_is_none),
        ("environment_and_directory", environment_and_directory),
        ("failures_have_kinds", failures_have_kinds),
    ];
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    for (name, case) in cases {
        if wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str())) {
            let start = Instant::now();
            case(&signals);
            println!("test {name} ... ok ({} ms)", start.elapsed().as_millis());
        }
    }
}

/// The host's side of a conversation.
struct Host {
    stream: UnixStream,
    decoder: Decoder,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    taken: usize,
}

impl Host {
    /// The other side of `stream`, which waits for nothing for ever.
    fn new(stream: UnixStream) -> Self {
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self {
            stream,
            decoder: Decoder::new(Sender::Guest),
            stdout: vec![],
            stderr: vec![],
            taken: 0,
        }
    }

    fn send(&mut self, frame: Frame) {
        self.stream.write_all(&frame.to_bytes().unwrap()).unwrap();
    }

    /// Reads until `done` says so or the guest's side has closed.
    fn read_until(&mut self, done: impl Fn(&Self) -> bool) {
        let mut buffer = [0; 8192];
        while !done(self) {
            match self.stream.read(&mut buffer).unwrap() {
                0 => return,
                length => self.decoder.feed(&buffer[..length]),
            }
            while let Some(frame) = self.decoder.next_frame().unwrap() {
                match frame {
                    Frame::Stdout(data) => self.stdout.extend(data),
                    Frame::Stderr(data) => self.stderr.extend(data),
                    Frame::StdinTaken(bytes) => self.taken += bytes as usize,
                    other => panic!("unexpected {other:?}"),
                }
            }
        }
    }

    fn read_all(&mut self) {
        self.read_until(|_| false);
    }

    fn said(&self, word: &str) -> bool {
        String::from_utf8_lossy(&self.stdout).contains(word)
    }
}

fn shell(script: &str) -> Spec {
    Spec {
        argv: vec!["sh".into(), "-c".into(), script.into()],
        env: vec![("PATH".into(), "/usr/bin:/bin".into())],
        ..Spec::default()
    }
}

/// A machine that never goes on from a snapshot: it connects once.
struct Alone(RefCell<Option<OwnedFd>>);

impl Again for Alone {
    fn connect(&self) -> Result<OwnedFd, Error> {
        let stream = self.0.borrow_mut().take();
        stream.ok_or_else(|| Error::other("nobody is there"))
    }

    fn take(&self, _: &Identity) -> Result<(), Error> {
        Err(Error::other("it is who it is"))
    }
}

type Outcome = Result<Option<Exited>, casemate_init::Error>;

/// Runs a command for the host that `again` connects to, and hangs up.
fn run(signals: &Signals, spec: &Spec, again: &dyn Again) -> Outcome {
    let child = command::spawn(spec).unwrap();
    let group = child.pid;
    let end_all = || {
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
    };
    let mut link = Link::new(again).unwrap();
    let (hardware, freezer) = (Hardware::default(), Freezer::default());
    session::run(&mut link, child, signals, &hardware, freezer, &end_all)
}

/// Runs a command with `host` on the other side, and returns how it ended and what the host has then.
fn converse(
    signals: &Signals,
    spec: &Spec,
    host: impl FnOnce(&mut Host) + Send + 'static,
) -> (Outcome, Host) {
    let (guest, stream) = UnixStream::pair().unwrap();
    let mut side = Host::new(stream);
    let thread = thread::spawn(move || {
        host(&mut side);
        side
    });
    let again = Alone(RefCell::new(Some(guest.into())));
    let ended = run(signals, spec, &again);
    (ended, thread.join().unwrap())
}

fn output_and_code(signals: &Signals) {
    let (ended, host) = converse(
        signals,
        &shell("echo out; echo err >&2; exit 7"),
        Host::read_all,
    );
    assert_eq!(ended.unwrap(), Some(Exited::Code(7)));
    assert_eq!(
        (host.stdout.as_slice(), host.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );
}

fn killed_by_signal(signals: &Signals) {
    let (ended, _) = converse(signals, &shell("kill -SEGV $$"), Host::read_all);
    assert_eq!(ended.unwrap(), Some(Exited::Signal(11)));
}

fn killed_by_real_time_signal(signals: &Signals) {
    let (ended, _) = converse(signals, &shell("kill -40 $$"), Host::read_all);
    assert_eq!(ended.unwrap(), Some(Exited::Signal(40)));
}

fn input_to_its_end(signals: &Signals) {
    let (ended, host) = converse(signals, &shell("wc -c"), |host| {
        host.send(Frame::Stdin(vec![b'x'; MAX_PAYLOAD]));
        host.send(Frame::Stdin(vec![b'y'; 10]));
        host.send(Frame::StdinClose);
        host.read_all();
    });
    assert_eq!(ended.unwrap(), Some(Exited::Code(0)));
    assert_eq!(
        String::from_utf8_lossy(&host.stdout).trim(),
        (MAX_PAYLOAD + 10).to_string()
    );
    assert_eq!(host.taken, MAX_PAYLOAD + 10);
}

fn much_output_to_a_slow_host(signals: &Signals) {
    // The host takes nothing for longer than the output of a dead command is awaited: all of it must come still.
    let (ended, host) = converse(
        signals,
        &shell("head -c 3000000 /dev/zero; exit 1"),
        |host| {
            thread::sleep(Duration::from_millis(2500));
            host.read_all();
        },
    );
    assert_eq!(ended.unwrap(), Some(Exited::Code(1)));
    assert_eq!(host.stdout.len(), 3_000_000);
}

fn signal_passes_unread_input(signals: &Signals) {
    let (ended, _) = converse(signals, &shell("echo up; exec sleep 60"), |host| {
        host.read_until(|host| host.said("up"));
        for _ in 0..STDIN_WINDOW / MAX_PAYLOAD {
            host.send(Frame::Stdin(vec![0; MAX_PAYLOAD]));
        }
        host.send(Frame::Signal(15));
        host.read_all();
    });
    assert_eq!(ended.unwrap(), Some(Exited::Signal(15)));
}

fn input_for_a_command_that_closed_it(signals: &Signals) {
    let (ended, host) = converse(
        signals,
        &shell("exec <&-; echo closed; sleep 0.2; echo bye"),
        |host| {
            host.read_until(|host| host.said("closed"));
            host.send(Frame::Stdin(vec![0; 1000]));
            host.read_all();
        },
    );
    assert_eq!(ended.unwrap(), Some(Exited::Code(0)));
    assert_eq!(host.taken, 1000);
    assert!(host.said("bye"));
}

fn terminal(signals: &Signals) {
    let script = "tty; stty size; read line; echo got $line; stty size; trap 'echo hup; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let spec = Spec {
        tty: true,
        rows: 30,
        cols: 100,
        ..shell(script)
    };
    let (ended, host) = converse(signals, &spec, |host| {
        host.read_until(|host| host.said("30 100"));
        host.send(Frame::Resize {
            rows: 40,
            cols: 120,
        });
        host.send(Frame::Stdin(b"word\n".to_vec()));
        host.read_until(|host| host.said("ready"));
        host.send(Frame::Signal(15));
        host.read_all();
    });
    assert_eq!(ended.unwrap(), Some(Exited::Code(3)));
    for word in ["/dev/pts/", "got word", "40 120", "hup"] {
        assert!(
            host.said(word),
            "{word} is not in {:?}",
            String::from_utf8_lossy(&host.stdout)
        );
    }
}

fn terminal_end_of_input(signals: &Signals) {
    let (ended, host) = converse(
        signals,
        &Spec {
            tty: true,
            ..shell("cat; echo end")
        },
        |host| {
            host.send(Frame::StdinClose);
            host.read_all();
        },
    );
    assert_eq!(ended.unwrap(), Some(Exited::Code(0)));
    assert!(host.said("end"));
}

fn left_behind_processes_do_not_delay(signals: &Signals) {
    let start = Instant::now();
    let (ended, host) = converse(
        signals,
        &shell("sleep 60 & echo started; exit 4"),
        Host::read_all,
    );
    assert_eq!(ended.unwrap(), Some(Exited::Code(4)));
    assert!(host.said("started"));
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
}

fn host_goes_away(signals: &Signals) {
    let (ended, _) = converse(signals, &shell("echo up; exec sleep 60"), |host| {
        host.read_until(|host| host.said("up"));
        host.stream.shutdown(std::net::Shutdown::Both).unwrap();
    });
    assert_eq!(ended.unwrap(), None);
}

fn host_talks_nonsense(signals: &Signals) {
    for bytes in [
        &b"GET / HTTP/1.1\r\n"[..],
        &[2, 0xff, 0xff, 0xff, 0xff],
        &[16, 0, 0, 0, 0],
    ] {
        let seen = std::sync::Arc::new(AtomicBool::new(false));
        let mark = seen.clone();
        let (ended, _) = converse(signals, &shell("exec sleep 60"), move |host| {
            host.stream.write_all(bytes).unwrap();
            host.read_all();
            mark.store(true, Ordering::Relaxed);
        });
        assert!(ended.is_err(), "{bytes:?}");
        assert!(seen.load(Ordering::Relaxed));
    }
}

/// A machine whose hosts are there one after the other. What it was told to be is noted.
struct Cloned {
    hosts: RefCell<Vec<OwnedFd>>,
    identities: RefCell<Vec<Identity>>,
}

impl Again for Cloned {
    fn connect(&self) -> Result<OwnedFd, Error> {
        let next = self.hosts.borrow_mut().pop();
        next.ok_or_else(|| Error::other("nobody is there"))
    }

    fn take(&self, identity: &Identity) -> Result<(), Error> {
        // Longer than the command takes to go on.
        thread::sleep(Duration::from_millis(300));
        self.identities.borrow_mut().push(identity.clone());
        if identity.is_valid() {
            return Ok(());
        }
        Err(Error::other("an identity that is none"))
    }
}

fn identity(hostname: &str) -> Identity {
    Identity {
        hostname: hostname.into(),
        entropy: vec![7; ENTROPY_BYTES],
        ..Identity::default()
    }
}

/// Runs `script` on a machine that loses its host, as by a reset of the transport, when it has said something, and has
/// `second` for the next one.
fn cloned(
    signals: &Signals,
    script: &str,
    second: impl FnOnce(&mut Host) + Send + 'static,
) -> (Outcome, Vec<Identity>, Host) {
    let (old, first) = UnixStream::pair().unwrap();
    let (new, stream) = UnixStream::pair().unwrap();
    let again = Cloned {
        hosts: RefCell::new(vec![new.into(), old.into()]),
        identities: RefCell::default(),
    };
    let thread = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        // With something unread: the other side's next call fails with ECONNRESET.
        drop(first);
        let mut host = Host::new(stream);
        second(&mut host);
        host
    });
    let ended = run(signals, &shell(script), &again);
    let host = thread.join().unwrap();
    (ended, again.identities.into_inner(), host)
}

/// Takes the first frame of a machine that goes on from a snapshot.
fn resumed(host: &mut Host) {
    let mut byte = [0];
    let frame = loop {
        host.stream.read_exact(&mut byte).unwrap();
        host.decoder.feed(&byte);
        if let Some(frame) = host.decoder.next_frame().unwrap() {
            break frame;
        }
    };
    let version = VERSION;
    assert_eq!(
        frame,
        Frame::Resumed(Resumed {
            version,
            running: true
        })
    );
    // Until it is told who it is it says nothing more.
    let brief = Some(Duration::from_millis(300));
    host.stream.set_read_timeout(brief).unwrap();
    assert!(host.stream.read(&mut byte).is_err());
    host.stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
}

fn another_host_after_a_snapshot(signals: &Signals) {
    let script = "echo first; read line; echo got $line; exit 4";
    let (ended, identities, host) = cloned(signals, script, |host| {
        resumed(host);
        host.send(Frame::Identity(identity("clone")));
        host.send(Frame::Stdin(b"word\n".to_vec()));
        host.read_all();
    });
    assert_eq!(ended.unwrap(), Some(Exited::Code(4)));
    assert_eq!(identities, [identity("clone")]);
    assert_eq!(host.stdout, b"got word\n");
}

fn an_identity_that_is_none(signals: &Signals) {
    let bad = Identity {
        entropy: vec![1; 8],
        ..identity("clone")
    };
    for frame in [Frame::Identity(bad), Frame::StdinClose, Frame::Signal(9)] {
        let (ended, _, host) = cloned(signals, "echo first; exec sleep 60", move |host| {
            resumed(host);
            host.send(frame);
            host.read_all();
        });
        assert_eq!(ended.unwrap(), None);
        assert!(host.stdout.is_empty());
    }
}

fn environment_and_directory(signals: &Signals) {
    let mut spec = shell("pwd; env");
    spec.env.push(("GREETING".into(), "hello there".into()));
    spec.cwd = Some("/usr".into());
    let (ended, host) = converse(signals, &spec, Host::read_all);
    assert_eq!(ended.unwrap(), Some(Exited::Code(0)));
    assert!(host.said("/usr\n") && host.said("GREETING=hello there\n"));
    assert!(!host.said("CARGO"), "nothing of our own environment");
}

fn failures_have_kinds(_: &Signals) {
    let directory = std::env::temp_dir().join(format!("casemate-session-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let program = |name: &str, content: &str| {
        use std::os::unix::fs::PermissionsExt;
        let path = directory.join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.to_string_lossy().into_owned()
    };
    let kind = |argv0: String, cwd: Option<&str>| {
        let spec = Spec {
            argv: vec![argv0],
            cwd: cwd.map(Into::into),
            ..Spec::default()
        };
        command::spawn(&spec).err().expect("it must not run").kind
    };
    let orphan = program("orphan", "#!/nowhere/interpreter\n");
    let kinds = [
        kind(orphan, None),
        kind("no-such-program".into(), None),
        kind("/bin/sh".into(), Some("/nowhere")),
    ];
    std::fs::remove_dir_all(&directory).unwrap();
    assert_eq!(
        kinds,
        [
            FailureKind::NotFound,
            FailureKind::NotFound,
            FailureKind::Other
        ]
    );
}

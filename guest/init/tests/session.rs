//! The session with a real command on this host, over a socket pair in place of vsock.
//!
//! It runs without the usual harness: like PID 1, a session blocks signals for its process and reaps every child.

use casemate_init::command;
use casemate_init::hardware::Hardware;
use casemate_init::protocol::{
    Decoder, Exited, FailureKind, Frame, MAX_PAYLOAD, STDIN_WINDOW, Sender, Spec,
};
use casemate_init::session::{self, Signals};
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

type Outcome = Result<Option<Exited>, casemate_init::Error>;

/// Runs a command with `host` on the other side, and returns how it ended and what the host has then.
fn converse(
    signals: &Signals,
    spec: &Spec,
    host: impl FnOnce(&mut Host) + Send + 'static,
) -> (Outcome, Host) {
    let (guest, stream) = UnixStream::pair().unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let child = command::spawn(spec).unwrap();
    let group = child.pid;
    let mut side = Host {
        stream,
        decoder: Decoder::new(Sender::Guest),
        stdout: vec![],
        stderr: vec![],
        taken: 0,
    };
    let thread = thread::spawn(move || {
        host(&mut side);
        side
    });
    let guest = OwnedFd::from(guest);
    let end_all = || {
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
    };
    let ended = session::run(
        &guest,
        Decoder::new(Sender::Host),
        child,
        signals,
        &Hardware::default(),
        &end_all,
    );
    drop(guest);
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

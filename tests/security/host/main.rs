//! The walls that need no KVM: a prisoner behind each of them, on any machine.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::Command;

use casemate_seccomp_filters::{EXIT_VIOLATION, Role};
use casemate_tests::{Finished, Running};

fn prisoner(arguments: &[&str]) -> Finished {
    let mut command = Command::new(env!("CARGO_BIN_EXE_casemate-prisoner"));
    command.args(arguments);
    Running::start(command, None).unwrap().wait().unwrap()
}

/// Each attempt, and the call at which a sealed VMM ends for it.
const ATTEMPTS: &[(&str, &str)] = &[
    ("open-root", "openat (257)"),
    ("open-passwd", "openat (257)"),
    ("open-proc", "openat (257)"),
    ("open-from-directory", "openat (257)"),
    ("create-file", "openat (257)"),
    ("tcp-connect", "socket (41)"),
    ("tcp-bind", "socket (41)"),
    ("abstract-connect", "socket (41)"),
    ("become-root", "setuid (105)"),
    ("user-namespace", "unshare (272)"),
    ("exec", "execve (59)"),
    ("open-from-inherited", "openat (257)"),
    ("udp-send", "socket (41)"),
    ("signal-others", "kill (62)"),
    ("read-others-memory", "process_vm_readv (310)"),
    ("mount", "unshare (272)"),
    ("chroot", "chroot (161)"),
    ("raise-limit", "prlimit64 (302)"),
    ("session-key", "keyctl (250)"),
    ("run-data", "mprotect (10)"),
    ("write-code", "mprotect (10)"),
    ("map-executable", "mmap (9)"),
];

#[test]
fn a_sealed_thread_of_any_role_ends_at_the_first_attempt() {
    for role in Role::VMM {
        for (attempt, call) in ATTEMPTS {
            let done = prisoner(&["--seccomp", role.name(), "sealed", attempt]);
            assert_eq!(
                i32::from(done.code),
                EXIT_VIOLATION,
                "{role:?} {attempt} {done:#?}"
            );
            assert_eq!(done.stdout, "", "{role:?} {attempt}");
            let line = format!("called {call} with ");
            assert_eq!(done.stderr.lines().count(), 1, "{done:#?}");
            assert!(done.stderr.contains(&line), "{done:#?}");
        }
    }
}

/// The C library blocks SIGSYS around these, so they get an error instead.
#[test]
fn a_sealed_thread_starts_neither_threads_nor_processes() {
    for role in Role::VMM {
        for attempt in ["new-thread", "new-process"] {
            let done = prisoner(&["--seccomp", role.name(), "sealed", attempt]);
            let line = format!("{attempt}: refused: Operation not permitted (os error 1)");
            done.assert_line(&line);
        }
    }
}

#[test]
fn landlock_alone_refuses_everything_with_a_name() {
    let address = SocketAddr::from_abstract_name("casemate-security-test").unwrap();
    let _listener = UnixListener::bind_addr(&address).unwrap();
    let bare = prisoner(&["abstract-connect"]);
    bare.assert_line("abstract-connect: possible");

    let done = prisoner(&[
        "--landlock",
        "read-held",
        "open-root",
        "open-passwd",
        "open-proc",
        "open-from-directory",
        "create-file",
        "exec",
        "tcp-connect",
        "tcp-bind",
        "abstract-connect",
        "signal-parent",
    ]);
    done.assert_line("read-held: possible");
    for attempt in [
        "open-root",
        "open-passwd",
        "open-proc",
        "open-from-directory",
        "create-file",
        "exec",
    ] {
        done.assert_line(&format!(
            "{attempt}: refused: Permission denied (os error 13)"
        ));
    }
    // Younger walls: there or not, but as the outcome's line says.
    let outcome = done.stdout.lines().next().unwrap_or_default();
    for (attempt, promise) in [
        ("tcp-connect", "no TCP"),
        ("tcp-bind", "no TCP"),
        ("abstract-connect", "no abstract sockets"),
        ("signal-parent", "no signals to others"),
    ] {
        let possible = done.stdout.contains(&format!("{attempt}: possible"));
        let refused = done
            .stdout
            .contains(&format!("{attempt}: refused: Permission denied"))
            || done
                .stdout
                .contains(&format!("{attempt}: refused: Operation not permitted"))
            || done.stdout.contains(&format!("{attempt}: refused: EPERM"));
        if outcome.contains(promise) {
            assert!(refused && !possible, "{attempt} {done:#?}");
        } else {
            assert!(!refused, "{attempt} {done:#?}");
        }
    }
}

#[test]
fn a_sealed_broker_does_its_work() {
    for role in [Role::Broker, Role::UnjailedBroker] {
        let done = prisoner(&["sealed-broker", role.name()]);
        assert_eq!(done.code, 0, "{done:#?}");
        done.assert_line("open /images/disk: ok");
        done.assert_line("connect 7: ok");
        for done_with in [
            "create /images/new",
            "commit /images/new",
            "create /images/disk",
        ] {
            done.assert_line(&format!("{done_with}: ok"));
        }
        for done_with in ["commit /images/disk", "create another", "discard it"] {
            done.assert_line(&format!("{done_with}: ok"));
        }
        for refused in [
            "create /etc/new: no: ",
            "commit /etc/new: no: ",
            "open /images/../disk: no: ",
            "open /etc/passwd: no: ",
            "connect 8: no: ",
        ] {
            assert!(done.stdout.contains(refused), "{done:#?}");
        }
    }
}

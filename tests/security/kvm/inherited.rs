//! What the jailer's caller has and passes on without wanting to.
#![allow(unsafe_code)] // Keyrings have no safe form in the libraries at hand.

use std::fs::File;
use std::process::Stdio;

use casemate_tests::Running;
use nix::libc;
use nix::sys::personality::{self, Persona};

use crate::outside::*;

/// Runs on a thread of its own, for what is done to its credentials.
fn in_a_thread<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(run).join().unwrap())
}

#[test]
fn keys_stay_outside() {
    let done = in_a_thread(|| {
        let name: *const libc::c_char = std::ptr::null();
        // SAFETY: without a name nothing is read.
        let joined =
            unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, name) };
        assert!(joined > 0, "a session keyring for the test");
        // SAFETY: two strings that end in a NUL and three bytes; the kernel copies them.
        let added = unsafe {
            libc::syscall(
                libc::SYS_add_key,
                c"user".as_ptr(),
                c"casemate-security-test".as_ptr(),
                b"key".as_ptr(),
                3,
                libc::KEY_SPEC_SESSION_KEYRING,
            )
        };
        assert!(added > 0, "a key in it");
        // Without a jail it is had, so the attempt can succeed.
        let mut bare = std::process::Command::new(env!("CARGO_BIN_EXE_casemate-prisoner"));
        bare.arg("session-key");
        let bare = Running::start(bare, None).unwrap().wait().unwrap();
        bare.assert_line("session-key: possible");
        Jail::new().start(&["session-key"]).wait().unwrap()
    });
    assert_eq!(done.code, 0, "{done:#?}");
    assert!(
        done.stdout.starts_with("session-key: refused: "),
        "{done:#?}"
    );
}

#[test]
fn address_space_layout_stays_random() {
    let mut running = in_a_thread(|| {
        // A thread's own setting, like its keyring.
        personality::set(Persona::ADDR_NO_RANDOMIZE | Persona::READ_IMPLIES_EXEC).unwrap();
        Jail::new().start(&["stay"])
    });
    running.wait_for_line("stays").unwrap();
    let prisoner = prisoner_of(&running);
    let text = std::fs::read_to_string(format!("/proc/{prisoner}/personality")).unwrap();
    assert_eq!(text.trim(), "00000000");
    running.close_stdin();
    assert_eq!(running.wait().unwrap().code, 0);
}

#[test]
fn a_directory_is_no_standard_stream() {
    for stream in 0..3 {
        let mut command = Jail::new().command;
        let directory = || Stdio::from(File::open("/").unwrap());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        match stream {
            0 => command.stdin(directory()),
            1 => command.stdout(directory()),
            _ => command.stderr(directory()),
        };
        let output = command
            .args(["--", "open-from-inherited"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        assert_eq!(output.stdout, b"", "the prisoner has run");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(stream == 2 || text.contains("a directory"), "{text}");
    }
}

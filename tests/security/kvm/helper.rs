//! A prisoner in a helper's jail: a back-end that its guest has taken over.

use std::process::Command;

use casemate_seccomp_filters::EXIT_VIOLATION;
use casemate_tests::{Running, bin, unique_id};

use crate::outside::*;

/// What no helper may manage, whatever it was given: as a VMM, but that it may be given these two, and has libraries.
fn attempts() -> impl Iterator<Item = &'static str> {
    let given = ["chroot", "join-group"];
    let all = crate::inside::ATTEMPTS.iter().copied();
    let more = [
        "open-from-directory",
        "session-key",
        "write-code",
        "run-data",
        "map-executable",
        "climb-out",
    ];
    all.filter(move |name| !given.contains(name)).chain(more)
}

/// What Debian's virtiofsd needs to serve a directory that guests write to.
const FILE_SERVER: &str =
    "sys_chroot setpcap chown dac_override fowner fsetid setgid setuid mknod setfcap";

fn attempt(name: &str, capabilities: &str) -> casemate_tests::Finished {
    let (id, user) = (unique_id("helper"), user().to_string());
    let directory = tempfile::tempdir().unwrap();
    let shared = directory.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let mut command = Command::new(bin("casemate-jailer"));
    command
        .args(["helper", "--id", &id, "--exec-file"])
        .arg(env!("CARGO_BIN_EXE_casemate-prisoner"))
        .args(["--uid", &user, "--gid", &user, "--id-count", "1000"])
        .args(["--bind-rw".as_ref(), shared.as_os_str()])
        .args(["--listen".as_ref(), directory.path().join("s").as_os_str()]);
    for name in capabilities.split_whitespace() {
        command.args(["--cap", name]);
    }
    command.args(["--", name]);
    Running::start(command, Some(directory))
        .unwrap()
        .wait()
        .unwrap()
}

#[test]
fn nothing_gets_out_of_a_helpers_jail() {
    for capabilities in ["", FILE_SERVER] {
        for name in attempts() {
            let done = attempt(name, capabilities);
            assert!(!done.stdout.contains("possible"), "{name}: {done:#?}");
            // It was refused, or was the end of it.
            let ended = i32::from(done.code) == EXIT_VIOLATION;
            let refused = done.code == 0 && done.stdout.contains(": refused: ");
            assert!(ended || refused, "{name}: {done:#?}");
        }
    }
}

/// The group that it joins is root's in its namespace alone.
#[test]
fn a_capability_is_what_makes_the_difference() {
    for (name, capability) in [("chroot", "sys_chroot"), ("join-group", "setgid")] {
        attempt(name, capability).assert_line(&format!("{name}: possible"));
        let without = attempt(name, "");
        without.assert_line(&format!(
            "{name}: refused: Operation not permitted (os error 1)"
        ));
    }
}

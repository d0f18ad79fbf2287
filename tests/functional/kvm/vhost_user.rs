//! Devices whose work another process does: real back-ends from Debian's packages.

use super::probe;
use casemate_tests::{Share, Vm, exit, pattern_disk, pattern_word, storage_daemon, virtiofsd};
use serde_json::json;
use std::path::Path;

fn vm(task: &str, socket: &Path) -> Vm {
    probe(task).back_end("drives", json!({ "drive_id": "data", "queues": 4 }), socket)
}

#[test]
fn a_disk_of_the_storage_daemon_is_read_and_written() {
    for jailed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (disk, socket) = (dir.path().join("disk"), dir.path().join("socket"));
        pattern_disk(&disk, 64).unwrap();
        let back_end = storage_daemon(&disk, &socket).unwrap();
        let mut machine = vm("probe.task=blk probe.write=1 probe.queue=3", &socket);
        if !jailed {
            machine = machine.unjailed();
        }
        let done = machine.run().unwrap();
        done.assert_line("probe: blk ok");
        assert_eq!(done.code, exit::GUEST_RESET);
        drop(back_end);
        let bytes = std::fs::read(&disk).unwrap();
        assert_eq!(
            bytes[63 * 512..][..8],
            (!pattern_word(63 * 512)).to_le_bytes()
        );
    }
}

#[test]
fn a_back_end_that_dies_leaves_a_machine_that_lives() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, socket) = (dir.path().join("disk"), dir.path().join("socket"));
    pattern_disk(&disk, 1 << 17).unwrap();
    let back_end = storage_daemon(&disk, &socket).unwrap();
    let machine = vm("probe.task=blk", &socket).unjailed().start().unwrap();
    machine.wait_for_line("probe: drive").unwrap();
    drop(back_end);
    // The probe gives up waiting for its request, and ends the machine as it wants.
    let done = machine.wait().unwrap();
    assert_eq!(done.code, exit::GUEST_RESET);
    done.assert_line("probe: blk FAIL: timed out");
    let said = format!("{}{}", done.stdout, done.stderr);
    assert_eq!(
        said.matches("data: it has gone away").count(),
        1,
        "{done:#?}"
    );
}

#[test]
fn without_a_back_end_no_machine_starts() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let refused = vm("probe.task=blk", &socket).unjailed().run().unwrap();
    refused.assert_refused(exit::BAD_INPUT, &["vhost-user back-end", "No such file"]);
    // One that listens and never answers.
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let refused = vm("probe.task=blk", &socket).run().unwrap();
    refused.assert_refused(exit::BAD_INPUT, &["data", "does not answer"]);
}

#[test]
fn a_directory_of_virtiofsd_is_looked_into() {
    for (jailed, how) in [
        (false, Share::ToRead),
        (true, Share::ToRead),
        (true, Share::ToWrite),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (shared, socket) = (dir.path().join("shared"), dir.path().join("socket"));
        std::fs::create_dir(&shared).unwrap();
        std::fs::write(shared.join("hello"), [7; 1234]).unwrap();
        let _back_end = virtiofsd(&shared, how, &socket).unwrap();
        let fs = json!({ "tag": "host" });
        let mut machine = probe("probe.task=fs").back_end("fs", fs, &socket);
        if !jailed {
            machine = machine.unjailed();
        }
        let done = machine.run().unwrap();
        done.assert_line("probe: fs host hello 1234");
        done.assert_line("probe: fs ok");
    }
}

//! Devices whose work another process does: real back-ends from Debian's packages.

use super::probe;
use casemate_tests::{
    NetBackEnd, Share, Vm, exit, pattern_disk, pattern_word, storage_daemon, virtiofsd,
};
use serde_json::json;
use std::os::unix::fs::symlink;
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
        // The probe finds no way to this one.
        std::fs::write(dir.path().join("outside"), "secret").unwrap();
        symlink("..", shared.join("up")).unwrap();
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

#[test]
fn a_network_card_of_a_back_end_sends_and_receives() {
    let mac = [6, 0, 0xac, 0x10, 0, 2];
    let frame = |payload: &[u8]| {
        let header = [&mac[..], &[2, 0, 0, 0, 0, 1], &[0x88, 0xb5]].concat();
        let mut frame = [&header, payload].concat();
        frame.resize(frame.len().max(60), 0);
        frame
    };
    let answers = [frame(b"one"), frame(&[0xa5; 1000]), frame(&[0x5a; 1486])];
    for jailed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let mut next = answers.clone().into_iter();
        let back_end = NetBackEnd::start(&socket, move |_| next.next()).unwrap();
        let card = json!({ "iface_id": "eth0", "guest_mac": "06:00:ac:10:00:02", "mtu": 1500 });
        let machine = probe("probe.task=net probe.count=3");
        let mut machine = machine.back_end("network-interfaces", card, &socket);
        if !jailed {
            machine = machine.unjailed();
        }
        let done = machine.run().unwrap();
        done.assert_line("probe: mac [06, 00, ac, 10, 00, 02]");
        done.assert_line("probe: net ok");
        let sent = back_end.wait().unwrap();
        assert_eq!(sent.len(), 4);
        assert_eq!(
            (&sent[0][..6], &sent[0][14..19]),
            (&[0xff; 6][..], &b"ready"[..])
        );
        // Each of the others came back to its sender.
        for (sent, answer) in sent.iter().skip(1).zip(&answers) {
            assert_eq!((&sent[..6], &sent[6..12]), (&answer[6..12], &mac[..]));
            assert_eq!(sent[12..], answer[12..]);
        }
    }
}

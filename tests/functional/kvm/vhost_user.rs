//! Devices whose work another process does: real back-ends from Debian's packages.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use casemate_tests::{Vm, exit, pattern_disk, pattern_word};
use serde_json::json;

/// A back-end that ends with the test.
struct BackEnd(Child);

impl Drop for BackEnd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(command: &mut Command, socket: &Path) -> BackEnd {
    let child = command.stdin(Stdio::null()).spawn();
    let child = BackEnd(child.expect("cargo xtask test installs it"));
    let end = Instant::now() + Duration::from_secs(30);
    while !socket.exists() {
        assert!(Instant::now() < end, "the back-end makes no socket");
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

/// QEMU's storage daemon, which serves `disk`.
fn storage_daemon(disk: &Path, socket: &Path) -> BackEnd {
    let mut command = Command::new("qemu-storage-daemon");
    command.args([
        "--blockdev",
        &format!("driver=file,node-name=disk,filename={}", disk.display()),
        "--export",
        &format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=4,\
             addr.type=unix,addr.path={}",
            socket.display()
        ),
    ]);
    start(&mut command, socket)
}

fn vm(task: &str, socket: &Path) -> Vm {
    Vm::probe(task).back_end("drives", json!({ "drive_id": "data", "queues": 4 }), socket)
}

#[test]
fn a_disk_of_the_storage_daemon_is_read_and_written() {
    for jailed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (disk, socket) = (dir.path().join("disk"), dir.path().join("socket"));
        pattern_disk(&disk, 64).unwrap();
        let back_end = storage_daemon(&disk, &socket);
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
    let back_end = storage_daemon(&disk, &socket);
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
    for jailed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (shared, socket) = (dir.path().join("shared"), dir.path().join("socket"));
        std::fs::create_dir(&shared).unwrap();
        std::fs::write(shared.join("hello"), [7; 1234]).unwrap();
        let mut command = Command::new("/usr/lib/qemu/virtiofsd");
        command.args(["-f", "-o", &format!("source={}", shared.display())]);
        command.arg(format!("--socket-path={}", socket.display()));
        command.stderr(Stdio::null());
        let _back_end = start(&mut command, &socket);
        let fs = json!({ "tag": "host" });
        let mut machine = Vm::probe("probe.task=fs").back_end("fs", fs, &socket);
        if !jailed {
            machine = machine.unjailed();
        }
        let done = machine.run().unwrap();
        done.assert_line("probe: fs host hello 1234");
        done.assert_line("probe: fs ok");
    }
}

//! What the program says of snapshots, as Firecracker's clients ask it.

use std::process::{Command, Output};

use casemate_vmm::memory::touched::Untouched;
use casemate_vmm::snapshot::{Section, SnapshotId, format, memory};

const ID: SnapshotId = SnapshotId::from_bytes([0xab; 16]);

fn vmm(arguments: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_casemate-vmm");
    Command::new(program).args(arguments).output().unwrap()
}

fn said(arguments: &[&str]) -> String {
    let output = vmm(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_version_is_told() {
    assert_eq!(said(&["--snapshot-version"]), "v1.0.0\n");
}

#[test]
fn both_files_are_described() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name| directory.path().join(name).to_str().unwrap().to_owned();
    let section = Section {
        kind: 3,
        index: 0,
        version: 2,
        payload: b"{}".to_vec(),
    };
    let state = path("state");
    std::fs::write(&state, format::encode(ID, &[section]).unwrap()).unwrap();
    let expected = "v1.0.0\nstate of snapshot abababababababababababababababab\n\
                    section vm, index 0, version 2: 2 bytes\n";
    assert_eq!(said(&["--describe-snapshot", &state]), expected);
    let guest = casemate_vmm::memory::allocate(1 << 20).unwrap();
    let file = std::fs::File::create_new(path("memory")).unwrap();
    memory::write(&guest, Untouched::Mapped, &file, ID).unwrap();
    let text = said(&["--describe-snapshot", &path("memory")]);
    assert!(
        text.starts_with("v1.0.0\nmemory of snapshot abab"),
        "{text}"
    );
    assert!(text.ends_with("region at 0x0: 1048576 bytes\n"), "{text}");
}

#[test]
fn what_cannot_be_described_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let junk = directory.path().join("junk");
    std::fs::write(&junk, "junk").unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (path, why) in [
        (&junk, "it is no snapshot of Casemate's"),
        (&fifo, "it is not a regular file"),
        (
            &directory.path().join("none"),
            "cannot open it: No such file",
        ),
    ] {
        let path = path.to_str().unwrap();
        let output = vmm(&["--describe-snapshot", path]);
        let error = String::from_utf8(output.stderr).unwrap();
        let expected = format!("casemate-vmm: --describe-snapshot {path}: {why}");
        assert!(error.starts_with(&expected), "{error}");
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
    }
}

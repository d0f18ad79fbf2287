//! Root file systems that are images: of another type, and of none.

use std::path::Path;
use std::process::Command;

use casemate_tests::{Casemate, rootfs};

#[test]
fn an_ext4_image_is_a_root() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("root.ext4");
    let made = Command::new("/sbin/mkfs.ext4")
        .args(["-q", "-d"])
        .arg(rootfs())
        .arg(&image)
        .arg("32M")
        .output();
    let made = made.expect("mkfs.ext4 (package e2fsprogs)");
    assert!(made.status.success(), "{made:?}");
    let before = std::fs::read(&image).unwrap();
    let script = "grep -c ext4 /proc/filesystems; echo changed > /etc/passwd; cat /etc/passwd";
    let done = run(&image, "ext4", script);
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (0, "1\nchanged\n"),
        "{done:#?}"
    );
    // What the guest writes is above it.
    assert!(before == std::fs::read(&image).unwrap(), "it was written");
}

#[test]
fn an_image_that_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("root.erofs");
    let garbage: Vec<u8> = (0..1u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    std::fs::write(&image, garbage).unwrap();
    let done = run(&image, "erofs", "echo started");
    assert_eq!((done.code, done.stdout.as_str()), (125, ""), "{done:#?}");
    assert!(
        done.stderr.contains("mount") && done.stderr.contains("erofs"),
        "{done:#?}"
    );
}

/// The same image below two machines, each with a disk of its own for what it writes: full, it says so.
#[test]
fn a_root_has_the_size_that_it_was_given() {
    let casemate = Casemate::new();
    let script = "dd if=/dev/zero of=/fill bs=64k; echo $?; rm /fill; echo again > /etc/passwd; cat /etc/passwd";
    let run = || casemate.start(&["--root-size", "8M"], script).unwrap();
    for run in [run(), run()] {
        let done = run.wait().unwrap();
        assert_eq!(
            (done.code, done.stdout.as_str()),
            (0, "1\nagain\n"),
            "{done:#?}"
        );
        assert!(done.stderr.contains("No space left on device"), "{done:#?}");
    }
    casemate.assert_clean();
    let data = std::env::var_os("CASEMATE_DATA_DIR").unwrap();
    let layers = std::fs::read_dir(Path::new(&data).join("layers")).unwrap();
    assert_eq!(layers.count(), 0, "a machine's disk is left");
}

/// `script` on the image; nothing is left of its machine.
#[track_caller]
fn run(image: &Path, kind: &str, script: &str) -> casemate_tests::Finished {
    let casemate = Casemate::new();
    let image = image.to_str().unwrap();
    let words = ["run", "--rootfs", image, "--rootfs-type", kind];
    let done = casemate.call(&[&words[..], &["--", "sh", "-c", script]].concat());
    casemate.assert_clean();
    done.unwrap()
}

//! The VMM and the jailer by hand, with an unmodified kernel and no init of ours.

use std::path::Path;
use std::process::Command;

use casemate_tests::{Vm, exit, kernel_file, packaged_kernel, rootfs};
use serde_json::json;

/// Without a root file system the kernel panics, restarts by ACPI's reset register, and says why on
/// the serial console.
#[test]
fn a_kernel_without_a_root_resets() {
    for protocol in ["linux64", "pvh"] {
        let done = Vm::kernel(&kernel_file("cloud"), "console=ttyS0 panic=-1 quiet")
            .set("/boot-source/protocol", json!(protocol))
            .run()
            .unwrap();
        assert!(
            done.stdout.contains("Unable to mount root fs"),
            "{protocol}: {done:#?}"
        );
        assert_eq!(done.code, exit::GUEST_RESET, "{protocol}: {done:#?}");
    }
}

/// The distribution's own file, compressed as it comes: the VMM or a helper of its unpacks it, not the guest.
#[test]
fn a_packaged_bzimage_boots() {
    let done = Vm::kernel(&packaged_kernel(), "console=ttyS0 panic=-1 quiet")
        .run()
        .unwrap();
    assert!(done.stdout.contains("Unable to mount root fs"), "{done:#?}");
    assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
}

/// By ACPI's sleep registers, from a kernel's own driver and without any init of ours.
#[test]
fn a_guest_powers_itself_off() {
    let vm = Vm::kernel(
        &kernel_file("cloud"),
        "console=ttyS0 panic=-1 quiet rdinit=/init",
    );
    let initrd = vm.path("initrd");
    busybox_initrd(
        vm.dir(),
        &initrd,
        "#!/bin/sh\n/bin/busybox echo going > /dev/console\n/bin/busybox poweroff -f\n",
    );
    let path = initrd.to_str().unwrap().to_owned();
    let done = vm
        .set("/boot-source/initrd_path", json!(path))
        .jailer_arg("--grant-ro")
        .jailer_arg(&path)
        .run()
        .unwrap();
    done.assert_line("going");
    assert_eq!(done.code, exit::GUEST_POWERED_OFF, "{done:#?}");
}

/// An initrd of busybox and `init`, made in `dir` by busybox's own cpio.
pub(crate) fn busybox_initrd(dir: &Path, to: &Path, init: &str) {
    let root = dir.join("initrd-root");
    for name in ["bin", "dev"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    let busybox = rootfs().join("bin/busybox");
    std::fs::copy(&busybox, root.join("bin/busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", root.join("bin/sh")).unwrap();
    std::fs::write(root.join("init"), init).unwrap();
    let script = "chmod 755 init && mknod dev/console c 5 1 && \
                  find . | \"$0\" cpio -o -H newc > \"$1\"";
    let done = Command::new("sh")
        .args(["-c", script])
        .args([&busybox, to])
        .current_dir(&root)
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
}

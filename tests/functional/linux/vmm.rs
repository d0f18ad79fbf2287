//! The VMM and the jailer by hand, with an unmodified kernel and no init of ours.

use casemate_tests::{Vm, exit, kernel_file};
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

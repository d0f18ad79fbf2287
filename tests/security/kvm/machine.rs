//! The real VMM with a guest that runs: what the kernel says of its threads, and of its broker.

use casemate_tests::Vm;
use serde_json::json;

use crate::outside::*;

#[test]
fn a_running_machine_is_confined_in_every_thread() {
    let user = user();
    let vm = with_user(Vm::probe("").vsock().entropy(), user);
    let vm = vm
        .set("/machine-config/vcpu_count", json!(2))
        .set("/boot-source/boot_args", json!("idle acpi=off"));
    let running = vm.start().unwrap();
    running.wait_for_line("probe: idle").unwrap();
    let broker = running.pid().as_raw().unsigned_abs();
    eventually("the VMM runs", || !children(broker).is_empty());
    let vmm = prisoner_of(&running);
    // The set-up filter, and its own sealed one over it.
    let sealed = || {
        let filters = |thread: &u32| status(&format!("{vmm}/task/{thread}"), "Seccomp_filters");
        let threads = threads(vmm);
        threads.len() == 4 && threads.keys().all(|thread| filters(thread) == "2")
    };
    eventually("every thread is sealed", sealed);
    let names: Vec<String> = threads(vmm).into_values().collect();
    assert_eq!(names, ["control", "device", "vcpu0", "vcpu1"]);
    for thread in threads(vmm).keys() {
        assert_eq!(status(&format!("{vmm}/task/{thread}"), "Seccomp"), "2");
    }
    for process in [vmm, broker] {
        assert_confined(process, user);
        assert_eq!(status(&process.to_string(), "Seccomp"), "2");
        // Nobody of the same user may trace it, and no core of it is dumped: its files in `/proc`
        // are root's then.
        use std::os::unix::fs::MetadataExt;
        let owner = std::fs::metadata(format!("/proc/{process}/mem"))
            .unwrap()
            .uid();
        assert_eq!(owner, 0, "{process} can be traced by its user");
    }
    assert_ne!(namespace(vmm, "pid"), namespace(std::process::id(), "pid"));
    assert_no_way_out(vmm);
    let environment = std::fs::read(format!("/proc/{vmm}/environ")).unwrap();
    assert_eq!(environment, b"");
    let open = descriptors(vmm);
    let has = |part: &str| open.values().any(|to| to.to_string_lossy().contains(part));
    // The table is closed once it is read, and so is the program.
    assert!(
        !has("casemate-handover") && !has("casemate-vmm"),
        "{open:?}"
    );

    // No mapping of the VMM is writable and executable, and none is executable but its program.
    let maps = std::fs::read_to_string(format!("/proc/{vmm}/maps")).unwrap();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let rights = fields.nth(1).unwrap_or_default();
        let what = fields.nth(3).unwrap_or_default();
        if rights.contains('x') {
            assert!(!rights.contains('w'), "{line}");
            let program = what.contains("casemate-vmm");
            assert!(
                program || ["[vdso]", "[vsyscall]"].contains(&what),
                "{line}"
            );
        }
    }
}

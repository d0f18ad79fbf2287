//! gdb looks at a Linux kernel that runs.
//!
//! Breakpoints are the kvm tier's: QEMU's processors, of which the lab is one, do not stop for debug registers in a nested guest.

use casemate_tests::{Gdb, exit};
use serde_json::json;

use crate::guest::linux;

/// Where a thread is. A step of a repeated instruction (`rep stos`) leaves `$pc` and takes one off `$rcx`.
const NOTE: &str = "set $before = $pc + $rcx";
const MOVED: &str = "$pc + $rcx != $before";

#[test]
fn gdb_stops_a_kernel_on_two_cpus_and_lets_it_go() {
    let script = "
read address rest <<EOF
$(grep ' linux_banner$' /proc/kallsyms)
EOF
echo \"banner at 0x$address\"
count() { n=0; while :; do n=$((n + 1)); [ $((n % 1000)) = 0 ] && echo \"counted $1 $n\"; done; }
count a & count b";
    let vm = linux("", &[], script, &[])
        .set("/machine-config/vcpu_count", json!(2))
        .debugged();
    let socket = vm.gdb_path();
    let running = vm.start().unwrap();
    let said = Gdb::connect(&socket)
        .then("printf \"64-bit: %d\\n\", ($cs & 3) == 0")
        .then("stepi")
        .then("detach")
        .run();
    assert!(said.contains("64-bit: 1\n"), "{said}");
    let banner = running.wait_for_line("banner at ").unwrap();
    let banner = banner.rsplit(' ').next().unwrap().trim().to_owned();
    running.wait_for_line("counted a 1000").unwrap();
    running.wait_for_line("counted b 1000").unwrap();
    let said = Gdb::connect(&socket)
        .then("info threads")
        .then(&format!("x/s {banner}"))
        .then(NOTE)
        .then("stepi")
        .then(&format!("printf \"moved: %d\\n\", {MOVED}"))
        .then("thread 2")
        .then(NOTE)
        .then("stepi")
        .then(&format!("printf \"so did the other: %d\\n\", {MOVED}"))
        .then("detach")
        .run();
    for words in [
        "Thread 1.2",
        "Linux version 6",
        "moved: 1\n",
        "so did the other: 1\n",
    ] {
        assert!(
            said.contains(words),
            "{words:?}: {said}\n{}",
            running.said()
        );
    }
    let counted = running.said().matches("counted").count();
    for count in ["a", "b"] {
        let further = format!("counted {count} {}000", counted + 1);
        running.wait_for_line(&further).unwrap();
    }
    Gdb::connect(&socket).then("kill").run();
    let done = running.wait().unwrap();
    assert_eq!(done.code, exit::ENDED_BY_HOST, "{done:#?}");
}

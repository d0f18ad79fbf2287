//! CPUs that come and go while the guest runs.

use casemate_tests::{Casemate, exit, unique_id};

#[test]
fn a_guest_gets_four_cpus_and_keeps_two() {
    let casemate = Casemate::new();
    let id = unique_id("vcpus");
    // What it has is said when it changes.
    let script = "had=; while [ \"$had\" != end ]; do has=$(nproc); \
                  [ \"$has\" = \"$had\" ] || echo \"has $has: $(cat /sys/devices/system/cpu/online)\"; \
                  had=$has; sleep 1; done";
    let mut run = casemate
        .start(&["--id", &id, "--cpus", "1", "--max-cpus", "4"], script)
        .unwrap();
    run.close_stdin();
    run.wait_for_line("has 1: 0").unwrap();
    let vcpus = |words: &[&str]| casemate.call(&[&["vcpus", &id], words].concat()).unwrap();
    assert_eq!(vcpus(&[]).stdout, "1\n");
    assert_eq!(vcpus(&["4"]).code, 0);
    run.wait_for_line("has 4: 0-3").unwrap();
    assert_eq!(vcpus(&["2"]).code, 0);
    run.wait_for_line("has 2: 0-1").unwrap();
    // Those that it has let go come again.
    assert_eq!(vcpus(&["3"]).code, 0);
    run.wait_for_line("has 3: 0-2").unwrap();
    assert_eq!(vcpus(&[]).stdout, "3\n");
    let refused = vcpus(&["5"]);
    assert_eq!(refused.code, 125, "{refused:#?}");
    assert!(refused.stderr.contains("1 to 4"), "{refused:#?}");
    run.signal(nix::sys::signal::Signal::SIGTERM).unwrap();
    let done = run.wait().unwrap();
    assert_ne!(done.code, exit::VMM_FAILED, "{done:#?}");
    casemate.assert_nothing_of(&id);
}

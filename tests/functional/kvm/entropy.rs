//! virtio-rng against the probe's driver.

use super::probe;

#[test]
fn gives_random_bytes() {
    probe("probe.task=rng")
        .entropy()
        .run()
        .unwrap()
        .assert_line("probe: rng ok");
}

#[test]
fn is_absent_unless_configured() {
    let done = probe("probe.task=rng").run().unwrap();
    done.assert_line("probe: rng FAIL: no such device on the command line or the PCI bus");
}

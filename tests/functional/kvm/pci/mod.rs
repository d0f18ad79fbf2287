//! The tests of devices once more, with the devices on a PCI bus.
#![allow(
    clippy::duplicate_mod,
    reason = "a test says what a device does, whatever it is attached to"
)]

#[path = "../block.rs"]
mod block;
#[path = "../entropy.rs"]
mod entropy;
#[path = "../net.rs"]
mod net;
#[path = "../vsock.rs"]
mod vsock;

use casemate_tests::Vm;

/// The probe, with devices on a PCI bus.
fn probe(task: &str) -> Vm {
    Vm::probe(task).pci()
}

//! The tests of devices once more, with the devices on a PCI bus.
#![allow(
    clippy::duplicate_mod,
    reason = "a test says what a device does, whatever it is attached to"
)]

#[path = "../balloon.rs"]
mod balloon;
#[path = "../block.rs"]
mod block;
#[path = "../console.rs"]
mod console;
#[path = "../entropy.rs"]
mod entropy;
#[path = "../hostile.rs"]
mod hostile;
mod hotplug;
#[path = "../mem.rs"]
mod mem;
#[path = "../migration.rs"]
mod migration;
#[path = "../net.rs"]
mod net;
#[path = "../pmem.rs"]
mod pmem;
#[path = "../snapshot.rs"]
mod snapshot;
#[path = "../vhost_user.rs"]
mod vhost_user;
#[path = "../vsock.rs"]
mod vsock;

use casemate_tests::Vm;

/// The probe, with devices on a PCI bus.
fn probe(task: &str) -> Vm {
    Vm::probe(task).pci()
}

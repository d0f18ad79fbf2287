//! The kvm tier: the probe guest on `/dev/kvm`, each device driven over real KVM.

use casemate_tests::Vm;

mod api;
mod api_changes;
mod api_clients;
mod bad_input;
mod balloon;
mod block;
mod boot;
mod clients;
mod console;
mod debugger;
mod ending;
mod entropy;
mod hostile;
mod machine;
mod mem;
mod migrate;
mod migration;
mod net;
mod numa;
mod page_handler;
mod pci;
mod pmem;
mod runtime;
mod serial;
mod snapshot;
mod snapshot_commands;
mod vhost_user;
mod vsock;

/// The probe, with devices in MMIO windows.
fn probe(task: &str) -> Vm {
    Vm::probe(task)
}

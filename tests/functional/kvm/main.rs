//! The kvm tier: the probe guest on `/dev/kvm`, each device driven over real KVM.

mod bad_input;
mod balloon;
mod block;
mod boot;
mod console;
mod ending;
mod entropy;
mod net;
mod runtime;
mod vsock;

//! Virtio devices: what the guest's drivers talk to.
//!
//! A driver programs a [`transport`] on vCPU threads. Everything else happens on a device thread:
//! its [`worker::DeviceWorker`] owns the devices and calls them when a queue or a descriptor has news.
//! A device sees [`queue::Queue`]s and guest memory, nothing of transports or KVM.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod config_space;
pub mod console;
pub mod device;
pub mod entropy;
pub mod mem;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod rate_limiter;
pub mod transport;
pub mod update;
pub mod vhost_user;
pub mod vsock;
pub mod worker;

#[cfg(test)]
mod hole_tests;
#[cfg(test)]
mod long_chain_tests;
#[cfg(test)]
mod stress_tests;
#[cfg(test)]
pub(crate) mod testing;

pub use balloon::{Balloon, BalloonOptions};
pub use block::{Block, BlockOptions, CacheType};
pub use config_space::ConfigSpace;
pub use console::Console;
pub use device::VirtioDevice;
pub use entropy::Entropy;
pub use mem::{Mem, MemOptions};
pub use net::{Net, NetOptions};
pub use pmem::{Pmem, PmemOptions};
pub use transport::mmio::MmioTransport;
pub use vhost_user::{VhostUser, VhostUserOptions};
pub use vsock::{Vsock, VsockOptions};
pub use worker::{DeviceWorker, WorkerHandle};

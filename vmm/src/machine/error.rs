//! Why a machine was not started.

use std::io;

use thiserror::Error;

use super::{page_handler, placement, restoring};
use crate::devices::{clock, generation};
use crate::virtio::transport::mmio;
use crate::virtio::worker::RestoreFailed;
use crate::virtio::{balloon, block, mem, net, vhost_user, vsock};
use crate::{boot, bus, cpu_template, event_loop, kvm, lockdown, memory, vcpu};

/// Why a machine was not started.
#[derive(Debug, Error)]
pub enum Error {
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// The CPU template cannot be used.
    #[error(transparent)]
    CpuTemplate(#[from] cpu_template::Error),
    /// There is not that much memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The kernel, the initrd or the command line cannot be booted.
    #[error("cannot boot kernel {path:?}: {source}")]
    Boot {
        /// The kernel, as the config names it.
        path: String,
        /// Why.
        source: boot::Error,
    },
    /// The generation id could not be drawn.
    #[error(transparent)]
    Generation(#[from] generation::Error),
    /// The clock page could not be written.
    #[error(transparent)]
    Clock(#[from] clock::Error),
    /// The machine cannot be where it should on the host.
    #[error(transparent)]
    Placement(#[from] placement::Error),
    /// Two devices claim one address.
    #[error("put the devices on the bus: {0}")]
    Bus(#[from] bus::Error),
    /// A drive cannot be used.
    #[error(transparent)]
    Block(#[from] block::Error),
    /// A network card cannot be used.
    #[error("network interface {id:?}: {source}")]
    Net {
        /// Its id.
        id: String,
        /// Why.
        source: net::Error,
    },
    /// The metadata service cannot be made.
    #[error("metadata service: {0}")]
    Metadata(#[source] io::Error),
    /// A vhost-user device cannot be used.
    #[error(transparent)]
    VhostUser(#[from] vhost_user::Error),
    /// The socket device cannot be used.
    #[error(transparent)]
    Vsock(#[from] vsock::Error),
    /// The balloon cannot be made.
    #[error(transparent)]
    Balloon(#[from] balloon::Error),
    /// Persistent memory cannot be used.
    #[error(transparent)]
    Pmem(#[from] crate::virtio::pmem::Error),
    /// The memory device cannot be made.
    #[error(transparent)]
    Mem(#[from] mem::Error),
    /// A device's eventfds could not be made.
    #[error(transparent)]
    Transport(#[from] mmio::Error),
    /// It cannot go on from that snapshot.
    #[error(transparent)]
    Restore(#[from] restoring::Error),
    /// Its memory does not come.
    #[error(transparent)]
    PageHandler(#[from] page_handler::Error),
    /// A device cannot.
    #[error("the snapshot's devices: {0}")]
    RestoreDevice(#[from] RestoreFailed),
    /// The device thread's event loop could not be made.
    #[error("device thread: {0}")]
    EventLoop(#[from] event_loop::Error),
    /// A vCPU thread could not be started.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// A thread could not be sealed.
    #[error(transparent)]
    Lockdown(#[from] lockdown::Error),
    /// The host has no eventfd or thread for us.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// There is no window, or no slot, for a device. Configs are checked for it before.
    #[error("no interrupt pin and no PCI slot is left for a virtio device: remove some")]
    NoWindow,
}

/// For `map_err`: what was being done.
pub(super) fn host(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Host { what, source }
}

//! A transport as plain data: what its driver has made of it.
//!
//! A transport takes its state back by the same steps as its driver's writes, in their order, so that no file makes one
//! that no driver could have made.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::core::CoreState;
use super::pci::msix::MsixState;
use crate::virtio::queue::QueueStates;

/// A transport.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// What both kinds have.
    pub registers: CoreState,
    /// Whether the device waits for a reset.
    pub needs_reset: bool,
    /// What only one kind has.
    pub kind: KindState,
}

/// What only one kind of transport has.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
pub enum KindState {
    /// Of MMIO.
    Mmio {
        /// The register InterruptStatus.
        interrupt_status: u32,
    },
    /// Of PCI.
    Pci {
        /// Configuration space.
        config: Vec<u8>,
        /// Interrupts.
        msix: MsixState,
    },
}

/// Why a transport does not take a state.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RestoreError {
    /// The device has other queues.
    #[error("it has {found} queues, the device has {expected}")]
    Queues {
        /// How many the state has.
        found: usize,
        /// How many the device has.
        expected: usize,
    },
    /// The status register would not be that, or not with these features.
    #[error(
        "its status {status:#x} with the features {features:#x} is none that the device can have"
    )]
    Status {
        /// The status.
        status: u8,
        /// The features.
        features: u64,
    },
    /// MMIO's state on PCI, or the other way round.
    #[error("it is of another transport")]
    Kind,
    /// A table of interrupts of another size.
    #[error("it has {found} interrupt vectors, the device has {expected}")]
    Vectors {
        /// How many the state has.
        found: usize,
        /// How many the device has.
        expected: usize,
    },
}

/// How a device is to be started that ran when its machine was saved.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// What the driver had accepted.
    pub features: u64,
    /// Its queues, unchecked.
    pub queues: QueueStates,
}

/// A transport that can be saved. Both are called while no vCPU runs.
pub trait SavedTransport: Send + Sync {
    /// The transport, whose device, if it runs, has `queues`.
    fn save(&self, queues: &QueueStates) -> TransportState;

    /// Makes the transport of a device that has not been started what `state` says. How the device is to be started, if
    /// it ran.
    ///
    /// # Errors
    /// When the state is not one of such a device.
    fn restore(&self, state: &TransportState) -> Result<Option<Start>, RestoreError>;
}

//! What the control thread asks of a device, started or not: the operator's changes.

use std::fs::File;

use thiserror::Error;

use super::balloon;
use super::block;
use super::mem;
use super::rate_limiter::LimiterUpdate;

/// One change.
#[derive(Debug)]
pub enum Update {
    /// New limits for all that a device does.
    Limits(LimiterUpdate),
    /// Another file behind a drive, open as the drive needs it.
    File(File),
    /// Something for a balloon.
    Balloon(balloon::Command),
    /// New limits for a network card.
    NetLimits {
        /// For what the guest receives.
        rx: LimiterUpdate,
        /// For what it sends.
        tx: LimiterUpdate,
    },
    /// Something for a memory device.
    Mem(mem::Command),
}

impl Update {
    /// What it changes, for errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Limits(_) => "rate limits",
            Self::File(_) => "file",
            Self::Balloon(_) => "balloon",
            Self::NetLimits { .. } => "rate limits of a network card",
            Self::Mem(_) => "memory to plug",
        }
    }
}

/// What a device answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done,
    /// How a balloon is.
    Balloon(Box<balloon::Status>),
    /// How a memory device is.
    Mem(mem::Status),
}

/// Why a device was not changed.
#[derive(Debug, Error)]
pub enum UpdateError {
    /// This kind of device has nothing of the sort.
    #[error("the device has no {0}")]
    NotThisDevice(&'static str),
    /// The drive's file cannot be replaced by that one.
    #[error(transparent)]
    Drive(#[from] block::Error),
    /// The balloon cannot.
    #[error(transparent)]
    Balloon(#[from] balloon::Error),
    /// The memory device cannot.
    #[error(transparent)]
    Mem(#[from] mem::Error),
    /// There is no such device any more.
    #[error("the device is gone")]
    NoDevice,
    /// The device thread has ended.
    #[error("the device thread has ended")]
    NoThread,
}

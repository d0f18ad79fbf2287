//! The Casemate virtual machine monitor: one process, one microVM.
//!
//! Dependencies point one way:
//! `main → control → machine → {virtio, boot, snapshot} → {bus, event_loop, memory, mmds} → kvm`.
//! A device imports neither `kvm` nor a transport.

pub mod arguments;
pub mod boot;
pub mod bus;
pub mod config;
pub mod control;
pub mod cpu_template;
pub mod devices;
pub mod ending;
pub mod event_loop;
#[cfg(feature = "gdb")]
pub mod gdb;
pub mod kvm;
pub mod lockdown;
pub mod logging;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod mmds;
pub mod offline;
pub mod pci;
pub mod resources;
pub mod snapshot;
#[cfg(test)]
mod testing;
pub mod vcpu;
pub mod virtio;

use thiserror::Error;

/// Why nothing was started.
#[derive(Debug, Error)]
pub enum Error {
    /// The command line.
    #[error(transparent)]
    Arguments(#[from] arguments::Error),
    /// The jailer's table.
    #[error("--handover-fd: {0}")]
    Handover(#[from] casemate_broker::HandoverError),
    /// A file of a snapshot that was to be described, or both that were to be verified.
    #[error("{option} {paths}: {source}")]
    Look {
        /// What was asked for.
        option: &'static str,
        /// Where they are.
        paths: String,
        /// What is wrong.
        source: snapshot::describe::Error,
    },
    /// The memory files of snapshots that were to be merged.
    #[error("--merge-memory: {0}")]
    Merge(#[source] snapshot::memory::Error),
    /// What they became.
    #[error("--merge-memory: cannot sync {0}: {1}")]
    Sync(String, #[source] std::io::Error),
    /// The log's section of the config.
    #[error("logger.module: {0}")]
    Logger(#[from] logging::FilterError),
    /// The config, or what it names.
    #[error(transparent)]
    Resources(#[from] resources::Error),
    /// The log or the metrics.
    #[error(transparent)]
    Observe(#[from] control::observe::Error),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// The control thread's descriptors.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// A wall.
    #[error(transparent)]
    Lockdown(#[from] lockdown::Error),
}

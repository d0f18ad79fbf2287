//! Snapshots: what a paused machine is, in one file ([`format`]), and its memory in another ([`memory`]).
//! docs/snapshot-format.md has both in tables.
//!
//! Nothing here knows devices or KVM. Whoever saves a machine fills sections with what it has to say; whoever
//! restores one gets them back as they were, or an error that says what is wrong with the file.
//!
//! The checksums are against rot and truncation: disks, networks and programs that are killed. Whoever can
//! write a snapshot can also compute them; so what is in a section is checked by its reader as anything else
//! from outside.

pub mod describe;
pub mod format;
mod id;
pub mod memory;
mod merge;
pub mod stream;
mod trailer;
pub mod working_set;
pub mod writer;

pub use format::{Section, VERSION, Version};
pub use id::SnapshotId;

//! The jailer: builds a microVM's jail and execs the VMM in it.
//!
//! The jail is empty; every capability is a descriptor. What the machine needs is opened while this
//! process still may, and named in a sealed table ([`casemate_broker::Handover`]). Then the walls
//! go up in the order that [`plan`] fixes and gives the reasons for:
//!
//! Programs beside a VMM get jails by the same steps, with what [`helper`] adds.
//!
//! [`arguments`] → [`plan`] → [`execute`], which calls [`inherited`], [`grants`], [`cgroup`], [`tap`],
//! [`namespaces`], [`root`], [`credentials`], [`landlock`] and [`broker`]. System calls that need
//! `unsafe` are in [`sys`].

pub mod arguments;
pub mod broker;
pub mod cgroup;
pub mod credentials;
pub mod error;
pub mod execute;
pub mod grants;
pub mod growth;
pub mod helper;
pub mod inherited;
pub mod landlock;
pub mod namespaces;
pub mod plan;
pub mod root;
pub mod sys;
pub mod tap;

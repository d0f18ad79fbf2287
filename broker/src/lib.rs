//! What the jailer, the VMM and the broker agree on, and the broker itself.
//!
//! The VMM opens nothing once it is sealed. What it needs arrives in two ways:
//!
//! - **At start** as a [`Handover`]: a sealed table that names every descriptor the jailer left open.
//! - **Later** from the **broker**, a process of its own in a jail of its own, which the VMM asks
//!   by name over a `SOCK_SEQPACKET` socket pair ([`protocol`]) and which answers with a descriptor
//!   ([`Client`] asks, [`Server`] answers by a [`BrokerPolicy`] fixed at start). It also makes files
//!   ([`creation`]), which get their names when they are whole.
//!
//! Only [`fdpass`] is `unsafe`: it is where numbers become owned descriptors.

pub mod client;
pub mod creation;
pub mod exit;
pub mod fdpass;
pub mod handover;
pub mod machine_id;
pub mod policy;
pub mod protocol;
pub mod server;
pub mod unjailed;

pub use client::{Answer, Client, ClientError};
pub use creation::{CreateError, Creations, MAX_CREATIONS};
pub use handover::{Descriptor, Handover, HandoverError, HandoverTable, Kind};
pub use machine_id::{MachineId, MachineIdError};
pub use policy::{AllowedName, BrokerPolicy, ConnectTarget, PassedFile, PolicyError};
pub use protocol::{MAX_IN_FLIGHT, MAX_MESSAGE, Operation, Reply, Request};
pub use server::{Server, ServerError, ServerEvent};
pub use unjailed::{UnjailedError, spawn_unjailed, spawn_unjailed_for};

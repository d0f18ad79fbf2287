//! The metadata service: what the host tells this guest, over HTTP at a link-local address.
//!
//! Nothing of it leaves the VMM. Frames for the service's address that a guest sends on one of the
//! chosen network cards take a detour to a TCP/IP stack of the card's own ([`Stack`]), and the
//! stack's frames come back on its receive queue. The host's side changes the [`Store`] at any time.
//!
//! The rules are Firecracker's: `V1` answers everybody, `V2` asks for a session token, which only a
//! `PUT` that passed no proxy gets. Every answer has a time to live of one hop, so that a guest
//! that routes for others does not lend them its metadata.

mod connection;
mod http;
mod service;
mod stack;
mod store;
mod token;

pub use self::service::{Service, ServiceOptions, Version};
pub use self::stack::{PEEK, Stack};
pub use self::store::{Error as StoreError, Store};

use std::net::Ipv4Addr;

/// Where the service is unless the config says otherwise: where cloud guests look for it.
pub const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Most bytes of metadata as JSON, unless said otherwise.
pub const DEFAULT_LIMIT: usize = 51200;

/// Whether the service may live at `address`: link-local, and none of those that RFC 3927
/// (section 2.1) reserves.
pub fn is_address_allowed(address: Ipv4Addr) -> bool {
    address.is_link_local() && !matches!(address.octets()[2], 0 | 255)
}

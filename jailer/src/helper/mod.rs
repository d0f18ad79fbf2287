//! Jails for helpers: programs beside a VMM, such as the back-ends of vhost-user devices.
//!
//! A helper is somebody else's program and dynamically linked, so its root is not empty: it has the program,
//! the libraries that it is linked with, and what the operator names, each bound to where it is on the host.
//! What it may do beyond that is decided by a user namespace that gives the capabilities that were asked for,
//! over its own files alone: all other namespaces are the host's root's.

pub mod ld_cache;
pub mod program;
pub mod root;
pub mod users;

//! The linux tier: an unmodified distribution kernel, driven as a user would drive it.

mod cgroups;
mod clones;
mod debugger;
mod devices;
mod discard;
mod ending;
mod every_device;
mod guest;
mod hotplug;
mod huge_pages;
mod images;
mod machine;
mod memory;
mod migration;
mod mmds;
mod numa;
mod snapshot;
mod sockets;
mod streams;
mod vcpus;
mod vhost_user;
mod vmm;

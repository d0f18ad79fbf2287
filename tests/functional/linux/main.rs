//! The linux tier: an unmodified distribution kernel, driven as a user would drive it.

mod cgroups;
mod debugger;
mod devices;
mod discard;
mod ending;
mod every_device;
mod guest;
mod hotplug;
mod images;
mod machine;
mod memory;
mod numa;
mod streams;
mod vcpus;
mod vhost_user;
mod vmm;

//! How a driver finds, negotiates with and resets a device.

pub mod core;
pub mod endpoint;
pub mod mailbox;
pub mod mmio;
pub mod pci;
pub mod state;

#[cfg(test)]
mod order_tests;
#[cfg(test)]
pub(crate) mod registers;
#[cfg(test)]
pub(crate) mod testing;

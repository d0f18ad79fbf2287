//! PCI: segment 0, bus 0, up to 31 devices of one function each.
//!
//! | module | what |
//! |---|---|
//! | `config` | one function's configuration space |
//! | `bus` | which function answers an access to configuration space or to a BAR |
//! | `hotplug` | the registers by which a guest learns of devices that come and go |
//!
//! Guests reach configuration space by ECAM (PCI Express base specification 5.0, section 7.2.2), which
//! the MCFG table names; there are no ports 0xcf8 and 0xcfc.

pub mod bus;
pub mod config;
pub mod hotplug;

pub use bus::{PciBus, PciFunction, SLOTS};
pub use config::FunctionConfig;
pub use hotplug::HotplugRegisters;

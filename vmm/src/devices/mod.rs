//! The few devices that are not virtio: console, reset, power, vCPUs, and what tells a guest that it was cloned.

pub mod acpi;
pub mod boot_timer;
pub mod clock;
pub mod generation;
pub mod i8042;
mod keyboard;
pub mod serial;
pub mod vcpus;

pub use acpi::AcpiRegisters;
pub use clock::ClockPage;
pub use generation::Generation;
pub use i8042::I8042;
pub use serial::{SerialOptions, SerialPort};
pub use vcpus::VcpuRegisters;

use std::io;
use std::ops::Deref;

use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An interrupt line as `vm-superio` wants it: an eventfd that is bound as an irqfd.
pub struct Line(EventFd);

impl Line {
    /// A line that is bound to nothing yet.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?))
    }
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        match self.0.write(1) {
            // The counter is full, so an edge is on its way already.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

impl Deref for Line {
    type Target = EventFd;

    fn deref(&self) -> &EventFd {
        &self.0
    }
}

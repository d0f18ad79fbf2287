//! KVM: the only module that knows its ioctls.
//!
//! The order of set-up, which [`crate::machine`] follows (it saves milliseconds, and the interface
//! wants some of it): [`Vm::new`] first of all, every memslot, the interrupt controllers, vCPUs,
//! one table of interrupt routes, and ioeventfds last.
#![allow(unsafe_code)] // Memslots, unions of `kvm_run` and a signal handler have no safe form.

pub mod cpuid;
#[cfg(feature = "gdb")]
pub mod debug;
mod irq;
mod kick;
pub mod msr;
mod registers;
pub mod state;
mod vcpu;
mod vm;

use thiserror::Error;

pub use kick::{install_kick_handler, kick_signal};
pub use msr::MsrChange;
pub use state::{StateReader, VcpuState, VmState};
pub use vcpu::{Access, Exit, Vcpu};
pub use vm::{MsiPort, Vm};

/// Why KVM could not do something.
#[derive(Debug, Error)]
pub enum Error {
    /// An ioctl failed.
    #[error("KVM: cannot {action}: {source}")]
    Ioctl {
        /// What was being done.
        action: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel speaks another version of the interface.
    #[error("KVM: the kernel offers API version {0}, only 12 is known: is this /dev/kvm?")]
    ApiVersion(i32),
    /// The host runs fewer vCPUs in a machine.
    #[error("KVM: {wanted} vCPUs are configured, this host allows {allowed}: use fewer")]
    TooManyVcpus {
        /// How many are configured.
        wanted: u8,
        /// How many there can be.
        allowed: usize,
    },
    /// The memory does not fit the guest's physical address space.
    #[error(
        "KVM: the guest's memory ends at {end:#x}, this host's guests have {bits} address bits: use less memory"
    )]
    AddressSpace {
        /// First address beyond the memory.
        end: u64,
        /// Physical address bits.
        bits: u8,
    },
    /// The kernel cannot send message-signalled interrupts.
    #[error("KVM: this kernel sends no message-signalled interrupts: start without --enable-pci")]
    NoMsi,
    /// A register that KVM does not let us change.
    #[error(
        "KVM: model-specific register {index:#x} cannot be {action} on this host: remove it from `cpu-config`"
    )]
    Msr {
        /// Its number.
        index: u32,
        /// What was tried: "read" or "set to …".
        action: String,
    },
    /// A vCPU that was saved has a feature that this host's have not.
    #[error(
        "the snapshot's CPU has features that this host does not offer: CPUID leaf {leaf:#x}.{subleaf:#x} {register} bits {bits:#x}; restore it on a CPU that has them, or snapshot machines with a CPU template that hides them"
    )]
    MissingFeatures {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
        /// In which register.
        register: &'static str,
        /// Which bits.
        bits: u32,
    },
    /// A list for KVM is longer than it can be.
    #[error("KVM: too many entries in the {0} table")]
    TooManyEntries(&'static str),
}

/// Turns an error of the ioctl crate into ours; `action` completes "cannot …".
fn failed(action: &'static str) -> impl FnOnce(vmm_sys_util::errno::Error) -> Error {
    move |error| Error::Ioctl {
        action,
        source: error.into(),
    }
}

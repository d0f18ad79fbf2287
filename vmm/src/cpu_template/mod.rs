//! CPU templates: masks over what KVM offers, so that a guest sees the same CPU on hosts that differ.
//!
//! A template comes first; what must be true of our machine (topology, what no guest of ours has) is
//! settled after it, in [`crate::kvm::cpuid`], and a template cannot undo that.

mod named;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use log::warn;
use thiserror::Error;

use crate::config::{
    Config, CpuConfig, CpuTemplate, CpuidRegister, KvmCapability, NamedCpuTemplate,
};
use crate::kvm::{self, MsrChange, Vm};

/// Flags of a CPUID entry that exist (KVM API 4.20).
const KNOWN_FLAGS: u32 = 0b111;

/// Why a template cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// A subleaf that KVM does not offer.
    #[error(
        "cpu-config: this host's KVM offers no CPUID leaf {leaf:#x}, subleaf {subleaf:#x}: remove its modifiers"
    )]
    Leaf {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
    },
    /// Flags that mean nothing.
    #[error("cpu-config: CPUID leaf {leaf:#x} has `flags` {flags:#x}: use 0 to 7")]
    Flags {
        /// The leaf.
        leaf: u32,
        /// The flags.
        flags: u32,
    },
    /// The host's KVM lacks something.
    #[error("cpu-config: this host's KVM has no capability {0}, which `kvm_capabilities` wants")]
    Capability(u32),
    /// A named template for another vendor's CPUs.
    #[error(
        "machine-config.cpu_template {name:?} is for CPUs of {wanted:?}, and this host's says {found:?}"
    )]
    Vendor {
        /// The template.
        name: NamedCpuTemplate,
        /// The vendor that it is for, as CPUID names it.
        wanted: &'static str,
        /// What the host's CPUID says.
        found: String,
    },
    /// Both ways at once.
    #[error("`cpu-config` and `machine-config.cpu_template` are both given: use one of them")]
    Both,
    /// A path that nobody has read.
    #[error("cpu-config {0:?} is a path: give the template itself")]
    Path(String),
    /// KVM refuses.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
}

/// The template of a machine.
#[derive(Debug, Default)]
pub struct Template {
    masks: CpuTemplate,
    /// Whether a leaf that is not there is passed over: there is nothing to hide then.
    lenient: bool,
}

impl Template {
    /// The template that `config` asks for; one that changes nothing if it asks for none.
    ///
    /// # Errors
    /// When it asks for two, for one that is for other CPUs, or for a capability that KVM lacks.
    pub fn of(config: &Config, vm: &Vm, supported: &CpuId) -> Result<Self, Error> {
        let name = config.machine_config.cpu_template;
        let name = name.filter(|name| *name != NamedCpuTemplate::None);
        let template = match (&config.cpu_config, name) {
            (None, None) => Self::default(),
            (Some(_), Some(_)) => return Err(Error::Both),
            (Some(CpuConfig::Path(path)), None) => return Err(Error::Path(path.clone())),
            (Some(CpuConfig::Template(masks)), None) => Self {
                masks: masks.clone(),
                lenient: false,
            },
            (None, Some(name)) => Self::named(name, supported)?,
        };
        for capability in &template.masks.kvm_capabilities {
            // Of those that this VMM needs itself, none can be done without.
            if let KvmCapability::Add(number) = capability
                && !vm.has_capability(*number)
            {
                return Err(Error::Capability(*number));
            }
        }
        Ok(template)
    }

    fn named(name: NamedCpuTemplate, supported: &CpuId) -> Result<Self, Error> {
        let found = vendor(supported);
        let wanted = named::vendor(name);
        if found != wanted {
            return Err(Error::Vendor {
                name,
                wanted,
                found,
            });
        }
        Ok(Self {
            masks: named::masks(name),
            lenient: true,
        })
    }

    /// What KVM offers, under the template.
    ///
    /// # Errors
    /// When the template names a subleaf that KVM does not offer.
    pub fn apply(&self, supported: &CpuId) -> Result<CpuId, Error> {
        let mut cpuid = supported.clone();
        for modifier in &self.masks.cpuid_modifiers {
            let (leaf, subleaf) = (modifier.leaf, modifier.subleaf);
            if modifier.flags & !KNOWN_FLAGS != 0 {
                let flags = modifier.flags;
                return Err(Error::Flags { leaf, flags });
            }
            let mut entries = cpuid.as_mut_slice().iter_mut();
            let entry = entries.find(|e| (e.function, e.index) == (leaf, subleaf));
            let Some(entry) = entry else {
                if self.lenient {
                    continue;
                }
                return Err(Error::Leaf { leaf, subleaf });
            };
            for change in &modifier.modifiers {
                let register = register(entry, change.register);
                // A bitmap of 32 bits leaves the others as they are: zero.
                *register = change.bitmap.apply((*register).into()) as u32;
            }
        }
        Ok(cpuid)
    }

    /// Its changes to model-specific registers.
    pub fn msr_changes(&self) -> Vec<MsrChange> {
        let modifiers = self.masks.msr_modifiers.iter();
        modifiers
            .map(|modifier| MsrChange {
                index: modifier.addr,
                mask: modifier.bitmap.filter,
                value: modifier.bitmap.value,
            })
            .collect()
    }

    /// Says in the log what a template may leave unprotected, where that is known.
    pub fn warn(&self) {
        let hides_microcode = self.masks.msr_modifiers.iter().any(|m| m.addr == 0x10a);
        if hides_microcode {
            warn!(
                "the CPU template changes IA32_ARCH_CAPABILITIES: a guest chooses its mitigations by it"
            );
        }
    }
}

fn register(entry: &mut kvm_cpuid_entry2, register: CpuidRegister) -> &mut u32 {
    match register {
        CpuidRegister::Eax => &mut entry.eax,
        CpuidRegister::Ebx => &mut entry.ebx,
        CpuidRegister::Ecx => &mut entry.ecx,
        CpuidRegister::Edx => &mut entry.edx,
    }
}

/// The vendor's name as leaf 0 spells it.
fn vendor(cpuid: &CpuId) -> String {
    let leaf = cpuid.as_slice().iter().find(|entry| entry.function == 0);
    let bytes = leaf.map(|entry| [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes));
    let bytes = bytes.unwrap_or_default().concat();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

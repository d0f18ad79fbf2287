//! `machine-config`: CPUs and memory.

use serde::{Deserialize, Serialize};

use super::numa::{self, NumaNode};
use super::{Error, range};

/// Most vCPUs of a machine.
pub const MAX_VCPUS: u8 = 32;
/// Largest memory in MiB (16 TiB): far beyond any host, small enough to count bytes in 64 bits.
pub const MAX_MEMORY_MIB: u64 = 16 << 20;

/// CPUs and memory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpu_count: u8,
    /// How many vCPUs there can be while the machine runs, `vcpu_count` to [`MAX_VCPUS`]. Without it their
    /// number is fixed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpu_count: Option<u8>,
    /// The guest's NUMA nodes; none where all is equally near.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub numa_nodes: Vec<NumaNode>,
    /// Memory in MiB, 1 to [`MAX_MEMORY_MIB`].
    pub mem_size_mib: u64,
    /// Whether two vCPUs share a core, as the guest sees it.
    #[serde(default)]
    pub smt: bool,
    /// A named CPU template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<NamedCpuTemplate>,
    /// Whether KVM notes which pages the guest writes.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// What pages the memory is made of.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Whether there is an i8254 timer (for guests that cannot do without).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pit: bool,
    /// Where gdb connects; only in a VMM that is built with the feature `gdb`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gdb_socket_path: Option<String>,
}

/// What pages the guest's memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum HugePages {
    /// Ordinary ones.
    #[default]
    None,
    /// Huge ones where the kernel has some.
    Transparent,
    /// 2 MiB each, from the host's pool.
    #[serde(rename = "2M")]
    TwoMegabytes,
}

/// The CPU templates that have names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[allow(missing_docs, reason = "the names say all there is to say")]
pub enum NamedCpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    /// No template.
    None,
}

impl Default for MachineConfig {
    /// Firecracker's: one vCPU and 128 MiB.
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            max_vcpu_count: None,
            numa_nodes: Vec::new(),
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            pit: false,
            gdb_socket_path: None,
        }
    }
}

impl MachineConfig {
    /// How many vCPUs there can be.
    pub fn max_vcpus(&self) -> u8 {
        self.max_vcpu_count.unwrap_or(self.vcpu_count)
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        if let Some(path) = &self.gdb_socket_path
            && !cfg!(feature = "gdb")
        {
            return range(
                "machine-config.gdb_socket_path",
                path,
                "leave it out: this VMM has no debugger's stub (`cargo build --features gdb` makes one that has)",
            );
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpu_count) {
            return range("machine-config.vcpu_count", self.vcpu_count, "use 1 to 32");
        }
        if self.smt && self.vcpu_count > 1 && !self.vcpu_count.is_multiple_of(2) {
            return range(
                "machine-config.vcpu_count",
                self.vcpu_count,
                "with `smt`, use 1 or an even number",
            );
        }
        if let Some(most) = self.max_vcpu_count
            && !(self.vcpu_count..=MAX_VCPUS).contains(&most)
        {
            return range(
                "machine-config.max_vcpu_count",
                most,
                "use `vcpu_count` to 32",
            );
        }
        if !(1..=MAX_MEMORY_MIB).contains(&self.mem_size_mib) {
            return range(
                "machine-config.mem_size_mib",
                self.mem_size_mib,
                "use 1 or more (MiB), at most 16777216",
            );
        }
        if self.huge_pages != HugePages::None && !self.mem_size_mib.is_multiple_of(2) {
            return range(
                "machine-config.mem_size_mib",
                self.mem_size_mib,
                "with `huge_pages`, use an even number",
            );
        }
        numa::check(&self.numa_nodes, self.max_vcpus(), self.mem_size_mib)
    }
}

//! `memory-hotplug`: memory that comes and goes while the guest runs.

use serde::{Deserialize, Serialize};

use super::{Error, range};
use crate::memory::hotplug::MAX_BLOCKS;

/// Smallest block, and the default, in MiB.
const MIN_BLOCK: u32 = 2;
/// Smallest slot, and the default, in MiB.
const MIN_SLOT: u32 = 128;

/// The memory device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplug {
    /// How much there can be, in MiB: a multiple of `slot_size_mib`.
    pub total_size_mib: u32,
    /// What comes or goes at once, in MiB: a power of two.
    #[serde(default = "min_block")]
    pub block_size_mib: u32,
    /// In MiB, a multiple of `block_size_mib`. It has no further effect: every block is protected by
    /// itself.
    #[serde(default = "min_slot")]
    pub slot_size_mib: u32,
    /// How much of it the guest shall have as soon as it can, in MiB: a multiple of `block_size_mib`.
    /// Ours.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub requested_size_mib: u32,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_zero(size: &u32) -> bool {
    *size == 0
}

fn min_block() -> u32 {
    MIN_BLOCK
}

fn min_slot() -> u32 {
    MIN_SLOT
}

impl MemoryHotplug {
    pub(super) fn check(&self) -> Result<(), Error> {
        let (block, slot, total) = (self.block_size_mib, self.slot_size_mib, self.total_size_mib);
        if block < MIN_BLOCK || !block.is_power_of_two() {
            return range(
                "memory-hotplug.block_size_mib",
                block,
                "use a power of two, 2 or more",
            );
        }
        if slot < MIN_SLOT || !slot.is_multiple_of(block) {
            return range(
                "memory-hotplug.slot_size_mib",
                slot,
                "use a multiple of `block_size_mib`, 128 or more",
            );
        }
        if total < slot || !total.is_multiple_of(slot) {
            return range(
                "memory-hotplug.total_size_mib",
                total,
                "use a multiple of `slot_size_mib`, not 0",
            );
        }
        if u64::from(total / block) > MAX_BLOCKS {
            return range(
                "memory-hotplug.block_size_mib",
                block,
                "use larger blocks: `total_size_mib` may have 32768 of them",
            );
        }
        let requested = self.requested_size_mib;
        if requested > total || !requested.is_multiple_of(block) {
            return range(
                "memory-hotplug.requested_size_mib",
                requested,
                "use a multiple of `block_size_mib`, at most `total_size_mib`",
            );
        }
        Ok(())
    }
}

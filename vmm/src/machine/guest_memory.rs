//! The machine's memory, and the device that adds to it.

use std::sync::Arc;

use super::Error;
use crate::config::Config;
use crate::memory::{self, GuestMemory};
use crate::virtio::{Mem, MemOptions, VirtioDevice};

/// What the guest has from its start, and room for what comes later.
pub(super) fn allocate(config: &Config, options: memory::Options) -> Result<GuestMemory, Error> {
    let memory = memory::allocate_with(config.memory_size(), options)?;
    Ok(match &config.memory_hotplug {
        Some(hotplug) => {
            let [total, block] =
                [hotplug.total_size_mib, hotplug.block_size_mib].map(|mib| u64::from(mib) << 20);
            memory::add_hotplug(&memory, total, block)?
        }
        None => memory,
    })
}

/// The memory device, if there is one.
pub(super) fn device(
    config: &Config,
    memory: &GuestMemory,
) -> Result<Option<Box<dyn VirtioDevice>>, Error> {
    let (Some(hotplug), Some(region)) = (&config.memory_hotplug, memory.hotplug()) else {
        return Ok(None);
    };
    let device = Mem::new(MemOptions {
        region: Arc::clone(region),
        requested_size_mib: hotplug.requested_size_mib,
    })?;
    Ok(Some(Box::new(device)))
}

//! Persistent memory in the guest's address space.

use std::fs::File;
use std::sync::Arc;

use vm_memory::{Address as _, GuestMemoryBackend as _};

use super::{Error, limits};
use crate::config;
use crate::kvm::{self, Vm};
use crate::memory::{GuestMemory, layout};
use crate::virtio::pmem::PmemFile;
use crate::virtio::{Pmem, PmemOptions};

/// Maps the files of `configured`, each above the one before, and all above `memory`, for a guest with
/// `bits` physical address bits. To be called before anything sits on KVM's buses.
///
/// # Errors
/// When a file cannot be used, or the guest would not reach it.
pub(super) fn add(
    configured: &[config::Pmem],
    files: Vec<File>,
    vm: &mut Vm,
    memory: &GuestMemory,
    bits: u8,
) -> Result<Vec<Pmem>, Error> {
    let mut mapped = Vec::with_capacity(files.len());
    for (configured, file) in configured.iter().zip(files) {
        mapped.push(Pmem::map(PmemOptions {
            id: configured.id.clone(),
            file,
            read_only: configured.read_only,
            limits: limits(configured.rate_limiter),
        })?);
    }
    let sizes = mapped.iter().map(|(_, mapping)| mapping.size());
    let end = u64::MAX;
    let end_of_ram = memory.last_addr().raw_value().saturating_add(1);
    let places = layout::device_memory(end_of_ram, sizes)
        .ok_or(Error::Kvm(kvm::Error::AddressSpace { end, bits }))?;
    let mut devices = Vec::with_capacity(mapped.len());
    for ((unplaced, mapping), place) in mapped.into_iter().zip(places) {
        vm.map_file(mapping, place, bits)?;
        devices.push(unplaced.at(place));
    }
    Ok(devices)
}

/// Maps a file that has been taken into the address space of a running guest, at the lowest free place above `memory`.
///
/// # Errors
/// When it cannot be mapped, or the guest would not reach it; nothing of it is mapped then.
pub(super) fn add_later(
    configured: &config::Pmem,
    file: &Arc<PmemFile>,
    vm: &mut Vm,
    memory: &GuestMemory,
    bits: u8,
) -> Result<Pmem, Error> {
    let limits = limits(configured.rate_limiter);
    let (unplaced, mapping) = Pmem::map_taken(file, configured.read_only, limits)?;
    let end_of_ram = memory.last_addr().raw_value().saturating_add(1);
    let place = layout::free_device_memory(end_of_ram, vm.mapped_files(), mapping.size());
    let end = u64::MAX;
    let place = place.ok_or(Error::Kvm(kvm::Error::AddressSpace { end, bits }))?;
    vm.map_file(mapping, place, bits)?;
    Ok(unplaced.at(place))
}

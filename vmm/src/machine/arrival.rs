//! A machine that comes from another VMM ([`moving`](super::moving)), until it is built: its memory, and then its state.

use std::fs::File;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::error::host;
use super::moving::Offer;
use super::restoring::Error as RestoreError;
use super::state::{self, Saved};
use super::{Error, cpuid, memory_options, placement};
use crate::cpu_template::Template;
use crate::kvm::Vm;
use crate::kvm::cpuid::check_features;
use crate::memory::{self, GuestMemory, dirty};
use crate::snapshot::format::{self, MAX_STATE};
use crate::snapshot::memory::PAGE;
use crate::snapshot::stream::whole_pages;

/// Most pages that become zero by one frame.
const MOST_ZEROES: u64 = 64;

/// What has come of it.
pub struct Arrival {
    memory: GuestMemory,
    state: Vec<u8>,
}

impl Arrival {
    /// Makes room for a machine, if it can run here; `kvm` is for asking.
    ///
    /// # Errors
    /// When its CPU had what this one has not, its memory makes no sense, or there is no room.
    pub fn new(offer: &Offer, kvm: &File) -> Result<Self, Error> {
        let config = &offer.config;
        let kvm = kvm.try_clone().map_err(host("share KVM's descriptor"))?;
        let vm = Vm::new(kvm)?;
        let supported = vm.supported_cpuid()?;
        let template = Template::of(config, &vm, &supported)?;
        let here = cpuid(config, &vm, &template, &supported)?;
        check_features(&offer.cpuid, &here.of_vcpu(0)?)?;
        if offer.memory != memory::ram_regions(config.memory_size()) {
            return Err(RestoreError::Nonsense("pieces of memory").into());
        }
        let options = memory_options(config, None);
        let memory = memory::allocate_regions(&offer.memory, options)?;
        placement::bind_memory(&memory, &config.machine_config)?;
        Ok(Self {
            memory,
            state: Vec::new(),
        })
    }

    /// Takes pages, the first of which has this number, as in a memory file.
    ///
    /// # Errors
    /// When there are no such pages.
    pub fn pages(&self, first: u64, bytes: &[u8]) -> Result<(), Error> {
        let count = whole_pages(bytes.len()).ok_or(RestoreError::Nonsense("pages"))?;
        let address = self.address(first, count)?;
        self.write(bytes, address)
    }

    /// Takes note that so many pages, 64 at most, have become zero.
    ///
    /// # Errors
    /// When there are no such pages.
    pub fn zeroes(&self, first: u64, count: u64) -> Result<(), Error> {
        if count > MOST_ZEROES {
            return Err(RestoreError::Nonsense("pages").into());
        }
        let address = self.address(first, count)?;
        let mut at = address.0;
        let end = at.saturating_add(count.saturating_mul(PAGE));
        while at < end {
            self.write(&[0; PAGE as usize], GuestAddress(at))?;
            at = at.saturating_add(PAGE);
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], address: GuestAddress) -> Result<(), Error> {
        let written = self.memory.write_slice(bytes, address);
        written.map_err(|_| RestoreError::Nonsense("pages").into())
    }

    /// Where pages are, which have to be of one region.
    fn address(&self, first: u64, count: u64) -> Result<GuestAddress, Error> {
        let mut before = 0_u64;
        for region in self.memory.iter() {
            let pages = region.len() / PAGE;
            if let Some(number) = first.checked_sub(before)
                && number < pages
            {
                if count > pages.saturating_sub(number) {
                    break;
                }
                let offset = number.saturating_mul(PAGE);
                return Ok(GuestAddress(region.start_addr().0.saturating_add(offset)));
            }
            before = before.saturating_add(pages);
        }
        Err(RestoreError::Nonsense("pages").into())
    }

    /// Takes bytes of its state, behind those that have come.
    ///
    /// # Errors
    /// When they are elsewhere, or too many.
    pub fn state(&mut self, place: u64, bytes: &[u8]) -> Result<(), Error> {
        let has = self.state.len() as u64;
        let end = place.saturating_add(bytes.len() as u64);
        if place != has || end > MAX_STATE {
            return Err(RestoreError::Nonsense("bytes of its state").into());
        }
        self.state.extend_from_slice(bytes);
        Ok(())
    }

    /// All of it has come.
    ///
    /// # Errors
    /// When its state is none.
    pub fn complete(self) -> Result<(Saved, GuestMemory), state::Error> {
        let (id, sections) = format::decode(&self.state)?;
        let saved = state::parse(id, &sections)?;
        // What came is no change.
        dirty::take_all(&self.memory);
        Ok((saved, self.memory))
    }
}

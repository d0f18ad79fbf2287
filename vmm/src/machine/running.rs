//! A machine with its threads, as the control thread has it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::Error;
use super::devices::Devices;
use super::hotplug::Hotplug;
use super::moving::Way;
use super::network::Metadata;
use super::page_handler::PageHandler;
use super::panel::Panel;
use super::saving::Saver;
use super::vcpus::{self, Vcpus};
use crate::kvm::Vm;
use crate::memory::GuestMemory;
use crate::snapshot::working_set::Run;
use crate::virtio::transport::mmio::MmioTransport;
use crate::virtio::worker::Held;

/// A machine with its threads, sealed and paused.
pub struct RunningMachine {
    /// What the control thread has in its hands.
    pub panel: Panel,
    /// Adds and removes devices, on a PCI bus.
    pub hotplug: Option<Hotplug>,
    /// The virtio devices by their names.
    pub devices: Devices,
    /// What cards that come may lead to.
    pub(super) metadata: Metadata,
    pub(super) vcpus: Vcpus,
    /// How far the guest's physical addresses reach.
    pub(super) address_bits: u8,
    /// Where the memory of each pmem device is.
    pub(super) pmem_places: BTreeMap<String, u64>,
    /// The transports on MMIO, by their devices' index.
    pub(super) windows: Vec<Arc<MmioTransport>>,
    /// What saves it, if it can be saved.
    pub(super) saver: Option<Saver>,
    /// The devices of a machine that has come from another VMM, until it runs.
    pub(super) resting: Option<Held>,
    /// How far its way to another VMM is, if it can go.
    pub(super) way: Option<Arc<Way>>,
    /// Its memory.
    pub(super) memory: GuestMemory,
    /// Pages to bring once the guest runs.
    pub(super) working_set: Option<Vec<Run>>,
    /// Who brings the memory, if it comes page by page.
    pub(super) _page_handler: Option<PageHandler>,
    /// The memslots stay valid as long as this does.
    pub(super) vm: Vm,
}

impl RunningMachine {
    /// Lets the guest run.
    pub fn resume(&mut self) {
        self.resting = None;
        self.vcpus.resume();
        // Not before: the guest's first instruction waits for none of it.
        if let (Some(saver), Some(runs)) = (&self.saver, self.working_set.take()) {
            saver.warm(runs);
        }
    }

    /// Stops the guest: each vCPU at its next instruction, without waiting for that.
    pub fn pause(&mut self) {
        self.vcpus.pause();
    }

    /// Waits until the guest has stopped after [`RunningMachine::pause`]; else the number of a vCPU that has
    /// not by then.
    ///
    /// # Errors
    /// That number.
    pub fn wait_until_paused(&self, patience: Duration) -> Result<(), usize> {
        self.vcpus.wait_until_paused(patience)
    }

    /// Adds vCPUs, or asks the guest to let go of some, until there are `count`.
    ///
    /// # Errors
    /// When their number is fixed, or cannot be that.
    pub fn set_vcpus(&mut self, count: u8) -> Result<(), vcpus::Error> {
        self.vcpus.set_count(count)
    }

    /// Stops the vCPUs that the guest has let go.
    pub fn park_ejected_vcpus(&mut self) {
        if let Some(registers) = &self.panel.vcpus {
            // First forgotten, then looked at: what comes later wakes us again.
            let _ = registers.ejected().read();
        }
        self.vcpus.settle();
    }

    /// Tells the guest that its time has jumped, and, if it `is_another`, that it is another machine than before: after a
    /// restore, before it runs on.
    ///
    /// # Errors
    /// When there are no random bytes.
    pub fn regenerate(&self, is_another: bool) -> Result<(), Error> {
        if is_another {
            self.panel.generation.regenerate()?;
        }
        Ok(self.panel.clock.disrupt(is_another)?)
    }

    /// How many vCPUs there are now.
    pub fn vcpu_count(&self) -> u8 {
        u8::try_from(self.vcpus.present().count_ones()).unwrap_or(u8::MAX)
    }
}

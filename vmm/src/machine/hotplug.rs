//! Devices that come and go while the guest runs, on the PCI bus.
//!
//! A sealed process makes no eventfd and binds no doorbell. So every slot has its own from the start, bound
//! where the slot's BAR starts out, for whatever is plugged in there; and interrupts need nothing set up.

use std::sync::Arc;

use thiserror::Error;

use super::devices::DeviceName;
use crate::event_loop;
use crate::memory::GuestMemory;
use crate::metrics::Source;
use crate::pci::HotplugRegisters;
use crate::virtio::transport::endpoint::Doorbells;
use crate::virtio::transport::pci::PciTransport;
use crate::virtio::transport::pci::msix::MsiSender;
use crate::virtio::{VirtioDevice, WorkerHandle};

/// Doorbells of a slot that is empty at the start: what is plugged in has at most so many queues.
pub const QUEUES: usize = 4;

/// Why a device did not come or go.
#[derive(Debug, Error)]
pub enum Error {
    /// The name is taken, perhaps by a device that the guest has not let go yet.
    #[error("there is a {0} already: give the new one another name, or remove that one first")]
    Exists(DeviceName),
    /// There is none of that name.
    #[error("there is no {0}")]
    NoDevice(DeviceName),
    /// The machine has no PCI bus.
    #[error("devices come and go on a PCI bus only: start the VMM with `--enable-pci`")]
    NoBus,
    /// Something that a device can have only if it is there from the start.
    #[error("{device} cannot be added to a running machine: {why}")]
    OnlyBefore {
        /// Which one.
        device: DeviceName,
        /// What is in the way, and what to do.
        why: &'static str,
    },
    /// What the guest runs on.
    #[error("{0} is the root device: it cannot be removed")]
    Root(DeviceName),
    /// It cannot be made.
    #[error(transparent)]
    Device(Box<super::Error>),
    /// Every slot is taken.
    #[error("no PCI slot is free: remove a device first")]
    NoSlot,
    /// It has too many queues for the slots that are free.
    #[error("the device has {wanted} queues, a free PCI slot has room for {most}: use fewer")]
    TooManyQueues {
        /// How many it has.
        wanted: usize,
        /// How many there can be.
        most: usize,
    },
    /// The device thread does not take it.
    #[error(transparent)]
    Events(#[from] event_loop::Error),
    /// The device thread has ended.
    #[error("the device thread has ended")]
    NoThread,
}

/// A place on the bus, and the doorbells of whatever is in it.
pub(super) struct Slot {
    pub(super) number: usize,
    pub(super) doorbells: Arc<Doorbells>,
    pub(super) occupant: Option<Occupant>,
}

impl Slot {
    /// Most queues of what can be in it.
    fn room(&self) -> usize {
        self.doorbells.notifiers().len()
    }
}

/// The device in a slot.
pub(super) struct Occupant {
    /// What the operator calls it.
    pub(super) name: DeviceName,
    /// Its index on the device thread.
    pub(super) index: u16,
    /// How the guest reaches it.
    pub(super) transport: Arc<PciTransport>,
}

/// The slots of the bus, as the control thread has them.
pub struct Hotplug {
    pub(super) registers: Arc<HotplugRegisters>,
    pub(super) memory: GuestMemory,
    pub(super) sender: Arc<dyn MsiSender>,
    pub(super) worker: WorkerHandle,
    pub(super) slots: Vec<Slot>,
}

impl Hotplug {
    /// The registers by which the guest learns of it; their eventfd says when to call [`Hotplug::settle`].
    pub fn registers(&self) -> &HotplugRegisters {
        &self.registers
    }

    /// Whether a device could come as `name`, whatever it is. Returns how many queues it can have.
    ///
    /// # Errors
    /// When the name is taken or no slot is free.
    pub fn room(&self, name: &DeviceName) -> Result<usize, Error> {
        if self.find(name).is_some() {
            return Err(Error::Exists(name.clone()));
        }
        let free = self.slots.iter().filter(|slot| slot.occupant.is_none());
        free.map(Slot::room).max().ok_or(Error::NoSlot)
    }

    /// Has `make` make a device on the device thread, plugs it in as `name`, and tells the guest. Returns its index
    /// on the device thread, and what it counts.
    ///
    /// # Errors
    /// When there is no room, the name is taken, or there is no such device; all is as before then.
    pub fn add(
        &mut self,
        name: &DeviceName,
        make: impl FnOnce() -> Result<Box<dyn VirtioDevice>, super::Error> + Send + 'static,
    ) -> Result<(u16, Option<Source>), Error> {
        let most = self.room(name)?;
        let made = self.worker.run(move || {
            let mut device = make().map_err(|error| Error::Device(Box::new(error)))?;
            let wanted = device.traits().queue_sizes.len();
            if wanted > most {
                device.retire();
                return Err(Error::TooManyQueues { wanted, most });
            }
            Ok(device)
        });
        let device = made.ok_or(Error::NoThread)??;
        let counts = device.metrics();
        Ok((self.plug(name, device)?, counts))
    }

    fn plug(&mut self, name: &DeviceName, device: Box<dyn VirtioDevice>) -> Result<u16, Error> {
        let wanted = device.traits().queue_sizes.len();
        // The lowest: a guest that gives its BARs the lowest free addresses, as Linux does, then gives this one
        // the address that its doorbells are bound at.
        let mut slots = self.slots.iter_mut();
        let slot = slots.find(|slot| slot.occupant.is_none() && slot.room() >= wanted);
        let slot = slot.ok_or(Error::NoSlot)?;
        let transport = PciTransport::new(
            device.as_ref(),
            self.memory.clone(),
            slot.number,
            Arc::clone(&slot.doorbells),
            Arc::clone(&self.sender),
        );
        // First the device thread: a guest that sees the device may use it at once.
        let added = self.worker.add(Arc::clone(transport.endpoint()), device);
        let index = added.ok_or(Error::NoThread)??;
        slot.occupant = Some(Occupant {
            name: name.clone(),
            index,
            transport: Arc::clone(&transport),
        });
        self.registers.insert(slot.number, transport);
        Ok(index)
    }

    /// Asks the guest to let go the device called `name`. It is there until the guest does.
    ///
    /// # Errors
    /// When there is none.
    pub fn remove(&self, name: &DeviceName) -> Result<(), Error> {
        let slot = self.find(name);
        let slot = slot.ok_or_else(|| Error::NoDevice(name.clone()))?;
        self.registers.ask(slot.number);
        Ok(())
    }

    /// Takes away what the guest has let go, and returns the names. Files, taps and sockets of these devices
    /// are closed.
    pub fn settle(&mut self) -> Vec<DeviceName> {
        let gone = self.registers.take_gone();
        let slots = self.slots.iter_mut();
        let occupants = slots
            .filter(|slot| gone.contains(&slot.number))
            .filter_map(|slot| slot.occupant.take());
        occupants
            .map(|occupant| {
                drop(self.worker.remove(occupant.index));
                occupant.name
            })
            .collect()
    }

    fn find(&self, name: &DeviceName) -> Option<&Slot> {
        let named = |slot: &&Slot| slot.occupant.as_ref().is_some_and(|it| it.name == *name);
        self.slots.iter().find(named)
    }
}

#[cfg(test)]
#[path = "hotplug_tests.rs"]
mod tests;

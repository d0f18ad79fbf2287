//! Devices that come and go while the guest runs, on the PCI bus.
//!
//! A sealed process makes no eventfd and binds no doorbell. So every slot has its own from the start, bound
//! where the slot's BAR starts out, for whatever is plugged in there; and interrupts need nothing set up.

use std::sync::Arc;

use thiserror::Error;

use crate::config::Config;
use crate::event_loop;
use crate::memory::GuestMemory;
use crate::pci::{HotplugRegisters, PciBus};
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
    #[error("there is a {0} already")]
    Exists(String),
    /// There is none of that name.
    #[error("there is no {0}")]
    NoDevice(String),
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

/// The device in a slot.
pub(super) struct Occupant {
    /// What the operator calls it, such as "drive data".
    pub(super) name: String,
    /// Its index on the device thread.
    pub(super) index: u16,
}

/// The slots of the bus, as the control thread has them.
pub struct Hotplug {
    pub(super) bus: Arc<PciBus>,
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

    /// Plugs `device` in, as `name`, and tells the guest. Returns its index on the device thread.
    ///
    /// # Errors
    /// When there is no room or the name is taken; the device is dropped then.
    pub fn add(&mut self, name: &str, device: Box<dyn VirtioDevice>) -> Result<u16, Error> {
        if self.find(name).is_some() {
            return Err(Error::Exists(name.to_owned()));
        }
        let wanted = device.traits().queue_sizes.len();
        let free = |slot: &&mut Slot| slot.occupant.is_none();
        let room = |slot: &Slot| slot.doorbells.notifiers().len();
        // The lowest: a guest that gives its BARs the lowest free addresses, as Linux does, then gives this one
        // the address that its doorbells are bound at.
        let mut slots = self.slots.iter_mut().filter(free).peekable();
        if slots.peek().is_none() {
            return Err(Error::NoSlot);
        }
        let mut most = 0;
        let slot = slots.find(|slot| {
            most = most.max(room(slot));
            room(slot) >= wanted
        });
        let slot = slot.ok_or(Error::TooManyQueues { wanted, most })?;
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
            name: name.to_owned(),
            index,
        });
        self.bus.insert(slot.number, transport);
        self.registers.announce(slot.number);
        Ok(index)
    }

    /// Asks the guest to let go the device called `name`. It is there until the guest does.
    ///
    /// # Errors
    /// When there is none.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let slot = self.find(name);
        let slot = slot.ok_or_else(|| Error::NoDevice(name.to_owned()))?;
        self.registers.ask(slot.number);
        Ok(())
    }

    /// Takes away what the guest has let go, and returns the names. Files, taps and sockets of these devices
    /// are closed.
    pub fn settle(&mut self) -> Vec<String> {
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

    fn find(&self, name: &str) -> Option<&Slot> {
        let named = |slot: &&Slot| slot.occupant.as_ref().is_some_and(|it| it.name == name);
        self.slots.iter().find(named)
    }
}

/// What the operator calls the devices of `config`, in the order in which they are made. Only drives and cards
/// have names of their own.
pub(super) fn names(config: &Config) -> impl Iterator<Item = String> {
    let drives = config.drives_in_order();
    let drives = drives.map(|drive| format!("drive {}", drive.drive_id));
    let cards = config.network_interfaces.iter();
    let cards = cards.map(|card| format!("network interface {}", card.iface_id));
    drives
        .chain(cards)
        .chain((0_usize..).map(|number| format!("device {number}")))
}

#[cfg(test)]
#[path = "hotplug_tests.rs"]
mod tests;

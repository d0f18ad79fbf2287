//! Lets a machine go to another VMM ([`moving`](super::moving)): the control thread's part.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::RunningMachine;
use super::devices::DeviceName;
use super::moving::{Limits, Offer, Way};
use super::saving::{Error, HeldMachine, Order, Stranded};
use super::sending::{Departure, Word};
use crate::config::Config;
use crate::memory::dirty;
use crate::snapshot::memory::{Written, regions};
use crate::virtio::worker::Held;

impl RunningMachine {
    /// How far the machine's way to another VMM is, where it can go.
    pub fn way(&self) -> Option<&Arc<Way>> {
        self.way.as_ref()
    }

    /// Whether the machine can go.
    ///
    /// # Errors
    /// When it has something that cannot.
    pub fn may_depart(&self, config: &Config) -> Result<(), Error> {
        if let Some(pmem) = config.pmem.first() {
            return Err(Error::Stays {
                device: DeviceName::Pmem(pmem.id.clone()),
                why: "what the guest wrote to its file may be anywhere between here and the disk",
            });
        }
        drop(self.rest()?);
        let written = config.drives.iter().find(|drive| !drive.is_read_only);
        if let Some(drive) = written {
            return Err(Error::Stays {
                device: DeviceName::Drive(drive.drive_id.clone()),
                why: "it is written to, and who moves has neither its lock nor what is not on the disk yet",
            });
        }
        Ok(())
    }

    /// Has the devices rest for a moment, while vCPUs run: nothing that those might hold is waited for.
    fn rest(&self) -> Result<Option<Held>, Error> {
        let held = self.devices.hold();
        let (saved, held) = held.map_err(|()| Error::NoThread("device"))?;
        for saved in saved {
            if let (Some(why), Some(device)) = (saved.obstacle, self.devices.name(saved.index)) {
                let device = device.clone();
                return Err(Error::Obstacle { device, why });
            }
        }
        Ok(held)
    }

    /// Begins to send the machine, which runs on, over `socket`.
    ///
    /// # Errors
    /// When it cannot go, or the host does not keep what is written. It is as before.
    pub fn depart(&self, config: &Config, limits: Limits, socket: UnixStream) -> Result<(), Error> {
        let (saver, way) = (self.saver.as_ref(), self.way.as_ref());
        let (Some(saver), Some(way)) = (saver, way) else {
            return Err(Error::NoSaver);
        };
        // Nothing is under way that was not marked.
        let held = self.rest()?;
        for region in self.memory.iter() {
            dirty::of(region).start(usize::try_from(region.len()).unwrap_or(usize::MAX));
        }
        if let Err(error) = self.vm.log_writes(true) {
            self.stay(config);
            return Err(Error::Log(error));
        }
        let written = dirty::take_all(&self.memory);
        drop(held);
        way.begin();
        saver.tell(Order::Send(Box::new(Departure {
            socket,
            offer: Offer {
                config: config.clone(),
                enable_pci: self.hotplug.is_some(),
                memory: regions(&self.memory),
                // Known to who reads the vCPUs.
                cpuid: Vec::new(),
            },
            limits,
            way: Arc::clone(way),
            written,
        })));
        Ok(())
    }

    /// Has the next round begin.
    ///
    /// # Errors
    /// When the devices do not rest.
    pub fn next_round(&self) -> Result<(), Error> {
        let saver = self.saver.as_ref().ok_or(Error::NoSaver)?;
        // What is under way now is marked, and would not be again.
        let held = self.rest()?;
        let written = dirty::take_all(&self.memory);
        drop(held);
        saver.tell(Order::Word(Word::Round(written)));
        Ok(())
    }

    /// The guest stands still: sends the rest of the machine, which is held, and has it run at the other end.
    ///
    /// # Errors
    /// When that fails: the machine may go on here, unless [`Stranded`] says that it may run there.
    pub fn go(&self, held: HeldMachine<'_>) -> Result<Written, (Error, Option<Stranded>)> {
        held.send(dirty::take_all(&self.memory))
    }

    /// Tells whoever waits for a word to go on that the machine stays.
    pub fn call_back(&self) {
        if let Some(saver) = &self.saver {
            saver.tell(Order::Word(Word::Stay));
        }
    }

    /// It stays. What the guest writes is kept no longer, unless its config wants that.
    pub fn stay(&self, config: &Config) {
        if !config.machine_config.track_dirty_pages
            && let Err(error) = self.vm.log_writes(false)
        {
            log::warn!("the guest's writes are kept on: {error}");
        }
    }
}

//! Devices that a running machine gets and loses: made of what was opened for them, on the device thread.

use std::fs::File;
use std::sync::Arc;

use log::warn;

use super::devices::DeviceName;
use super::hotplug::{Error, Hotplug};
use super::{RunningMachine, drives, network, pmem, vsock_options};
use crate::config::{Drive, IoEngine, NetworkInterface, Pmem, Vsock};
use crate::metrics::Source;
use crate::resources::{DriveBackend, VsockSockets};
use crate::virtio::device::DeviceType;
use crate::virtio::pmem::PmemFile;
use crate::virtio::{self, Net, VirtioDevice};

/// What a device that has come counts.
type Counts = Option<Source>;

impl RunningMachine {
    /// Whether a device could come as `name`: to be asked before anything is opened for it.
    ///
    /// # Errors
    /// When there is no PCI bus, no slot is free, or the name is taken.
    pub fn can_plug(&self, name: &DeviceName) -> Result<(), Error> {
        let hotplug = self.hotplug.as_ref().ok_or(Error::NoBus)?;
        hotplug.room(name).map(drop)
    }

    /// Whether `drive` can be added to a running machine.
    ///
    /// # Errors
    /// When something of it takes what a sealed process cannot do.
    pub fn check_drive(drive: &Drive) -> Result<(), Error> {
        let why = if drive.is_root_device {
            "a machine boots from its root device; leave out `is_root_device`"
        } else if drive.socket.is_some() {
            "a back-end (`socket`) is connected to before the start; use `path_on_host`"
        } else if drive.io_engine == Some(IoEngine::Async) {
            "rings are made before the start; use `io_engine` Sync or Auto"
        } else {
            return Ok(());
        };
        let device = DeviceName::Drive(drive.drive_id.clone());
        Err(Error::OnlyBefore { device, why })
    }

    /// Plugs a drive in. `Auto` is `Sync` for it.
    ///
    /// # Errors
    /// See [`Error`]; the machine is as before then.
    pub fn plug_drive(&mut self, drive: &Drive, backend: DriveBackend) -> Result<Counts, Error> {
        Self::check_drive(drive)?;
        let mut drive = drive.clone();
        drive.io_engine = Some(IoEngine::Sync);
        let name = DeviceName::Drive(drive.drive_id.clone());
        self.plug(name, move || drives::device(&drive, backend))
    }

    /// Whether `card` can be added to a running machine.
    ///
    /// # Errors
    /// When something of it takes what a sealed process cannot do.
    pub fn check_card(card: &NetworkInterface) -> Result<(), Error> {
        if card.socket.is_none() {
            return Ok(());
        }
        Err(Error::OnlyBefore {
            device: DeviceName::NetworkInterface(card.iface_id.clone()),
            why: "a back-end (`socket`) is connected to before the start; use `host_dev_name`",
        })
    }

    /// Plugs a network card in, whose tap is prepared ([`net::prepare`](crate::virtio::net::prepare)).
    ///
    /// # Errors
    /// See [`Error`]; the machine is as before then.
    pub fn plug_card(
        &mut self,
        card: &NetworkInterface,
        taps: Vec<Arc<File>>,
    ) -> Result<Counts, Error> {
        Self::check_card(card)?;
        let (card, metadata) = (card.clone(), self.metadata.clone());
        let name = DeviceName::NetworkInterface(card.iface_id.clone());
        self.plug(name, move || {
            let card = network::card(&card, taps, &metadata, Net::on_prepared)?;
            Ok(Box::new(card))
        })
    }

    /// Whether `pmem` can be added to a running machine.
    ///
    /// # Errors
    /// When it is to be the root.
    pub fn check_pmem(pmem: &Pmem) -> Result<(), Error> {
        if !pmem.root_device {
            return Ok(());
        }
        Err(Error::OnlyBefore {
            device: DeviceName::Pmem(pmem.id.clone()),
            why: "a machine boots from its root device; leave out `root_device`",
        })
    }

    /// Plugs persistent memory in.
    ///
    /// # Errors
    /// See [`Error`]; the machine is as before then.
    pub fn plug_pmem(&mut self, pmem: &Pmem, file: File) -> Result<Counts, Error> {
        Self::check_pmem(pmem)?;
        let name = DeviceName::Pmem(pmem.id.clone());
        self.can_plug(&name)?;
        let (id, read_only) = (pmem.id.clone(), pmem.read_only);
        let taken = self.on_device_thread(move || PmemFile::take(id, file, read_only))?;
        let file = Arc::new(taken.map_err(device_error)?);
        let plugged = self.plug_mapped(name, pmem, &file);
        if plugged.is_ok() {
            self.panel.pmem.push(file);
        } else {
            self.on_device_thread(move || file.release())?;
        }
        plugged
    }

    fn plug_mapped(
        &mut self,
        name: DeviceName,
        pmem: &Pmem,
        file: &Arc<PmemFile>,
    ) -> Result<Counts, Error> {
        let memory = &self.hotplug.as_ref().ok_or(Error::NoBus)?.memory;
        let device = pmem::add_later(pmem, file, &mut self.vm, memory, self.address_bits);
        let device = device.map_err(device_error)?;
        let address = device.address();
        let plugged = self.plug(name, move || Ok(Box::new(device)));
        if plugged.is_ok() {
            self.pmem_places.insert(pmem.id.clone(), address);
        } else {
            self.unmap(address);
        }
        plugged
    }

    fn unmap(&mut self, address: u64) {
        if let Err(error) = self.vm.unmap_file(address) {
            warn!("the memory at {address:#x} stays with the guest: {error}");
        }
    }

    /// Plugs the socket device in, on a listener that is non-blocking.
    ///
    /// # Errors
    /// See [`Error`]; the machine is as before then.
    pub fn plug_vsock(&mut self, vsock: &Vsock, sockets: VsockSockets) -> Result<Counts, Error> {
        let options = vsock_options(vsock, sockets);
        self.plug(DeviceName::Only(DeviceType::Vsock), move || {
            Ok(Box::new(virtio::Vsock::on_prepared(options)?))
        })
    }

    fn on_device_thread<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let hotplug = self.hotplug.as_ref().ok_or(Error::NoBus)?;
        hotplug.worker.run(job).ok_or(Error::NoThread)
    }

    fn plug(
        &mut self,
        name: DeviceName,
        make: impl FnOnce() -> Result<Box<dyn VirtioDevice>, super::Error> + Send + 'static,
    ) -> Result<Counts, Error> {
        let hotplug = self.hotplug.as_mut().ok_or(Error::NoBus)?;
        let (index, counts) = hotplug.add(&name, make)?;
        self.devices.insert(index, name);
        Ok(counts)
    }

    /// Asks the guest to let a device go. It is there until the guest does, and may be asked for again.
    ///
    /// # Errors
    /// When there is no PCI bus, or no such device.
    pub fn unplug(&self, name: &DeviceName) -> Result<(), Error> {
        let hotplug = self.hotplug.as_ref().ok_or(Error::NoBus)?;
        hotplug.remove(name)
    }

    /// Takes away the devices that the guest has let go, and returns their names.
    pub fn take_ejected_devices(&mut self) -> Vec<DeviceName> {
        let hotplug = self.hotplug.as_mut();
        let gone = hotplug.map(Hotplug::settle).unwrap_or_default();
        for name in &gone {
            self.devices.remove(name);
            if let DeviceName::Pmem(id) = name {
                if let Some(address) = self.pmem_places.remove(id) {
                    self.unmap(address);
                }
                self.panel.pmem.retain(|file| file.id() != id);
            }
        }
        gone
    }
}

fn device_error(error: impl Into<super::Error>) -> Error {
    Error::Device(Box::new(error.into()))
}

//! Devices that come and go while the machine runs.
//!
//! What a device needs is opened by the broker, or was handed over; the device thread makes the device of it. Removing
//! one asks the guest: it stays, in the config that is shown too, until the guest has let it go.

use super::{Api, Desk, Fault};
use crate::config::{Config, Drive, NetworkInterface, Pmem, Vsock};
use crate::machine::RunningMachine;
use crate::machine::devices::DeviceName;
use crate::machine::hotplug;
use crate::metrics::Reporter;
use crate::virtio::device::DeviceType;

/// A device that is to come.
pub(super) enum NewDevice {
    Drive(Drive),
    Card(NetworkInterface),
    Pmem(Pmem),
    Vsock(Vsock),
}

impl NewDevice {
    fn name(&self) -> DeviceName {
        match self {
            Self::Drive(drive) => DeviceName::Drive(drive.drive_id.clone()),
            Self::Card(card) => DeviceName::NetworkInterface(card.iface_id.clone()),
            Self::Pmem(pmem) => DeviceName::Pmem(pmem.id.clone()),
            Self::Vsock(_) => DeviceName::Only(DeviceType::Vsock),
        }
    }

    /// Whether it can come late.
    fn check(&self) -> Result<(), hotplug::Error> {
        match self {
            Self::Drive(drive) => RunningMachine::check_drive(drive),
            Self::Pmem(pmem) => RunningMachine::check_pmem(pmem),
            Self::Card(card) => RunningMachine::check_card(card),
            Self::Vsock(_) => Ok(()),
        }
    }

    fn join(&self, config: &mut Config) {
        match self {
            Self::Drive(drive) => config.drives.push(drive.clone()),
            Self::Card(card) => config.network_interfaces.push(card.clone()),
            Self::Pmem(pmem) => config.pmem.push(pmem.clone()),
            Self::Vsock(vsock) => config.vsock = Some(vsock.clone()),
        }
    }
}

impl Desk {
    pub(super) fn plug(
        &mut self,
        machine: &mut RunningMachine,
        metrics: &mut Reporter,
        device: &NewDevice,
    ) -> Result<(), Fault> {
        machine.can_plug(&device.name())?;
        device.check()?;
        let mut next = self.config.clone();
        device.join(&mut next);
        next.check_devices()?;
        let source = &mut self.source;
        let plugged = match device {
            NewDevice::Drive(drive) => machine.plug_drive(drive, source.drive_later(drive)?),
            NewDevice::Card(card) => {
                // One with a back-end instead has been refused by `check`.
                let tap = card.host_dev_name.as_deref().unwrap_or_default();
                let taps = source.taps_later(tap, card.queues)?;
                machine.plug_card(card, taps)
            }
            NewDevice::Pmem(pmem) => {
                let file = source.file_later("pmem", &pmem.path_on_host, !pmem.read_only)?;
                machine.plug_pmem(pmem, file)
            }
            NewDevice::Vsock(vsock) => {
                let sockets = source.vsock_later(&vsock.uds_path)?;
                machine.plug_vsock(vsock, sockets)
            }
        };
        metrics.add(plugged?);
        self.config = next;
        Ok(())
    }

    pub(super) fn unplug(&self, machine: &RunningMachine, name: DeviceName) -> Result<(), Fault> {
        let is_root = match &name {
            DeviceName::Drive(id) => {
                let mut drives = self.config.drives.iter();
                drives.any(|drive| drive.is_root_device && drive.drive_id == *id)
            }
            DeviceName::Pmem(id) => {
                let mut pmem = self.config.pmem.iter();
                pmem.any(|pmem| pmem.root_device && pmem.id == *id)
            }
            _ => false,
        };
        if is_root {
            return Err(hotplug::Error::Root(name).into());
        }
        Ok(machine.unplug(&name)?)
    }
}

impl Api {
    /// A device has gone: the config that is shown has it no more.
    pub(in crate::control) fn forget(&mut self, name: &DeviceName) {
        let config = &mut self.desk.config;
        match name {
            DeviceName::Drive(id) => config.drives.retain(|drive| drive.drive_id != *id),
            DeviceName::Pmem(id) => config.pmem.retain(|pmem| pmem.id != *id),
            DeviceName::NetworkInterface(id) => {
                config
                    .network_interfaces
                    .retain(|card| card.iface_id != *id);
            }
            DeviceName::Only(DeviceType::Vsock) => config.vsock = None,
            // The others cannot be removed.
            DeviceName::Only(_) => {}
        }
    }
}

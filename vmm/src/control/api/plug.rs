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

impl Desk {
    pub(super) fn plug_drive(
        &mut self,
        machine: &mut RunningMachine,
        metrics: &mut Reporter,
        drive: Drive,
    ) -> Result<(), Fault> {
        machine.can_plug(&DeviceName::Drive(drive.drive_id.clone()))?;
        RunningMachine::check_drive(&drive)?;
        let next = self.with_device(|config| config.drives.push(drive.clone()))?;
        let backend = self.source.drive_later(&drive)?;
        metrics.add(machine.plug_drive(&drive, backend)?);
        self.config = next;
        Ok(())
    }

    pub(super) fn plug_card(
        &mut self,
        machine: &mut RunningMachine,
        metrics: &mut Reporter,
        card: NetworkInterface,
    ) -> Result<(), Fault> {
        machine.can_plug(&DeviceName::NetworkInterface(card.iface_id.clone()))?;
        let next = self.with_device(|config| config.network_interfaces.push(card.clone()))?;
        let taps = self.source.taps_later(&card.host_dev_name, card.queues)?;
        metrics.add(machine.plug_card(&card, taps)?);
        self.config = next;
        Ok(())
    }

    pub(super) fn plug_pmem(
        &mut self,
        machine: &mut RunningMachine,
        metrics: &mut Reporter,
        pmem: Pmem,
    ) -> Result<(), Fault> {
        machine.can_plug(&DeviceName::Pmem(pmem.id.clone()))?;
        RunningMachine::check_pmem(&pmem)?;
        let next = self.with_device(|config| config.pmem.push(pmem.clone()))?;
        let write = !pmem.read_only;
        let file = self.source.file_later("pmem", &pmem.path_on_host, write)?;
        metrics.add(machine.plug_pmem(&pmem, file)?);
        self.config = next;
        Ok(())
    }

    pub(super) fn plug_vsock(
        &mut self,
        machine: &mut RunningMachine,
        metrics: &mut Reporter,
        vsock: Vsock,
    ) -> Result<(), Fault> {
        machine.can_plug(&DeviceName::Only(DeviceType::Vsock))?;
        let next = self.with_device(|config| config.vsock = Some(vsock.clone()))?;
        let sockets = self.source.vsock_later(&vsock.uds_path)?;
        metrics.add(machine.plug_vsock(&vsock, sockets)?);
        self.config = next;
        Ok(())
    }

    /// The config with one more device, if that is allowed.
    fn with_device(&self, add: impl FnOnce(&mut Config)) -> Result<Config, Fault> {
        let mut next = self.config.clone();
        add(&mut next);
        next.check_devices()?;
        Ok(next)
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

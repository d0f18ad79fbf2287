//! Before the start: requests make a config, one section each.
//!
//! A section is checked together with all that is there already, and files and taps that it names are looked
//! for at once, so that the request that is wrong is the one that is refused. They are opened for good by
//! the start.

use std::sync::Arc;

use super::action::{Action, BalloonAction};
use super::{Desk, Fault, Reply};
use crate::config::{Config, CpuConfig, Serial};
use crate::control::observe;
use crate::devices::boot_timer::Moment;
use crate::lockdown;
use crate::machine::{self, Machine, Restore, RunningMachine};
use crate::metrics::Reporter;
use crate::resources::{self, Beginning};

impl Desk {
    pub(super) fn before(
        &mut self,
        metrics: &mut Reporter,
        action: Action,
    ) -> Result<Reply, Fault> {
        if let Some(reply) = self.look(&action, "Not started") {
            return Ok(reply);
        }
        match action {
            Action::GetMigration => return Ok(self.progress(None)),
            Action::ReceiveMachine(request) => return self.will_receive(request),
            // What comes says all of the machine.
            _ if self.is_moving() => return Err(Fault::Moving),
            Action::PutMachineConfig(machine) => self.change(|config| {
                config.machine_config = machine;
            })?,
            Action::PatchMachineConfig(update) => self.change(|config| {
                update.apply(&mut config.machine_config);
            })?,
            Action::PutBootSource(boot) => {
                boot.check()?;
                let kernel = boot.kernel_image_path.as_str();
                self.source.probe_file("kernel", kernel, false)?;
                if let Some(initrd) = &boot.initrd_path {
                    self.source.probe_file("initrd", initrd, false)?;
                }
                self.change(|config| config.boot_source = boot)?;
            }
            Action::PutCpuConfig(template) => self.change(|config| {
                config.cpu_config = Some(CpuConfig::Template(template));
            })?,
            Action::PutDrive(drive) => {
                let next = self.changed(|config| {
                    put(&mut config.drives, drive.clone(), |drive| &drive.drive_id);
                })?;
                self.source.probe_drive(&drive)?;
                self.config = next;
            }
            Action::PutPmem(pmem) => {
                let (path, write) = (pmem.path_on_host.clone(), !pmem.read_only);
                let next = self.changed(|config| {
                    put(&mut config.pmem, pmem, |pmem| &pmem.id);
                })?;
                self.source.probe_file("pmem", &path, write)?;
                self.config = next;
            }
            Action::PutNetworkInterface(card) => {
                let probed = card.clone();
                let next = self.changed(|config| {
                    put(&mut config.network_interfaces, card, |card| &card.iface_id);
                })?;
                self.source.probe_card(&probed)?;
                self.config = next;
            }
            Action::PutVsock(vsock) => self.change(|config| config.vsock = Some(vsock))?,
            Action::PutEntropy(entropy) => self.change(|config| config.entropy = Some(entropy))?,
            Action::PutSerial(serial) => {
                let path = serial.output().map(str::to_owned);
                let next = self.changed(|config| config.serial = Some(serial))?;
                if let Some(path) = path {
                    self.source.append(Serial::WHAT, &path)?;
                }
                self.config = next;
            }
            Action::PutBalloon(balloon) => self.change(|config| config.balloon = Some(balloon))?,
            Action::PutMemoryHotplug(memory) => self.change(|config| {
                config.memory_hotplug = Some(memory);
            })?,
            Action::PutMmdsConfig(mmds) => self.change(|config| config.mmds_config = Some(mmds))?,
            Action::PutLogger(logger) => observe::log(&logger, &mut self.source)?,
            Action::PutMetrics(config) => {
                observe::metrics(&config, &mut self.source, metrics, &self.id)?;
            }
            Action::Mmds(action) => return self.metadata(action),
            Action::Balloon(BalloonAction::Get) => {
                let balloon = self.config.balloon.as_ref();
                let balloon = balloon.ok_or_else(|| Fault::NoDevice("balloon".to_owned()))?;
                return Ok(Reply::of(balloon));
            }
            Action::LoadSnapshot(load) => return self.load_snapshot(&load),
            Action::InstanceStart => return self.instance_start(),
            Action::PatchDrive(_)
            | Action::PatchPmem(_)
            | Action::PatchNetworkInterface(_)
            | Action::Remove(_)
            | Action::Balloon(_)
            | Action::MemoryHotplug(_)
            | Action::PatchVcpus(_)
            | Action::GetVcpus
            | Action::FlushMetrics
            | Action::SendCtrlAltDel
            | Action::Pause
            | Action::Resume
            | Action::CreateSnapshot(_)
            | Action::SendMachine(_)
            | Action::CancelMigration => return Err(Fault::NotStarted),
            // `look` has answered these.
            Action::GetInstance
            | Action::GetVersion
            | Action::GetConfig
            | Action::GetMachineConfig => {}
        }
        Ok(Reply::Done)
    }

    /// The config after a change, if that is allowed.
    fn changed(&self, change: impl FnOnce(&mut Config)) -> Result<Config, Fault> {
        let mut next = self.config.clone();
        change(&mut next);
        next.check()?;
        Ok(next)
    }

    fn change(&mut self, change: impl FnOnce(&mut Config)) -> Result<(), Fault> {
        self.config = self.changed(change)?;
        Ok(())
    }

    /// `InstanceStart`
    fn instance_start(&mut self) -> Result<Reply, Fault> {
        if self.config.boot_source.kernel_image_path.is_empty() {
            return Err(Fault::NothingToBoot);
        }
        if self.options.boot_timer.is_some() {
            self.options.boot_timer = Some(Moment::now());
        }
        let machine = self.build::<Fault>(&self.config.clone(), self.options, None)?;
        self.take_over(machine.start())
    }

    /// What comes of a machine's start.
    pub(super) fn take_over(
        &mut self,
        started: Result<RunningMachine, machine::Error>,
    ) -> Result<Reply, Fault> {
        match started {
            Ok(running) => {
                self.source.settle();
                self.started = Some(running);
                Ok(Reply::Done)
            }
            Err(error) => {
                // Threads may be sealed, this one too: there is no way back.
                let fault = error.to_string();
                self.failed = Some(crate::Error::Machine(error));
                Err(Fault::StartFailed(fault))
            }
        }
    }

    /// Opens what `config` names, and builds its machine: a new one, or one that goes on from a saved one.
    pub(super) fn build<E>(
        &mut self,
        config: &Config,
        options: machine::Options,
        restore: Option<Restore>,
    ) -> Result<Machine, E>
    where
        E: From<resources::Error> + From<lockdown::Error> + From<machine::Error>,
    {
        let from = match restore {
            Some(_) => Beginning::Snapshot,
            None => Beginning::Boot,
        };
        self.source.forget();
        let mut resources = self.source.open(config, from)?;
        resources.metadata = Arc::clone(&self.metadata);
        self.source.lock_down()?;
        Ok(machine::build(config, resources, options, restore)?)
    }

    /// The start of a machine whose config was there from the beginning.
    pub(super) fn build_and_start(&mut self) -> Result<RunningMachine, crate::Error> {
        let machine = self.build::<crate::Error>(&self.config.clone(), self.options, None)?;
        let running = machine.start()?;
        self.source.settle();
        Ok(running)
    }
}

/// Replaces the item of the same name, or adds one.
fn put<T>(items: &mut Vec<T>, item: T, name: impl Fn(&T) -> &String) {
    match items.iter_mut().find(|other| name(other) == name(&item)) {
        Some(place) => *place = item,
        None => items.push(item),
    }
}

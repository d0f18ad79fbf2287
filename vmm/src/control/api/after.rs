//! After the start: requests look at the running machine and change it.
//!
//! The control thread asks the device thread and waits for its answer, which takes a bounded time. The config
//! that is shown follows what was changed.

use std::time::{Duration, Instant};

use serde_json::json;

use super::action::{Action, DriveUpdate, NetworkInterfaceUpdate, PmemUpdate};
use super::plug::NewDevice;
use super::{Desk, Fault, Reply, counting};
use crate::config::{Drive, RateLimiter};
use crate::machine::RunningMachine;
use crate::machine::devices::DeviceName;
use crate::metrics::Reporter;
use crate::virtio::rate_limiter::LimiterOptions;
use crate::virtio::update::{Answer, Update};

/// How long vCPUs may take to stop. They take microseconds, unless somebody who should read the console does not.
const PAUSE: Duration = Duration::from_secs(2);

impl Desk {
    pub(super) fn after(
        &mut self,
        machine: &mut RunningMachine,
        metrics: &mut Reporter,
        action: Action,
    ) -> Result<Reply, Fault> {
        let state = if self.paused { "Paused" } else { "Running" };
        if let Some(reply) = self.look(&action, state) {
            return Ok(reply);
        }
        if matches!(action, Action::Resume) {
            self.settle_doubt(machine);
        }
        match action {
            Action::GetMigration => return Ok(self.progress(Some(machine))),
            Action::CancelMigration => return self.cancel(machine),
            // What is being moved stays as it is.
            _ if self.is_moving() => return Err(Fault::Moving),
            Action::SendMachine(limits) => return self.will_send(machine, limits),
            Action::Pause => {
                let start = Instant::now();
                self.pause(machine)?;
                counting::state_changed(&metrics.api, true, start);
            }
            Action::Resume => {
                let start = Instant::now();
                machine.resume();
                self.paused = false;
                self.guest_runs();
                counting::state_changed(&metrics.api, false, start);
            }
            Action::PatchDrive(update) => self.patch_drive(machine, update)?,
            Action::PatchNetworkInterface(update) => self.patch_card(machine, update)?,
            Action::PatchPmem(update) => self.patch_pmem(machine, update)?,
            Action::GetVcpus => {
                return Ok(Reply::of(&json!({ "vcpu_count": machine.vcpu_count() })));
            }
            Action::PatchVcpus(update) => machine.set_vcpus(update.vcpu_count)?,
            Action::FlushMetrics => {
                if !metrics.has_started() {
                    return Err(Fault::NoMetrics);
                }
                metrics.flush().map_err(Fault::Metrics)?;
            }
            Action::SendCtrlAltDel => machine.panel.press_ctrl_alt_del(),
            Action::Balloon(action) => return self.balloon(machine, action),
            Action::MemoryHotplug(action) => return self.memory(machine, action),
            Action::Mmds(action) => return self.metadata(action),
            Action::PutDrive(drive) => {
                self.plug(machine, metrics, &NewDevice::Drive(drive))?;
            }
            Action::PutNetworkInterface(card) => {
                self.plug(machine, metrics, &NewDevice::Card(card))?;
            }
            Action::PutPmem(pmem) => self.plug(machine, metrics, &NewDevice::Pmem(pmem))?,
            Action::PutVsock(vsock) => {
                self.plug(machine, metrics, &NewDevice::Vsock(vsock))?;
            }
            Action::Remove(name) => self.unplug(machine, name)?,
            Action::CreateSnapshot(create) => return self.create_snapshot(machine, &create),
            Action::PutMachineConfig(_)
            | Action::PatchMachineConfig(_)
            | Action::PutBootSource(_)
            | Action::PutCpuConfig(_)
            | Action::PutEntropy(_)
            | Action::PutSerial(_)
            | Action::PutLogger(_)
            | Action::PutMetrics(_)
            | Action::PutBalloon(_)
            | Action::PutMemoryHotplug(_)
            | Action::PutMmdsConfig(_)
            | Action::InstanceStart
            | Action::LoadSnapshot(_)
            | Action::ReceiveMachine(_) => return Err(Fault::Started),
            // `look` has answered these.
            Action::GetInstance
            | Action::GetVersion
            | Action::GetConfig
            | Action::GetMachineConfig => {}
        }
        Ok(Reply::Done)
    }

    pub(super) fn pause(&mut self, machine: &mut RunningMachine) -> Result<(), Fault> {
        machine.pause();
        if let Err(vcpu) = machine.wait_until_paused(PAUSE) {
            machine.resume();
            return Err(Fault::NotPaused(vcpu));
        }
        self.paused = true;
        self.record_working_set(machine, true);
        Ok(())
    }

    fn patch_drive(
        &mut self,
        machine: &mut RunningMachine,
        update: DriveUpdate,
    ) -> Result<(), Fault> {
        let name = DeviceName::Drive(update.drive_id.clone());
        let is_it = |drive: &Drive| drive.drive_id == update.drive_id;
        let found = self.config.drives.iter().rposition(is_it);
        let mut next = self.config.clone();
        let drive = found.and_then(|at| next.drives.get_mut(at));
        let drive = drive.ok_or_else(|| Fault::NoDevice(name.to_string()))?;
        if let Some(path) = update.path_on_host {
            let write = !drive.is_read_only;
            drive.path_on_host = Some(path.clone());
            // The lock is no help: what was handed over is one open file, and has one lock.
            next.check_devices()?;
            let file = self.source.file_later("drive", &path, write)?;
            ask(machine, &name, Update::File(file))?;
            self.config = next;
        }
        let drive = found.and_then(|at| self.config.drives.get_mut(at));
        let drive = drive.ok_or_else(|| Fault::NoDevice(name.to_string()))?;
        if let Some(limiter) = update.rate_limiter {
            ask(machine, &name, Update::Limits(limiter.into()))?;
            merge(&mut drive.rate_limiter, limiter);
        }
        Ok(())
    }

    fn patch_pmem(&mut self, machine: &RunningMachine, update: PmemUpdate) -> Result<(), Fault> {
        let name = DeviceName::Pmem(update.id.clone());
        let found = self.config.pmem.iter_mut().find(|it| it.id == update.id);
        let pmem = found.ok_or_else(|| Fault::NoDevice(name.to_string()))?;
        ask(machine, &name, Update::Limits(limits(update.rate_limiter)))?;
        if let Some(limiter) = update.rate_limiter {
            merge(&mut pmem.rate_limiter, limiter);
        }
        Ok(())
    }

    fn patch_card(
        &mut self,
        machine: &mut RunningMachine,
        update: NetworkInterfaceUpdate,
    ) -> Result<(), Fault> {
        let name = DeviceName::NetworkInterface(update.iface_id.clone());
        let cards = self.config.network_interfaces.iter_mut();
        let found = cards.filter(|card| card.iface_id == update.iface_id);
        let card = found
            .last()
            .ok_or_else(|| Fault::NoDevice(name.to_string()))?;
        let (rx, tx) = (update.rx_rate_limiter, update.tx_rate_limiter);
        let change = Update::NetLimits {
            rx: limits(rx),
            tx: limits(tx),
        };
        ask(machine, &name, change)?;
        for (limiter, update) in [
            (&mut card.rx_rate_limiter, rx),
            (&mut card.tx_rate_limiter, tx),
        ] {
            if let Some(update) = update {
                merge(limiter, update);
            }
        }
        Ok(())
    }
}

fn limits(limiter: Option<RateLimiter>) -> LimiterOptions {
    limiter.map(Into::into).unwrap_or_default()
}

/// Asks a device, and waits for it.
pub(super) fn ask(
    machine: &RunningMachine,
    name: &DeviceName,
    update: Update,
) -> Result<Answer, Fault> {
    let asked = machine.devices.update(name, update);
    asked.map_err(|source| Fault::Update {
        device: name.to_string(),
        source,
    })
}

/// A bucket that is given replaces the one there is; one without tokens or time ends it.
fn merge(limiter: &mut Option<RateLimiter>, update: RateLimiter) {
    let old = limiter.unwrap_or(RateLimiter {
        bandwidth: None,
        ops: None,
    });
    let limits = |bucket: &crate::config::TokenBucket| bucket.size > 0 && bucket.refill_time > 0;
    let bandwidth = update.bandwidth.or(old.bandwidth).filter(limits);
    let ops = update.ops.or(old.ops).filter(limits);
    let any = bandwidth.is_some() || ops.is_some();
    *limiter = any.then_some(RateLimiter { bandwidth, ops });
}

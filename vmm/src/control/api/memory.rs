//! What is asked of the running machine's memory device.

use serde_json::json;

use super::action::MemoryHotplugAction;
use super::after::ask;
use super::{Desk, Fault, Reply};
use crate::machine::RunningMachine;
use crate::machine::devices::DeviceName;
use crate::virtio::device::DeviceType;
use crate::virtio::mem::Command;
use crate::virtio::update::{Answer, Update};

impl Desk {
    pub(super) fn memory(
        &self,
        machine: &RunningMachine,
        action: MemoryHotplugAction,
    ) -> Result<Reply, Fault> {
        let missing = || Fault::NoDevice("memory device".to_owned());
        let config = self.config.memory_hotplug.as_ref().ok_or_else(missing)?;
        let name = DeviceName::Only(DeviceType::Mem);
        match action {
            MemoryHotplugAction::Get => {
                let answer = ask(machine, &name, Update::Mem(Command::Report))?;
                let Answer::Mem(status) = answer else {
                    return Err(missing());
                };
                Ok(Reply::of(&json!({
                    "total_size_mib": status.total_size >> 20,
                    "slot_size_mib": config.slot_size_mib,
                    "block_size_mib": status.block_size >> 20,
                    "plugged_size_mib": status.plugged_size >> 20,
                    "requested_size_mib": status.requested_size >> 20,
                })))
            }
            MemoryHotplugAction::Patch(update) => {
                let size = update.requested_size_mib;
                ask(machine, &name, Update::Mem(Command::Resize(size)))?;
                Ok(Reply::Done)
            }
        }
    }
}

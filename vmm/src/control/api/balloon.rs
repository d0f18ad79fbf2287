//! What is asked of the running machine's balloon.

use serde_json::{Map, Value, json};

use super::action::BalloonAction;
use super::after::ask;
use super::{Desk, Fault, Reply};
use crate::machine::RunningMachine;
use crate::machine::devices::DeviceName;
use crate::virtio::balloon::{Command, Status};
use crate::virtio::device::DeviceType;
use crate::virtio::update::{Answer, Update};

impl Desk {
    pub(super) fn balloon(
        &mut self,
        machine: &RunningMachine,
        action: BalloonAction,
    ) -> Result<Reply, Fault> {
        let Some(config) = &mut self.config.balloon else {
            return Err(Fault::NoDevice("balloon".to_owned()));
        };
        let name = DeviceName::Only(DeviceType::Balloon);
        let tell = |command| ask(machine, &name, Update::Balloon(command));
        match action {
            BalloonAction::Get => return Ok(Reply::of(config)),
            BalloonAction::GetStatistics => {
                return status(tell(Command::Report)?, |status| statistics(&status));
            }
            BalloonAction::GetHintingStatus => {
                if !config.free_page_hinting {
                    return Err(Fault::NoDevice("free-page hinting".to_owned()));
                }
                return status(tell(Command::Report)?, |status| {
                    let hinting = status.hinting?;
                    Some(json!({
                        "host_cmd": hinting.host_cmd,
                        "guest_cmd": hinting.guest_cmd,
                    }))
                });
            }
            BalloonAction::Patch(update) => {
                if u64::from(update.amount_mib) > self.config.machine_config.mem_size_mib {
                    return Err(Fault::TooMuchMemory(update.amount_mib));
                }
                tell(Command::Resize(update.amount_mib))?;
                config.amount_mib = update.amount_mib;
            }
            BalloonAction::PatchStatistics(update) => {
                let seconds = update.stats_polling_interval_s;
                tell(Command::StatisticsInterval(seconds))?;
                config.stats_polling_interval_s = seconds;
            }
            BalloonAction::StartHinting(start) => {
                let acknowledge_on_stop = start.acknowledge_on_stop;
                tell(Command::StartHinting {
                    acknowledge_on_stop,
                })?;
            }
            BalloonAction::StopHinting => {
                tell(Command::StopHinting)?;
            }
        }
        Ok(Reply::Done)
    }
}

fn status(answer: Answer, show: impl FnOnce(Status) -> Option<Value>) -> Result<Reply, Fault> {
    let shown = match answer {
        Answer::Balloon(status) => show(*status),
        Answer::Done | Answer::Mem(_) => None,
    };
    let shown = shown.ok_or_else(|| Fault::NoDevice("balloon statistics".to_owned()))?;
    Ok(Reply::of(&shown))
}

/// Pages are of 4 KiB.
fn statistics(status: &Status) -> Option<Value> {
    let told = status.statistics?;
    let own = [
        ("target_pages", status.target_pages),
        ("actual_pages", status.actual_pages),
        ("target_mib", status.target_pages / 256),
        ("actual_mib", status.actual_pages / 256),
    ];
    let own = own.map(|(name, value)| (name.to_owned(), Value::from(value)));
    let told = told.iter();
    let told = told.map(|(name, value)| (name.to_owned(), Value::from(value)));
    Some(Value::Object(
        own.into_iter().chain(told).collect::<Map<_, _>>(),
    ))
}

//! From a method, a path and a body to what is asked for. Pure: nothing is done here.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::action::{
    Action, BalloonAction, DriveUpdate, MachineConfigUpdate, MemoryHotplugAction, MmdsAction,
    NetworkInterfaceUpdate, PmemUpdate, StartHinting,
};
use super::http::Method;
use super::snapshot::LoadSnapshot;
use crate::config::{
    Drive, MachineConfig, MmdsConfig, MmdsVersion, NetworkInterface, Pmem, Vsock, objects,
};
use crate::machine::devices::DeviceName;
use crate::virtio::device::DeviceType;

/// Why a request was not understood; all are answered by 400.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing of that name, or it does not know the method.
    #[error("{method} {path:.100}: the API has no such operation")]
    Unknown {
        /// The method.
        method: &'static str,
        /// The path.
        path: String,
    },
    /// The path should end with a device's name.
    #[error("the path ends before the device's name")]
    NoId,
    /// A device's name that is none.
    #[error("{0:.80?} is no name of a device: use letters, digits and underscores")]
    Id(String),
    /// Path and body disagree.
    #[error("the path is about {path:?}, and the body about {body:.80?}")]
    OtherId {
        /// The name in the path.
        path: String,
        /// The name in the body.
        body: String,
    },
    /// A body where there must be none.
    #[error("{0} takes no body")]
    Body(&'static str),
    /// No body where there must be one, or one that changes nothing.
    #[error("{0} needs a body that says what shall change")]
    NoBody(&'static str),
    /// A body that is no object, whatever else it may be.
    #[error("the body is refused: it is no JSON object")]
    NoObject,
    /// Not JSON, a field that does not exist, one that is missing, or one of another type.
    #[error("the body is refused: {0}")]
    Json(#[from] serde_json::Error),
}

/// A request that was understood.
#[derive(Debug)]
pub struct Route {
    /// What it asks for.
    pub action: Action,
    /// Whether it uses something that will go.
    pub deprecated: bool,
}

impl From<Action> for Route {
    fn from(action: Action) -> Self {
        Self {
            action,
            deprecated: false,
        }
    }
}

/// Understands a request.
///
/// # Errors
/// See [`Error`].
pub fn route(method: Method, path: &str, body: &[u8]) -> Result<Route, Error> {
    let mut parts = path.trim_start_matches('/').split_terminator('/');
    let parts = [parts.next(), parts.next(), parts.next(), parts.next()];
    let parts = match &parts {
        [None, ..] => &[][..],
        [Some(a), None, ..] => &[*a][..],
        [Some(a), Some(b), None, _] => &[*a, *b],
        [Some(a), Some(b), Some(c), None] => &[*a, *b, *c],
        _ => return Err(unknown(method, path)),
    };
    let found = match method {
        Method::Get if !body.is_empty() => return Err(Error::Body("GET")),
        Method::Delete if !body.is_empty() => return Err(Error::Body("DELETE")),
        Method::Put if body.is_empty() => return Err(Error::NoBody("PUT")),
        Method::Get => get(parts).map(Into::into),
        Method::Delete => delete(parts)?.map(Into::into),
        Method::Put => put(parts, body)?,
        Method::Patch => patch(parts, body)?.map(Into::into),
    };
    found.ok_or_else(|| unknown(method, path))
}

/// A body that says nothing.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

fn unknown(method: Method, path: &str) -> Error {
    Error::Unknown {
        method: method.name(),
        path: path.to_owned(),
    }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    // Metadata has no type that would say so.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(Error::NoObject);
    }
    Ok(objects::from_slice(body)?)
}

/// The device's name in the path.
fn id<'a>(parts: &[&'a str]) -> Result<&'a str, Error> {
    let id = parts
        .get(1)
        .filter(|id| !id.is_empty())
        .ok_or(Error::NoId)?;
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if id.chars().all(fits) {
        Ok(id)
    } else {
        Err(Error::Id((*id).to_owned()))
    }
}

/// A body about the device that the path names.
fn about<T: DeserializeOwned>(
    parts: &[&str],
    body: &[u8],
    name: impl Fn(&T) -> &str,
) -> Result<T, Error> {
    let id = id(parts)?;
    let found: T = json(body)?;
    if name(&found) == id {
        return Ok(found);
    }
    Err(Error::OtherId {
        path: id.to_owned(),
        body: name(&found).to_owned(),
    })
}

fn get(parts: &[&str]) -> Option<Action> {
    Some(match parts {
        [] => Action::GetInstance,
        ["version"] => Action::GetVersion,
        ["vm", "config"] => Action::GetConfig,
        ["machine-config"] => Action::GetMachineConfig,
        ["mmds"] => Action::Mmds(MmdsAction::Get),
        ["balloon"] => Action::Balloon(BalloonAction::Get),
        ["balloon", "statistics"] => Action::Balloon(BalloonAction::GetStatistics),
        ["balloon", "hinting", "status"] => Action::Balloon(BalloonAction::GetHintingStatus),
        ["hotplug", "memory"] => Action::MemoryHotplug(MemoryHotplugAction::Get),
        ["hotplug", "vcpus"] => Action::GetVcpus,
        ["migration"] => Action::GetMigration,
        _ => return None,
    })
}

fn delete(parts: &[&str]) -> Result<Option<Action>, Error> {
    if let ["vsock"] = parts {
        return Ok(Some(Action::Remove(DeviceName::Only(DeviceType::Vsock))));
    }
    let name = match parts {
        ["drives", ..] => DeviceName::Drive,
        ["pmem", ..] => DeviceName::Pmem,
        ["network-interfaces", ..] => DeviceName::NetworkInterface,
        _ => return Ok(None),
    };
    if parts.len() > 2 {
        return Ok(None);
    }
    Ok(Some(Action::Remove(name(id(parts)?.to_owned()))))
}

fn put(parts: &[&str], body: &[u8]) -> Result<Option<Route>, Error> {
    let mut deprecated = false;
    let action = match parts {
        ["actions"] => act(body)?,
        ["boot-source"] => Action::PutBootSource(json(body)?),
        ["machine-config"] => {
            let machine: MachineConfig = json(body)?;
            deprecated = machine.cpu_template.is_some();
            Action::PutMachineConfig(machine)
        }
        ["cpu-config"] => Action::PutCpuConfig(json(body)?),
        ["drives"] | ["drives", _] => {
            Action::PutDrive(about(parts, body, |d: &Drive| &d.drive_id)?)
        }
        ["pmem"] | ["pmem", _] => Action::PutPmem(about(parts, body, |p: &Pmem| &p.id)?),
        ["network-interfaces"] | ["network-interfaces", _] => {
            Action::PutNetworkInterface(about(parts, body, |n: &NetworkInterface| &n.iface_id)?)
        }
        ["vsock"] => {
            let vsock: Vsock = json(body)?;
            deprecated = vsock.vsock_id.is_some();
            Action::PutVsock(vsock)
        }
        ["entropy"] => Action::PutEntropy(json(body)?),
        ["serial"] => Action::PutSerial(json(body)?),
        ["logger"] => Action::PutLogger(json(body)?),
        ["metrics"] => Action::PutMetrics(json(body)?),
        ["balloon"] => Action::PutBalloon(json(body)?),
        ["hotplug", "memory"] => Action::PutMemoryHotplug(json(body)?),
        ["mmds"] => Action::Mmds(MmdsAction::Put(json(body)?)),
        ["mmds", "config"] => {
            let mmds: MmdsConfig = json(body)?;
            deprecated = mmds.version == MmdsVersion::V1;
            Action::PutMmdsConfig(mmds)
        }
        ["migration", "send"] => Action::SendMachine(json(body)?),
        ["migration", "receive"] => Action::ReceiveMachine(json(body)?),
        ["migration", "cancel"] => {
            let Nothing {} = json(body)?;
            Action::CancelMigration
        }
        ["snapshot", "create"] => Action::CreateSnapshot(json(body)?),
        ["snapshot", "load"] => {
            let load: LoadSnapshot = json(body)?;
            deprecated = load.is_deprecated();
            Action::LoadSnapshot(Box::new(load))
        }
        _ => return Ok(None),
    };
    Ok(Some(Route { action, deprecated }))
}

fn patch(parts: &[&str], body: &[u8]) -> Result<Option<Action>, Error> {
    // The one operation that may do without.
    if let ["balloon", "hinting", "stop"] = parts {
        return Ok(Some(Action::Balloon(BalloonAction::StopHinting)));
    }
    if let ["balloon", "hinting", "start"] = parts {
        let start = match body {
            [] => StartHinting::default(),
            body => json(body)?,
        };
        return Ok(Some(Action::Balloon(BalloonAction::StartHinting(start))));
    }
    if body.is_empty() {
        return Err(Error::NoBody("PATCH"));
    }
    Ok(Some(match parts {
        ["machine-config"] => {
            let update: MachineConfigUpdate = json(body)?;
            if update == MachineConfigUpdate::default() {
                return Err(Error::NoBody("PATCH"));
            }
            Action::PatchMachineConfig(update)
        }
        ["drives"] | ["drives", _] => {
            Action::PatchDrive(about(parts, body, |d: &DriveUpdate| &d.drive_id)?)
        }
        ["pmem"] | ["pmem", _] => Action::PatchPmem(about(parts, body, |p: &PmemUpdate| &p.id)?),
        ["network-interfaces"] | ["network-interfaces", _] => {
            Action::PatchNetworkInterface(about(parts, body, |n: &NetworkInterfaceUpdate| {
                &n.iface_id
            })?)
        }
        ["balloon"] => Action::Balloon(BalloonAction::Patch(json(body)?)),
        ["balloon", "statistics"] => Action::Balloon(BalloonAction::PatchStatistics(json(body)?)),
        ["hotplug", "memory"] => Action::MemoryHotplug(MemoryHotplugAction::Patch(json(body)?)),
        ["hotplug", "vcpus"] => Action::PatchVcpus(json(body)?),
        ["mmds"] => Action::Mmds(MmdsAction::Patch(json(body)?)),
        ["vm"] => match json::<VmUpdate>(body)?.state {
            VmState::Paused => Action::Pause,
            VmState::Resumed => Action::Resume,
        },
        _ => return Ok(None),
    }))
}

/// `PUT /actions`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionBody {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

fn act(body: &[u8]) -> Result<Action, Error> {
    Ok(match json::<ActionBody>(body)?.action_type {
        ActionType::FlushMetrics => Action::FlushMetrics,
        ActionType::InstanceStart => Action::InstanceStart,
        ActionType::SendCtrlAltDel => Action::SendCtrlAltDel,
    })
}

/// `PATCH /vm`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmUpdate {
    state: VmState,
}

#[derive(Deserialize)]
enum VmState {
    Paused,
    Resumed,
}

#[cfg(test)]
#[path = "routes_tests.rs"]
mod tests;

//! What a request asks for, once its method, path and body have been read: one variant each.

use serde::Deserialize;
use serde_json::Value;

use super::migration::ReceiveMachine;
use super::snapshot::{CreateSnapshot, LoadSnapshot};
use crate::config::{
    Balloon, BootSource, CpuTemplate, Drive, Entropy, HugePages, Logger, MachineConfig,
    MemoryHotplug, Metrics, MmdsConfig, NamedCpuTemplate, NetworkInterface, Pmem, RateLimiter,
    Serial, Vsock,
};
use crate::machine::devices::DeviceName;
use crate::machine::moving::Limits;

/// What a request asks for.
#[derive(Debug)]
#[allow(missing_docs, reason = "each is a method and a path of the API")]
pub enum Action {
    GetInstance,
    GetVersion,
    GetConfig,
    GetMachineConfig,
    PutMachineConfig(MachineConfig),
    PatchMachineConfig(MachineConfigUpdate),
    PutBootSource(BootSource),
    PutCpuConfig(CpuTemplate),
    PutDrive(Drive),
    PatchDrive(DriveUpdate),
    PutPmem(Pmem),
    PatchPmem(PmemUpdate),
    PutNetworkInterface(NetworkInterface),
    PatchNetworkInterface(NetworkInterfaceUpdate),
    /// Takes a device out of the running machine.
    Remove(DeviceName),
    PutVsock(Vsock),
    PutEntropy(Entropy),
    PutSerial(Serial),
    PutLogger(Logger),
    PutMetrics(Metrics),
    Balloon(BalloonAction),
    PutBalloon(Balloon),
    MemoryHotplug(MemoryHotplugAction),
    PutMemoryHotplug(MemoryHotplug),
    Mmds(MmdsAction),
    PutMmdsConfig(MmdsConfig),
    PatchVcpus(VcpuUpdate),
    GetVcpus,
    InstanceStart,
    FlushMetrics,
    SendCtrlAltDel,
    Pause,
    Resume,
    CreateSnapshot(CreateSnapshot),
    LoadSnapshot(Box<LoadSnapshot>),
    GetMigration,
    SendMachine(Limits),
    ReceiveMachine(ReceiveMachine),
    CancelMigration,
}

/// What is asked of the balloon.
#[derive(Debug)]
#[allow(missing_docs, reason = "each is a method and a path of the API")]
pub enum BalloonAction {
    Get,
    GetStatistics,
    GetHintingStatus,
    Patch(BalloonUpdate),
    PatchStatistics(BalloonStatisticsUpdate),
    StartHinting(StartHinting),
    StopHinting,
}

/// What is asked of the memory device.
#[derive(Debug)]
#[allow(missing_docs, reason = "each is a method and a path of the API")]
pub enum MemoryHotplugAction {
    Get,
    Patch(MemoryHotplugUpdate),
}

/// What is asked of the metadata service's store.
#[derive(Debug)]
#[allow(missing_docs, reason = "each is a method and a path of the API")]
pub enum MmdsAction {
    Get,
    Put(Value),
    Patch(Value),
}

/// `PATCH /machine-config`: what is not given stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "see `MachineConfig`")]
pub struct MachineConfigUpdate {
    pub vcpu_count: Option<u8>,
    pub max_vcpu_count: Option<u8>,
    pub mem_size_mib: Option<u64>,
    pub smt: Option<bool>,
    pub cpu_template: Option<NamedCpuTemplate>,
    pub track_dirty_pages: Option<bool>,
    pub huge_pages: Option<HugePages>,
    pub pit: Option<bool>,
    pub gdb_socket_path: Option<String>,
}

impl MachineConfigUpdate {
    /// Makes the change.
    pub fn apply(&self, machine: &mut MachineConfig) {
        fn set<T: Copy>(to: &mut T, from: Option<T>) {
            if let Some(value) = from {
                *to = value;
            }
        }
        set(&mut machine.vcpu_count, self.vcpu_count);
        set(&mut machine.mem_size_mib, self.mem_size_mib);
        set(&mut machine.smt, self.smt);
        set(&mut machine.track_dirty_pages, self.track_dirty_pages);
        set(&mut machine.huge_pages, self.huge_pages);
        set(&mut machine.pit, self.pit);
        if self.max_vcpu_count.is_some() {
            machine.max_vcpu_count = self.max_vcpu_count;
        }
        if self.gdb_socket_path.is_some() {
            machine.gdb_socket_path.clone_from(&self.gdb_socket_path);
        }
        if let Some(template) = self.cpu_template {
            machine.cpu_template = Some(template).filter(|t| *t != NamedCpuTemplate::None);
        }
    }
}

/// `PATCH /drives/{id}`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// Which one.
    pub drive_id: String,
    /// Another image.
    pub path_on_host: Option<String>,
    /// Other limits.
    pub rate_limiter: Option<RateLimiter>,
}

/// `PATCH /pmem/{id}`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemUpdate {
    /// Which one.
    pub id: String,
    /// Other limits.
    pub rate_limiter: Option<RateLimiter>,
}

/// `PATCH /network-interfaces/{id}`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceUpdate {
    /// Which one.
    pub iface_id: String,
    /// Other limits of what the guest receives.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Other limits of what the guest sends.
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// `PATCH /balloon`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// See [`Balloon`].
    pub amount_mib: u32,
}

/// `PATCH /balloon/statistics`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsUpdate {
    /// See [`Balloon`].
    pub stats_polling_interval_s: u16,
}

/// `PATCH /balloon/hinting/start`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StartHinting {
    /// Whether the guest gets its pages back by itself once it has told of all.
    pub acknowledge_on_stop: bool,
}

impl Default for StartHinting {
    fn default() -> Self {
        Self {
            acknowledge_on_stop: true,
        }
    }
}

/// `PATCH /hotplug/memory`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugUpdate {
    /// How much the guest shall have, in MiB, besides what it started with.
    pub requested_size_mib: u32,
}

/// `PATCH /hotplug/vcpus`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuUpdate {
    /// How many vCPUs the guest shall have.
    pub vcpu_count: u8,
}

//! What this host can run directly, and what goes into the lab.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::artifacts::Artifacts;

/// How `/dev/kvm` runs a guest's kernel mode, as `casemate doctor` measured it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestMode {
    /// By the processor.
    Native,
    /// By an interpreter: bare-metal guests that stay in user mode run, Linux does not.
    Emulated,
    /// There is no usable `/dev/kvm`.
    Absent,
}

/// Where something runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Where {
    /// On this host.
    Here,
    /// In the lab.
    Lab,
}

/// A place, and the reason for it in a few words.
pub struct Choice {
    /// The place.
    pub place: Where,
    /// Why.
    pub reason: String,
}

/// What matters about this host.
pub struct Host {
    mode: GuestMode,
    kvm_error: Option<String>,
    /// What else the tests cannot do without, and this host does not have.
    lacks: Option<&'static str>,
}

#[derive(Deserialize)]
struct Report {
    kvm: KvmReport,
    landlock: LandlockReport,
    cgroup: CgroupReport,
    tools: ToolsReport,
}

#[derive(Deserialize)]
struct LandlockReport {
    abi: i32,
}

#[derive(Deserialize)]
struct CgroupReport {
    controllers: BTreeMap<String, u8>,
}

#[derive(Deserialize)]
struct ToolsReport {
    tun: bool,
}

#[derive(Deserialize)]
struct KvmReport {
    guest_mode: GuestMode,
    error: Option<String>,
}

impl Report {
    fn lacks(&self) -> Option<&'static str> {
        let has = |name: &str| self.cgroup.controllers.contains_key(name);
        if self.landlock.abi < 1 {
            Some("Landlock")
        } else if !self.tools.tun {
            Some("/dev/net/tun")
        } else if !["cpu", "memory", "pids"].into_iter().all(has) {
            Some("cgroup controllers cpu, memory and pids")
        } else {
            None
        }
    }
}

/// Refuses any account but root at once, before anything is built: packages are installed, kernels registered and
/// jails built by root only.
///
/// # Errors
/// When this is another account.
pub fn need_root(task: &str) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "{task} needs root, to install packages and to build jails: sudo env \"PATH=$PATH\" cargo xtask {task}"
        );
    }
    Ok(())
}

impl Host {
    /// Asks `casemate doctor`.
    ///
    /// # Errors
    /// When it cannot be run or its report cannot be read.
    pub fn look(artifacts: &Artifacts) -> Result<Self> {
        let program = artifacts.program("casemate");
        let output = Command::new(&program)
            .args(["doctor", "--json"])
            .output()
            .with_context(|| format!("run {} doctor", program.display()))?;
        anyhow::ensure!(
            output.status.success(),
            "casemate doctor --json: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let report: Report = serde_json::from_slice(&output.stdout)
            .context("read what casemate doctor --json said")?;
        Ok(Self {
            mode: report.kvm.guest_mode,
            lacks: report.lacks(),
            kvm_error: report.kvm.error,
        })
    }

    /// Where the probe guest runs in a jail.
    pub fn for_probe(&self) -> Choice {
        self.choose(
            self.mode != GuestMode::Absent,
            "/dev/kvm runs the bare-metal probe at full speed",
        )
    }

    /// Where Linux guests run in a jail.
    pub fn for_linux(&self) -> Choice {
        self.choose(
            self.mode == GuestMode::Native,
            "/dev/kvm runs guest kernels natively",
        )
    }

    fn choose(&self, here: bool, why_here: &str) -> Choice {
        let (place, reason) = match (here, self.lacks) {
            (true, None) => (Where::Here, why_here.to_owned()),
            (true, Some(what)) => (Where::Lab, format!("this host has no {what}")),
            (false, _) => (Where::Lab, self.why_not()),
        };
        Choice { place, reason }
    }

    fn why_not(&self) -> String {
        match (self.mode, &self.kvm_error) {
            (GuestMode::Absent, Some(error)) => format!("/dev/kvm is not usable here ({error})"),
            (GuestMode::Absent, None) => "/dev/kvm is not usable here".to_owned(),
            _ => "/dev/kvm only interprets guest kernels here, about a thousand times slower"
                .to_owned(),
        }
    }
}

impl std::fmt::Display for Choice {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = match self.place {
            Where::Here => "on this host",
            Where::Lab => "in the lab (software emulation)",
        };
        write!(out, "{place}: {}", self.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(mode: GuestMode, lacks: Option<&'static str>) -> (Where, Where) {
        let host = Host {
            mode,
            kvm_error: None,
            lacks,
        };
        (host.for_probe().place, host.for_linux().place)
    }

    #[test]
    fn each_tier_goes_where_it_can_run() {
        let complete = |mode| places(mode, None);
        assert_eq!(complete(GuestMode::Native), (Where::Here, Where::Here));
        assert_eq!(complete(GuestMode::Emulated), (Where::Here, Where::Lab));
        assert_eq!(complete(GuestMode::Absent), (Where::Lab, Where::Lab));
        let without = places(GuestMode::Native, Some("Landlock"));
        assert_eq!(without, (Where::Lab, Where::Lab));
    }
}

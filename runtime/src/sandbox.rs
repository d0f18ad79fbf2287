//! The walls of a process of ours that reads what a guest wrote, entered before the first byte of it.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use caps::CapSet;
use casemate_broker::fdpass;
use casemate_seccomp_filters::{Role, Stage};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus,
    Scope,
};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

/// The newest Landlock that is known here; older kernels give what they have.
const LANDLOCK: ABI = ABI::V6;

/// Which walls they are.
#[derive(Debug)]
pub struct Walls {
    /// The user and group that the process changes to.
    pub uid: u32,
    /// What it may call.
    pub role: Role,
    /// Address space in bytes: many times what it needs.
    pub memory: u64,
    /// Go on where the host has no Landlock.
    pub allow_missing_landlock: bool,
}

/// Which wall could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call.
    #[error("{step}: {source}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: Errno,
    },
    /// Capabilities.
    #[error("drop capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// Landlock.
    #[error("Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// No Landlock at all.
    #[error(
        "monitor: this kernel has no Landlock: see `casemate doctor`, or give --allow-missing=landlock"
    )]
    NoLandlock,
    /// Seccomp.
    #[error("{0}")]
    Seccomp(#[from] casemate_seccomp_filters::Error),
}

fn step(step: &'static str) -> impl FnOnce(Errno) -> Error {
    move |source| Error::Step { step, source }
}

/// For the monitor: signals for a whole terminal's foreground group are for `run` to judge, not for the monitor.
pub fn hold_signals() -> Result<(), Error> {
    let mut held = SigSet::empty();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGQUIT,
        Signal::SIGHUP,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        // Or it would be stopped for setting the terminal back when `run` was killed and it is in the background.
        Signal::SIGTTOU,
    ] {
        held.add(signal);
    }
    held.thread_block().map_err(step("hold signals"))
}

/// Closes every descriptor that is neither a standard stream nor kept: some caller may have leaked one to us.
pub fn close_others(kept: &[&dyn AsFd]) {
    let kept: BTreeSet<RawFd> = kept.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
    let numbers: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|number| *number > 2 && !kept.contains(number))
        .collect();
    for number in numbers {
        // That of the listing itself is closed already, and thus not taken over.
        drop(fdpass::adopt(number));
    }
}

/// Becomes that user, without capabilities, file system, or any system call but those of its role.
pub fn enter(walls: &Walls) -> Result<(), Error> {
    // Beside its cgroup, which a host may lack: what it is made to allocate is not to be all of the host's memory.
    setrlimit(Resource::RLIMIT_AS, walls.memory, walls.memory).map_err(step("limit memory"))?;
    let (user, group) = (Uid::from_raw(walls.uid), Gid::from_raw(walls.uid));
    // The bounding set needs CAP_SETPCAP, so it goes first; leaving root then clears the other sets.
    caps::clear(None, CapSet::Bounding)?;
    setgroups(&[]).map_err(step("drop supplementary groups"))?;
    setresgid(group, group, group).map_err(step("change the group id"))?;
    setresuid(user, user, user).map_err(step("change the user id"))?;
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
    ] {
        caps::clear(None, set)?;
    }
    // Its memory holds what passes through: no core file, and no look into it for others of the same user.
    prctl::set_dumpable(false).map_err(step("forbid dumps"))?;
    prctl::set_no_new_privs().map_err(step("set no_new_privs"))?;

    let domain = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .restrict_self()?;
    if domain.ruleset == RulesetStatus::NotEnforced && !walls.allow_missing_landlock {
        return Err(Error::NoLandlock);
    }
    Ok(casemate_seccomp_filters::install(
        walls.role,
        Stage::Sealed,
    )?)
}

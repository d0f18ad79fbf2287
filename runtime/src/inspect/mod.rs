//! `casemate inspect --confinement`: what holds a machine, as the kernel tells it.
//!
//! Nothing here comes from the runtime's own records but where the machine's process tree begins: all else is read from
//! `/proc` and the cgroup trees now. Landlock shows in no such file.

mod cgroup;
mod process;
mod report;
mod verdict;

use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;

use crate::places::Places;
use crate::state;
pub use process::Process;
pub use verdict::Verdict;

/// Why the confinement could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such machine.
    #[error(transparent)]
    State(#[from] state::Error),
    /// It is not up yet, or has just ended.
    #[error("machine {0} has no VMM process (yet, or any more)")]
    NoProcess(String),
    /// A file of `/proc`.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The report could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// Where to.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// What a process of a machine is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs the guest.
    Vmm,
    /// The jailer's other half, which opens and connects for the VMM.
    Broker,
    /// Reads what the guest writes.
    Monitor,
}

/// A machine's confinement.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The machine.
    pub id: String,
    /// Its processes, the VMM first.
    pub processes: Vec<Process>,
    /// Its cgroups with their limits.
    pub cgroups: Vec<cgroup::Cgroup>,
    /// What follows from all that.
    pub verdicts: Vec<Verdict>,
}

impl Report {
    /// Reads the confinement of the machine whose jailer this is.
    pub fn collect(id: &str, uid: u32, jailer: u32) -> Result<Self, Error> {
        let found = process::find(uid, jailer);
        let mut processes = Vec::new();
        for (role, pid) in found {
            match Process::read(role, pid) {
                Ok(process) => processes.push(process),
                // The others may come and go; without a VMM there is nothing to report.
                Err(error) if role == Role::Vmm => return Err(error),
                Err(_) => {}
            }
        }
        processes.sort_by_key(|process| (process.role, process.pid));
        let Some(vmm) = processes
            .first()
            .filter(|process| process.role == Role::Vmm)
        else {
            return Err(Error::NoProcess(id.to_string()));
        };
        let cgroups = cgroup::of_process(vmm.pid)?;
        let verdicts = verdict::judge(&processes, &cgroups);
        Ok(Self {
            id: id.to_string(),
            processes,
            cgroups,
            verdicts,
        })
    }
}

/// Prints the confinement of a running machine.
pub fn run(id: &str, json: bool) -> Result<(), Error> {
    let places = Places::from_env();
    let record = state::find(&places, id)?;
    let none = || Error::NoProcess(id.to_string());
    let jailer = record
        .jailer
        .filter(|jailer| jailer.exists())
        .ok_or_else(none)?;
    let report = Report::collect(id, record.uid, jailer.pid)?;
    let text = if json {
        serde_json::to_string_pretty(&report).unwrap_or_default() + "\n"
    } else {
        report.to_string()
    };
    match io::stdout().write_all(text.as_bytes()) {
        Err(source) if source.kind() != io::ErrorKind::BrokenPipe => Err(Error::Write {
            path: "standard output".into(),
            source,
        }),
        _ => Ok(()),
    }
}

//! What follows from the facts: one line a wall.

use serde::Serialize;

use super::cgroup::Cgroup;
use super::{Process, Role};

/// One wall.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Whether it stands.
    pub holds: bool,
    /// What it is.
    pub wall: String,
    /// What is wrong with it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// Namespaces that a VMM must have of its own.
const OWN: [&str; 6] = ["cgroup", "ipc", "mnt", "net", "pid", "uts"];
/// Filters over each of the VMM's threads: that of its set-up, and that of its sealed state above it.
const SEALED: u32 = 2;

fn verdict(wall: impl Into<String>, wrong: Vec<String>) -> Verdict {
    Verdict {
        holds: wrong.is_empty(),
        wall: wall.into(),
        detail: wrong.join(", "),
    }
}

/// Judges the VMM, and what its helpers may do.
pub fn judge(processes: &[Process], cgroups: &[Cgroup]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for process in processes {
        let name = match process.role {
            Role::Vmm => "VMM",
            Role::Broker => "broker",
            Role::Monitor => "monitor",
        };
        threads(name, process, &mut verdicts);
        let root =
            process.uids.iter().chain(&process.gids).any(|id| *id == 0) || process.uids.is_empty();
        let wrong = if root {
            vec![format!("user {:?}, group {:?}", process.uids, process.gids)]
        } else {
            Vec::new()
        };
        verdicts.push(verdict(
            format!("{name}: a user and group of its own, not root"),
            wrong,
        ));
        if process.role == Role::Vmm {
            vmm(process, cgroups, &mut verdicts);
        }
    }
    verdicts
}

fn threads(name: &str, process: &Process, verdicts: &mut Vec<Verdict>) {
    let filters = if process.role == Role::Vmm { SEALED } else { 1 };
    let wrong = |is_wrong: &dyn Fn(&super::process::Thread) -> bool| {
        process
            .threads
            .iter()
            .filter(|thread| is_wrong(thread))
            .map(|thread| thread.name.clone())
            .collect::<Vec<_>>()
    };
    verdicts.push(verdict(
        format!("{name}: every thread sealed by seccomp"),
        wrong(&|thread| thread.seccomp_mode != 2 || thread.seccomp_filters < filters),
    ));
    verdicts.push(verdict(
        format!("{name}: no thread can gain privileges (no_new_privs)"),
        wrong(&|thread| !thread.no_new_privs),
    ));
    verdicts.push(verdict(
        format!("{name}: no capability in any set of any thread"),
        wrong(&|thread| !thread.capabilities.are_none()),
    ));
}

fn vmm(process: &Process, cgroups: &[Cgroup], verdicts: &mut Vec<Verdict>) {
    let shared = OWN
        .into_iter()
        .filter(|kind| process.namespaces.get(*kind) != Some(&true))
        .map(|kind| format!("{kind} is the host's"))
        .collect();
    verdicts.push(verdict("VMM: namespaces of its own", shared));

    let mut wrong = Vec::new();
    if !process.root.own {
        wrong.push("it is the host's".to_string());
    }
    if !process.root.entries.is_empty() {
        wrong.push(format!("it holds {}", process.root.entries.join(" ")));
    }
    let flags: Vec<&str> = process.root.mount_flags.split(',').collect();
    for flag in ["ro", "nosuid", "nodev", "noexec"] {
        if !flags.contains(&flag) {
            wrong.push(format!("not mounted {flag}"));
        }
    }
    verdicts.push(verdict("VMM: an empty root that cannot be written", wrong));

    let directories = process
        .descriptors
        .iter()
        .filter(|descriptor| descriptor.directory)
        .map(|descriptor| format!("{} is {}", descriptor.number, descriptor.what))
        .collect();
    verdicts.push(verdict("VMM: no descriptor of a directory", directories));

    let limited: Vec<&str> = cgroups.iter().flat_map(Cgroup::limited).collect();
    let missing = ["memory", "pids", "cpu"]
        .into_iter()
        .filter(|controller| !limited.contains(controller))
        .map(|controller| format!("no limit of {controller}"))
        .collect();
    verdicts.push(verdict(
        "VMM: limits of memory, tasks and processor time",
        missing,
    ));
}

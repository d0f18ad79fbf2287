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
/// Those that its broker is in, too.
const SHARED: [&str; 5] = ["cgroup", "ipc", "mnt", "net", "uts"];
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
        match process.role {
            Role::Vmm => {
                walls(name, process, &OWN, &mut verdicts);
                let held = directories(process);
                verdicts.push(verdict("VMM: no descriptor of a directory", held));
                limits(cgroups, &mut verdicts);
            }
            // Outside the VMM's PID namespace, as its first process's parent; it holds the directories that it opens in.
            Role::Broker => walls(name, process, &SHARED, &mut verdicts),
            Role::Monitor => {}
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

fn walls(name: &str, process: &Process, own: &[&str], verdicts: &mut Vec<Verdict>) {
    let shared = own
        .iter()
        .filter(|kind| process.namespaces.get(**kind) != Some(&true))
        .map(|kind| format!("{kind} is the host's"))
        .collect();
    verdicts.push(verdict(format!("{name}: namespaces of its own"), shared));

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
    verdicts.push(verdict(
        format!("{name}: an empty root that cannot be written"),
        wrong,
    ));
}

fn directories(process: &Process) -> Vec<String> {
    process
        .descriptors
        .iter()
        .filter(|descriptor| descriptor.directory)
        .map(|descriptor| format!("{} is {}", descriptor.number, descriptor.what))
        .collect()
}

fn limits(cgroups: &[Cgroup], verdicts: &mut Vec<Verdict>) {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::process::{Capabilities, Descriptor, Root, Thread};
    use super::*;

    /// A process behind every wall that its role has.
    fn process(role: Role) -> Process {
        let own = |kind: &str| role == Role::Vmm || kind != "pid";
        Process {
            role,
            pid: 7,
            uids: vec![900_000; 4],
            gids: vec![900_000; 4],
            groups: Vec::new(),
            uid_map: String::new(),
            gid_map: String::new(),
            threads: vec![Thread {
                tid: 7,
                name: "it".into(),
                seccomp_mode: 2,
                seccomp_filters: if role == Role::Vmm { 2 } else { 1 },
                no_new_privs: true,
                capabilities: Capabilities::default(),
            }],
            namespaces: OWN.iter().map(|kind| ((*kind).into(), own(kind))).collect(),
            root: Root {
                own: true,
                entries: Vec::new(),
                mount_flags: "ro,nosuid,nodev,noexec,relatime".into(),
                fs_type: "tmpfs".into(),
                mounts: 1,
            },
            descriptors: Vec::new(),
            limits: BTreeMap::new(),
        }
    }

    fn cgroup() -> Cgroup {
        let limits = [("memory.max", "1"), ("pids.max", "1"), ("cpu.max", "1 1")];
        Cgroup {
            version: 2,
            controllers: String::new(),
            path: "/casemate/x".into(),
            limits: limits.map(|(file, value)| (file, value.into())).into(),
        }
    }

    /// The walls that do not hold.
    fn broken(process: Process, cgroup: Cgroup) -> Vec<String> {
        let verdicts = judge(&[process], &[cgroup]);
        let broken = verdicts.into_iter().filter(|verdict| !verdict.holds);
        broken.map(|verdict| verdict.wall).collect()
    }

    type Break = fn(&mut Process);

    #[test]
    fn each_broken_wall_is_called_broken_and_no_other() {
        let all: [(&str, Break); 8] = [
            ("seccomp", |process| process.threads[0].seccomp_mode = 0),
            ("seccomp", |process| process.threads[0].seccomp_filters -= 1),
            ("no_new_privs", |process| {
                process.threads[0].no_new_privs = false
            }),
            ("capability", |process| {
                process.threads[0].capabilities.effective = 1
            }),
            ("capability", |process| {
                process.threads[0].capabilities.bounding = 1
            }),
            ("not root", |process| process.uids[1] = 0),
            ("not root", |process| process.gids[2] = 0),
            ("not root", |process| process.uids.clear()),
        ];
        let jailed: [(&str, Break); 7] = [
            ("namespaces", |process| {
                let _ = process.namespaces.insert("net".into(), false);
            }),
            ("namespaces", |process| {
                let _ = process.namespaces.remove("mnt");
            }),
            ("root", |process| process.root.own = false),
            ("root", |process| process.root.entries.push("etc".into())),
            ("root", |process| {
                process.root.mount_flags = "rw,nosuid,nodev,noexec".into()
            }),
            ("root", |process| {
                process.root.mount_flags = "ro,nodev,noexec".into()
            }),
            ("root", |process| process.root.mount_flags.clear()),
        ];
        for role in [Role::Vmm, Role::Broker, Role::Monitor] {
            assert_eq!(broken(process(role), cgroup()), Vec::<String>::new());
            let cases = all.iter().chain(if role == Role::Monitor {
                &[][..]
            } else {
                &jailed
            });
            for (wall, breaks) in cases {
                let mut process = process(role);
                breaks(&mut process);
                let broken = broken(process, cgroup());
                assert!(
                    broken.len() == 1 && broken[0].contains(wall),
                    "{wall}: {broken:?}"
                );
            }
        }
    }

    #[test]
    fn what_only_the_vmm_has() {
        let mut leaky = process(Role::Vmm);
        leaky.descriptors.push(Descriptor {
            number: 5,
            what: "/etc".into(),
            access: "r",
            directory: true,
        });
        assert_eq!(
            broken(leaky, cgroup()),
            ["VMM: no descriptor of a directory"]
        );
        let mut unconfined = process(Role::Vmm);
        unconfined.namespaces.insert("pid".into(), false);
        assert_eq!(broken(unconfined, cgroup()), ["VMM: namespaces of its own"]);
        for (file, none) in [
            ("memory.max", "max"),
            ("pids.max", "max"),
            ("cpu.max", "max 1"),
        ] {
            let mut cgroup = cgroup();
            cgroup.limits.insert(file, none.into());
            let broken = broken(process(Role::Vmm), cgroup);
            assert_eq!(broken, ["VMM: limits of memory, tasks and processor time"]);
        }
    }
}

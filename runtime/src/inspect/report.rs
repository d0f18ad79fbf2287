//! The report as text.

use std::fmt;

use super::process::{Capabilities, Process};
use super::{Report, Role};

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "Confinement of machine {}, as the kernel reports it",
            self.id
        )?;
        for process in &self.processes {
            write_process(out, process)?;
        }
        writeln!(out, "\nCgroups of the VMM")?;
        for cgroup in &self.cgroups {
            let kind = if cgroup.version == 2 {
                "v2".to_string()
            } else {
                format!("v1 {}", cgroup.controllers)
            };
            let limits: Vec<String> = cgroup
                .limits
                .iter()
                .map(|(file, value)| format!("{file}={value}"))
                .collect();
            writeln!(out, "  {kind:<16} {}  {}", cgroup.path, limits.join("  "))?;
        }
        writeln!(
            out,
            "\nVerdict (Landlock shows in no file of the kernel: tests prove it)"
        )?;
        for verdict in &self.verdicts {
            let mark = if verdict.holds { "holds  " } else { "MISSING" };
            write!(out, "  {mark}  {}", verdict.wall)?;
            if !verdict.detail.is_empty() {
                write!(out, ": {}", verdict.detail)?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

fn write_process(out: &mut fmt::Formatter<'_>, process: &Process) -> fmt::Result {
    let role = match process.role {
        Role::Vmm => "VMM",
        Role::Broker => "Broker (the jailer's other half)",
        Role::Monitor => "Monitor (reads what the guest writes)",
    };
    writeln!(out, "\n{role}: process {}", process.pid)?;
    writeln!(
        out,
        "  {:<8} {:<16} {:<8} {:>7}  {:<12} capabilities",
        "thread", "name", "seccomp", "filters", "no_new_privs"
    )?;
    for thread in &process.threads {
        let mode = match thread.seccomp_mode {
            0 => "none",
            1 => "strict",
            _ => "filter",
        };
        writeln!(
            out,
            "  {:<8} {:<16} {mode:<8} {:>7}  {:<12} {}",
            thread.tid,
            thread.name,
            thread.seccomp_filters,
            if thread.no_new_privs { "yes" } else { "NO" },
            Sets(&thread.capabilities),
        )?;
    }
    let plain = |ids: &[u32]| {
        ids.iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(" ")
    };
    let groups = if process.groups.is_empty() {
        "none".to_string()
    } else {
        plain(&process.groups)
    };
    writeln!(
        out,
        "  user       {} (real, effective, saved, file system); map {}",
        plain(&process.uids),
        process.uid_map
    )?;
    writeln!(
        out,
        "  group      {}; map {}; supplementary {groups}",
        plain(&process.gids),
        process.gid_map
    )?;
    let kinds = |own| {
        let names: Vec<&str> = process
            .namespaces
            .iter()
            .filter(|(_, differs)| **differs == own)
            .map(|(kind, _)| kind.as_str())
            .collect();
        if names.is_empty() {
            "none".to_string()
        } else {
            names.join(" ")
        }
    };
    writeln!(
        out,
        "  namespaces own: {}; the host's: {}",
        kinds(true),
        kinds(false)
    )?;
    let root = &process.root;
    let entries = if root.entries.is_empty() {
        "empty".to_string()
    } else {
        format!("holds {} ...", root.entries.join(" "))
    };
    writeln!(
        out,
        "  root       {}, {entries}; {} ({}); {} mount(s) in sight",
        if root.own { "its own" } else { "the host's" },
        root.mount_flags,
        root.fs_type,
        root.mounts
    )?;
    let limits: Vec<String> = process
        .limits
        .iter()
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    writeln!(out, "  limits     {}", limits.join(", "))?;
    writeln!(out, "  descriptors")?;
    for descriptor in &process.descriptors {
        writeln!(
            out,
            "    {:>3} {:<4} {}",
            descriptor.number, descriptor.access, descriptor.what
        )?;
    }
    Ok(())
}

struct Sets<'a>(&'a Capabilities);

impl fmt::Display for Sets<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sets = self.0;
        if sets.are_none() {
            return out.write_str("none in all five sets");
        }
        write!(
            out,
            "inh={:x} prm={:x} eff={:x} bnd={:x} amb={:x}",
            sets.inheritable, sets.permitted, sets.effective, sets.bounding, sets.ambient
        )
    }
}

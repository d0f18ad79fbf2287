//! Walls that the kernel builds: Landlock, seccomp, namespaces, cgroups.

use landlock::{ABI, Access, AccessFs, LandlockStatus, Ruleset, RulesetAttr};
use serde::Serialize;

use super::host::Root;
use super::{Finding, Level};
use crate::cgroups::{Hierarchies, Layout};

/// What was found out about Landlock.
#[derive(Debug, Serialize)]
pub struct LandlockFacts {
    /// The kernel's ABI version; 0 is none.
    abi: i32,
}

/// What was found out about cgroups.
#[derive(Debug, Serialize)]
pub struct CgroupFacts {
    layout: Layout,
    /// The controllers that limit a machine, with the version that they are in.
    controllers: std::collections::BTreeMap<&'static str, u8>,
}

/// The ABI version, found by entering a domain in a thread that then ends.
pub fn landlock(findings: &mut Vec<Finding>) -> LandlockFacts {
    let status = std::thread::spawn(|| {
        let ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(ABI::V1))
            .ok()?;
        Some(ruleset.create().ok()?.restrict_self().ok()?.landlock)
    })
    .join()
    .ok()
    .flatten();
    let abi = match status {
        Some(LandlockStatus::Available {
            effective_abi,
            kernel_abi,
        }) => kernel_abi.unwrap_or(effective_abi as i32),
        _ => 0,
    };
    let meaning = "The VMM and the broker can be kept from the file system whatever else fails.";
    findings.push(match abi {
        ..=0 => Finding::new(
            "Landlock",
            Level::Bad,
            if status == Some(LandlockStatus::NotEnabled) { "not enabled" } else { "not in this kernel" },
            "One of the walls is missing: machines start only with --allow-missing=landlock.",
        )
        .mend("Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK, and `landlock` in the kernel's lsm= list"),
        1..=3 => Finding::new("Landlock", Level::Note, format!("ABI {abi}"), meaning)
            .mend("Linux 6.7 or later (ABI 4) also governs TCP; nothing needs it, since seccomp forbids sockets"),
        _ => Finding::new("Landlock", Level::Good, format!("ABI {abi}"), meaning),
    });
    LandlockFacts { abi }
}

/// Seccomp with filters.
pub fn seccomp(root: &Root, findings: &mut Vec<Finding>) -> bool {
    let actions = root
        .read("/proc/sys/kernel/seccomp/actions_avail")
        .unwrap_or_default();
    let usable = actions.split_whitespace().any(|action| action == "trap");
    findings.push(if usable {
        Finding::new(
            "seccomp",
            Level::Good,
            "filters available",
            "Each thread gets its own list of system calls.",
        )
    } else {
        Finding::new(
            "seccomp",
            Level::Bad,
            "no filters",
            "A wall is missing: machines do not start.",
        )
        .mend("a kernel with CONFIG_SECCOMP_FILTER")
    });
    usable
}

/// Kinds of namespaces.
pub fn namespaces(root: &Root, findings: &mut Vec<Finding>) -> Vec<String> {
    let kinds = root.list("/proc/self/ns");
    let missing: Vec<&str> = ["cgroup", "ipc", "mnt", "net", "pid", "uts"]
        .into_iter()
        .filter(|kind| !kinds.iter().any(|name| name == kind))
        .collect();
    findings.push(if missing.is_empty() {
        Finding::new(
            "namespaces",
            Level::Good,
            "all that a jail uses",
            "The VMM sees nothing of the host.",
        )
    } else {
        Finding::new(
            "namespaces",
            Level::Bad,
            format!("missing: {}", missing.join(", ")),
            "The jailer refuses to start a machine.",
        )
        .mend("a kernel with CONFIG_NAMESPACES and its children")
    });
    let user = root.read("/proc/sys/user/max_user_namespaces");
    findings.push(
        match (kinds.iter().any(|name| name == "user"), user.as_deref()) {
            (true, Some("0")) | (false, _) => Finding::new(
                "user namespaces",
                Level::Note,
                "not available",
                "Not needed by machines that root starts.",
            )
            .mend("if other programs need them: a kernel with CONFIG_USER_NS, and user.max_user_namespaces above 0"),
            _ => Finding::new(
                "user namespaces",
                Level::Good,
                "available",
                "Not needed by machines that root starts.",
            ),
        },
    );
    kinds
}

/// Hierarchies and their controllers.
pub fn cgroup(root: &Root, findings: &mut Vec<Finding>) -> CgroupFacts {
    let hierarchies = Hierarchies::read(&root.path("/"));
    let layout = hierarchies.layout();
    let controllers: std::collections::BTreeMap<_, _> = ["cpu", "memory", "pids"]
        .into_iter()
        .filter_map(|name| Some((name, hierarchies.version_of(name)?)))
        .collect();
    let listed = controllers
        .iter()
        .map(|(name, version)| format!("{name} (v{version})"))
        .collect::<Vec<_>>()
        .join(", ");
    let found = match layout {
        Layout::V2 => format!("v2: {listed}"),
        Layout::V1 => format!("v1: {listed}"),
        Layout::Hybrid => format!("hybrid: {listed}"),
        Layout::Absent => "none mounted".to_string(),
    };
    findings.push(if controllers.len() == 3 {
        let level = if layout == Layout::V2 { Level::Good } else { Level::Note };
        let finding = Finding::new("cgroups", level, found, "Memory, tasks and processor time of a machine are limited.");
        if layout == Layout::V2 {
            finding
        } else {
            finding.mend("v2 alone is better kept: systemd.unified_cgroup_hierarchy=1 on the kernel's command line")
        }
    } else {
        Finding::new("cgroups", Level::Bad, found, "Some of a machine's memory, tasks and processor time are not limited.")
            .mend("mount cgroup v2 on /sys/fs/cgroup with the controllers cpu, memory and pids")
    });
    CgroupFacts {
        layout,
        controllers,
    }
}

/// userfaultfd, for restoring machines page by page.
pub fn userfaultfd(root: &Root, findings: &mut Vec<Finding>) -> bool {
    let device = root.exists("/dev/userfaultfd");
    let call = root.exists("/proc/sys/vm/unprivileged_userfaultfd");
    findings.push(match (device, call) {
        (true, _) => Finding::new(
            "userfaultfd",
            Level::Good,
            "/dev/userfaultfd",
            "A machine can be restored page by page, without privileges in the VMM.",
        ),
        (false, true) => Finding::new(
            "userfaultfd",
            Level::Note,
            "system call only",
            "Restoring page by page would need a privileged VMM.",
        )
        .mend("Linux 6.1 or later has /dev/userfaultfd"),
        (false, false) => Finding::new(
            "userfaultfd",
            Level::Note,
            "absent",
            "No restoring page by page.",
        )
        .mend("a kernel with CONFIG_USERFAULTFD"),
    });
    device || call
}

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

/// userfaultfd, for restoring machines page by page: whether this user can make one for KVM's faults, too.
pub fn userfaultfd(root: &Root, findings: &mut Vec<Finding>) -> bool {
    const FILES_ONLY: &str =
        "Snapshots are restored from files alone (`backend_type` File), not by a page handler.";
    let device = "/dev/userfaultfd";
    let mut open = std::fs::OpenOptions::new();
    let usable = open.read(true).write(true).open(root.path(device)).is_ok();
    let call = root.exists("/proc/sys/vm/unprivileged_userfaultfd");
    let less = |found: &str| Finding::new("userfaultfd", Level::Note, found, FILES_ONLY);
    findings.push(match (usable, root.exists(device), call) {
        (true, ..) => Finding::new(
            "userfaultfd",
            Level::Good,
            device,
            "A restored machine's memory can come page by page from a page handler (`backend_type` Uffd).",
        ),
        (false, true, _) => less("/dev/userfaultfd is not this user's to open")
            .mend("run as root, or let a group open it (a udev rule)"),
        (false, false, true) => less("the system call, and no /dev/userfaultfd")
            .mend("Linux 6.1 or later has /dev/userfaultfd"),
        (false, false, false) => less("absent").mend("a kernel with CONFIG_USERFAULTFD"),
    });
    usable
}

//! Namespaces: what the VMM sees of the host's networks, mounts, IPC objects, names and cgroups.

use nix::sched::{CloneFlags, unshare};

use crate::error::{Context, Result};

/// Enters new network, mount, IPC, UTS and cgroup namespaces.
///
/// The network one has nothing but a loopback interface that is down; the cgroup one begins at the
/// machine's own cgroup.
///
/// # Errors
/// What `unshare(2)` says.
pub fn enter_new() -> Result<()> {
    let flags = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(flags).doing(
        "enter",
        "new network, mount, IPC, UTS and cgroup namespaces",
    )
}

/// Makes the next child the first process of a new PID namespace.
///
/// # Errors
/// What `unshare(2)` says.
pub fn new_pid_for_children() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWPID).doing("make", "a new PID namespace")
}

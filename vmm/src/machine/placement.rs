//! Where on the host the machine is: nodes for its memory, CPUs for its vCPU threads. All of it is decided
//! before the threads are sealed.

use std::io;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use thiserror::Error;

use crate::boot::NumaNodeInfo;
use crate::config::MachineConfig;
use crate::memory::{GuestMemory, numa};

/// Why the machine is not where it should be.
#[derive(Debug, Error)]
pub enum Error {
    /// Memory.
    #[error(transparent)]
    Memory(#[from] numa::Error),
    /// A thread.
    #[error(
        "cannot let vCPU {vcpu} run on CPUs {cpus:?} of the host (sched_setaffinity): {source}; \
         /sys/devices/system/cpu/online names those there are, and a cgroup's `cpuset.cpus` may leave some out \
         (`machine-config.numa_nodes[].host_cpus`)"
    )]
    Cpus {
        /// The vCPU.
        vcpu: u8,
        /// Where it should run.
        cpus: Vec<u16>,
        /// What the host said.
        source: io::Error,
    },
}

/// The nodes as the guest is told of them.
pub(super) fn nodes(machine: &MachineConfig) -> Vec<NumaNodeInfo> {
    let nodes = &machine.numa_nodes;
    // Bounded by the memory's size, which has been checked.
    let sizes = nodes
        .iter()
        .map(|node| node.mem_size_mib.saturating_mul(1 << 20));
    let memory = numa::ranges(&sizes.collect::<Vec<u64>>());
    let node = |((number, node), memory): ((usize, &crate::config::NumaNode), _)| NumaNodeInfo {
        cpus: node.cpus.clone(),
        memory,
        distances: node.distances(number, nodes.len()),
    };
    nodes.iter().enumerate().zip(memory).map(node).collect()
}

/// Takes each node's memory from the node of the host that the config names. To be called before the memory is
/// touched.
pub(super) fn bind_memory(memory: &GuestMemory, machine: &MachineConfig) -> Result<(), Error> {
    for (node, guest) in machine.numa_nodes.iter().zip(nodes(machine)) {
        if let Some(host_node) = node.host_node {
            numa::bind(memory, &guest.memory, host_node)?;
        }
    }
    Ok(())
}

/// The CPUs of the host for each vCPU: all of them where this is empty.
pub(super) fn host_cpus(machine: &MachineConfig) -> Vec<Vec<u16>> {
    let of_vcpu = |id| {
        let mut nodes = machine.numa_nodes.iter();
        let node = nodes.find(|node| node.cpus.contains(&id));
        node.map(|node| node.host_cpus.clone()).unwrap_or_default()
    };
    (0..machine.max_vcpus()).map(of_vcpu).collect()
}

/// The node of each vCPU; the first for one that is in none.
pub(super) fn nodes_of_vcpus(machine: &MachineConfig) -> Vec<u8> {
    let of_vcpu = |id| {
        let mut nodes = machine.numa_nodes.iter();
        let node = nodes.position(|node| node.cpus.contains(&id));
        u8::try_from(node.unwrap_or(0)).unwrap_or(u8::MAX)
    };
    (0..machine.max_vcpus()).map(of_vcpu).collect()
}

/// Does `start`, which starts the thread of `vcpu`, while this thread may run on `cpus` alone: a new thread
/// inherits that, and cannot change it once it is sealed.
pub(super) fn on_cpus<T>(vcpu: u8, cpus: &[u16], start: impl FnOnce() -> T) -> Result<T, Error> {
    if cpus.is_empty() {
        return Ok(start());
    }
    let failed = |errno: Errno| Error::Cpus {
        vcpu,
        cpus: cpus.to_vec(),
        source: errno.into(),
    };
    let this_thread = Pid::from_raw(0);
    let before = sched_getaffinity(this_thread).map_err(failed)?;
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(usize::from(*cpu)).map_err(failed)?;
    }
    sched_setaffinity(this_thread, &set).map_err(failed)?;
    let started = start();
    sched_setaffinity(this_thread, &before).map_err(failed)?;
    Ok(started)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(nodes: &str) -> MachineConfig {
        let text = format!(
            r#"{{"vcpu_count":1,"max_vcpu_count":3,"mem_size_mib":6144,"numa_nodes":{nodes}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn the_guest_is_told_what_the_config_says() {
        let machine = machine(
            r#"[{"cpus":[0,2],"mem_size_mib":1024,"host_cpus":[3,5]},{"cpus":[1],"mem_size_mib":5120}]"#,
        );
        let nodes = nodes(&machine);
        assert_eq!(nodes[0].cpus, [0, 2]);
        assert_eq!(nodes[0].memory, [(0, 1 << 30)]);
        assert_eq!(nodes[1].memory, [(1 << 30, 2 << 30), (4 << 30, 3 << 30)]);
        assert_eq!(
            (&nodes[0].distances[..], &nodes[1].distances[..]),
            (&[10, 20][..], &[20, 10][..])
        );
        assert_eq!(host_cpus(&machine), [vec![3, 5], vec![], vec![3, 5]]);
        assert_eq!(nodes_of_vcpus(&machine), [0, 1, 0]);
        let plain = MachineConfig::default();
        assert_eq!(host_cpus(&plain), [Vec::<u16>::new()]);
        assert!(super::nodes(&plain).is_empty());
    }

    #[test]
    fn a_new_thread_has_the_cpus_and_this_one_has_its_own_again() {
        let this = Pid::from_raw(0);
        let before = sched_getaffinity(this).unwrap();
        let first = (0..CpuSet::count())
            .find(|cpu| before.is_set(*cpu).unwrap())
            .unwrap();
        let thread = on_cpus(1, &[u16::try_from(first).unwrap()], || {
            std::thread::spawn(move || sched_getaffinity(this).unwrap())
        });
        let inside = thread.unwrap().join().unwrap();
        let mut expected = CpuSet::new();
        expected.set(first).unwrap();
        assert_eq!(inside, expected);
        assert_eq!(sched_getaffinity(this).unwrap(), before);
    }

    #[test]
    fn a_cpu_that_the_host_has_not_is_named() {
        for cpu in [1023, 1024, u16::MAX] {
            let error = on_cpus(2, &[cpu], || panic!("started"))
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(&format!("vCPU 2 run on CPUs [{cpu}]")),
                "{error}"
            );
        }
    }
}

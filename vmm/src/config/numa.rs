//! `machine-config.numa_nodes`, a field of ours: the guest's nodes, and where on the host they are.

use serde::{Deserialize, Serialize};

use super::{Error, range};

/// Most nodes of a guest.
pub const MAX_NODES: usize = 16;
/// Host nodes and host CPUs have smaller numbers than this (Linux: `MAX_NUMNODES`, glibc: `CPU_SETSIZE`).
pub const MAX_HOST_NUMBER: u16 = 1024;
/// How far a node is from itself (ACPI 6.5, section 5.2.17).
pub const LOCAL_DISTANCE: u8 = 10;
/// How far it is from others, unless the config says so.
pub const REMOTE_DISTANCE: u8 = 20;

/// A node of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NumaNode {
    /// Its vCPUs. Every vCPU that there can be is in one node; a node may have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<u8>,
    /// Its memory in MiB. All nodes together have `machine-config.mem_size_mib`.
    pub mem_size_mib: u64,
    /// The host's node that its memory is taken from; without it, from where Linux likes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_node: Option<u16>,
    /// The host's CPUs that the threads of its vCPUs run on; without it, on all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_cpus: Vec<u16>,
    /// How far its CPUs are from each node's memory: 10 for its own, 11 to 254 for others. Either all nodes
    /// say it or none; then it is 20.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub distances: Vec<u8>,
}

impl NumaNode {
    /// How far it, which has number `own`, is from each of `count` nodes.
    pub fn distances(&self, own: usize, count: usize) -> Vec<u8> {
        if !self.distances.is_empty() {
            return self.distances.clone();
        }
        let distance = |other| match other == own {
            true => LOCAL_DISTANCE,
            false => REMOTE_DISTANCE,
        };
        (0..count).map(distance).collect()
    }
}

/// Checks the nodes of a machine with so many vCPUs at most, and so much memory. No node is right too.
pub(super) fn check(nodes: &[NumaNode], vcpus: u8, mem_size_mib: u64) -> Result<(), Error> {
    if nodes.is_empty() {
        return Ok(());
    }
    if nodes.len() > MAX_NODES {
        return range(
            "machine-config.numa_nodes",
            format_args!("{} nodes", nodes.len()),
            "use 16 at most",
        );
    }
    for node in nodes {
        if node.mem_size_mib == 0 {
            return range(
                "machine-config.numa_nodes[].mem_size_mib",
                0,
                "use 1 or more (MiB)",
            );
        }
        check_host(node)?;
    }
    check_vcpus(nodes, vcpus)?;
    check_distances(nodes)?;
    let sum = nodes
        .iter()
        .fold(0_u64, |sum, node| sum.saturating_add(node.mem_size_mib));
    if sum != mem_size_mib {
        return range(
            "machine-config.numa_nodes[].mem_size_mib",
            format_args!("{sum} MiB together"),
            "all nodes together must have `machine-config.mem_size_mib`",
        );
    }
    Ok(())
}

fn check_host(node: &NumaNode) -> Result<(), Error> {
    if let Some(number) = node.host_node.filter(|number| *number >= MAX_HOST_NUMBER) {
        return range(
            "machine-config.numa_nodes[].host_node",
            number,
            "use 0 to 1023",
        );
    }
    let mut numbers = node.host_cpus.iter();
    match numbers.find(|number| **number >= MAX_HOST_NUMBER) {
        Some(number) => range(
            "machine-config.numa_nodes[].host_cpus",
            number,
            "use 0 to 1023",
        ),
        None => Ok(()),
    }
}

fn check_vcpus(nodes: &[NumaNode], vcpus: u8) -> Result<(), Error> {
    let field = "machine-config.numa_nodes[].cpus";
    let mut named: Vec<u8> = nodes.iter().flat_map(|node| &node.cpus).copied().collect();
    named.sort_unstable();
    for (expected, found) in (0..vcpus).zip(&named) {
        if *found < expected {
            return range(field, found, "name each vCPU once");
        }
    }
    if let Some(beyond) = named.iter().find(|cpu| **cpu >= vcpus) {
        return range(
            field,
            beyond,
            "vCPUs are numbered from 0 to `max_vcpu_count` - 1, or `vcpu_count` - 1",
        );
    }
    let missing = (0..vcpus).find(|cpu| named.binary_search(cpu).is_err());
    match missing {
        Some(cpu) => range(
            field,
            format_args!("without vCPU {cpu}"),
            "put every vCPU that there can be into a node",
        ),
        None if named.len() > vcpus.into() => {
            range(field, format_args!("{named:?}"), "name each vCPU once")
        }
        None => Ok(()),
    }
}

fn check_distances(nodes: &[NumaNode]) -> Result<(), Error> {
    if nodes.iter().all(|node| node.distances.is_empty()) {
        return Ok(());
    }
    for (own, node) in nodes.iter().enumerate() {
        let fits = |(other, distance): (usize, &u8)| match other == own {
            true => *distance == LOCAL_DISTANCE,
            false => (LOCAL_DISTANCE.saturating_add(1)..=254).contains(distance),
        };
        let right = node.distances.iter().enumerate().all(fits);
        if node.distances.len() != nodes.len() || !right {
            return range(
                "machine-config.numa_nodes[].distances",
                format_args!("{:?} for node {own}", node.distances),
                "use a number for each node, in all nodes or in none: 10 for itself, 11 to 254 for others",
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(text: &str) -> Vec<NumaNode> {
        serde_json::from_str(text).unwrap()
    }

    #[track_caller]
    fn refused(text: &str, words: &str) {
        let error = check(&nodes(text), 4, 256).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn two_nodes_are_read() {
        let text = r#"[
            {"cpus": [0, 2], "mem_size_mib": 64, "host_node": 1, "host_cpus": [0, 1023], "distances": [10, 254]},
            {"cpus": [3, 1], "mem_size_mib": 192, "distances": [11, 10]}]"#;
        let nodes = nodes(text);
        check(&nodes, 4, 256).unwrap();
        assert_eq!((nodes[0].host_node, nodes[1].host_node), (Some(1), None));
        assert_eq!(nodes[1].distances(1, 2), [11, 10]);
        let again: serde_json::Value = serde_json::to_value(&nodes).unwrap();
        assert_eq!(
            again,
            serde_json::from_str::<serde_json::Value>(text).unwrap()
        );
        check(&[], 4, 256).unwrap();
    }

    #[test]
    fn distances_have_defaults() {
        let plain = NumaNode::default();
        assert_eq!(plain.distances(1, 3), [20, 10, 20]);
    }

    #[test]
    fn a_node_may_have_no_cpu_but_must_have_memory() {
        let with = |size| {
            format!(r#"[{{"cpus":[0,1,2,3],"mem_size_mib":156}},{{"mem_size_mib":{size}}}]"#)
        };
        check(&nodes(&with(100)), 4, 256).unwrap();
        refused(&with(0), "mem_size_mib` is 0");
        refused(&with(101), "257 MiB together");
        refused(&with(u64::MAX), "together");
    }

    #[test]
    fn each_vcpu_is_in_one_node() {
        let with = |first, second| {
            format!(
                r#"[{{"cpus":[{first}],"mem_size_mib":128}},{{"cpus":[{second}],"mem_size_mib":128}}]"#
            )
        };
        refused(&with("0,1", "1,2,3"), "name each vCPU once");
        refused(&with("0,1,2,3", "3"), "name each vCPU once");
        refused(&with("0,1", "2"), "without vCPU 3");
        refused(&with("0,1", "2,3,4"), "is 4: vCPUs are numbered from 0");
        refused(&with("0,1,2", "255"), "is 255: vCPUs are numbered");
        refused(&with("", ""), "without vCPU 0");
    }

    #[test]
    fn distances_are_a_matrix() {
        let with = |first, second| {
            format!(
                r#"[{{"cpus":[0,1],"mem_size_mib":128,"distances":[{first}]}},
                    {{"cpus":[2,3],"mem_size_mib":128,"distances":[{second}]}}]"#
            )
        };
        check(&nodes(&with("10,11", "30,10")), 4, 256).unwrap();
        for (first, second) in [
            ("10,20", ""),
            ("10", "20,10"),
            ("10,20,20", "20,10,20"),
            ("11,20", "20,10"),
            ("10,10", "20,10"),
            ("10,255", "20,10"),
            ("10,9", "20,10"),
        ] {
            refused(&with(first, second), "distances");
        }
    }

    #[test]
    fn numbers_of_the_host_are_bounded() {
        let with = |extra| format!(r#"[{{"cpus":[0,1,2,3],"mem_size_mib":256,{extra}}}]"#);
        check(&nodes(&with(r#""host_node":1023"#)), 4, 256).unwrap();
        refused(&with(r#""host_node":1024"#), "host_node` is 1024");
        refused(&with(r#""host_cpus":[0,1024]"#), "host_cpus` is 1024");
        let many = format!("[{}]", [r#"{"mem_size_mib":1}"#; 17].join(","));
        refused(&many, "17 nodes");
        let unknown = r#"[{"mem_size_mib":1,"host_cpu":[1]}]"#;
        assert!(serde_json::from_str::<Vec<NumaNode>>(unknown).is_err());
    }
}

//! Which CPUs and which memory are near each other: SRAT and SLIT (ACPI 6.5, sections 5.2.16 and 5.2.17).

use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::boot::{MachineDescription, NumaNodeInfo};

const HEADER_SIZE: u32 = 36;
const SRAT_REVISION: u8 = 3;
const SLIT_REVISION: u8 = 1;
/// Entries of the SRAT.
const LOCAL_APIC: u8 = 0;
const MEMORY: u8 = 1;
/// The entry is to be used.
const ENABLED: u32 = 1;

/// Both tables; none for a machine without nodes.
pub(super) fn tables(machine: &MachineDescription) -> Vec<Vec<u8>> {
    if machine.numa_nodes.is_empty() {
        return Vec::new();
    }
    vec![
        affinity(&machine.numa_nodes),
        distances(&machine.numa_nodes),
    ]
}

/// The node of vCPU `id`.
pub(super) fn node_of_vcpu(machine: &MachineDescription, id: u8) -> Option<usize> {
    let mut nodes = machine.numa_nodes.iter();
    nodes.position(|node| node.cpus.contains(&id))
}

fn table(signature: [u8; 4], revision: u8) -> Sdt {
    let (table, oem_revision) = (OEM_TABLE_ID, OEM_REVISION);
    Sdt::new(
        signature,
        HEADER_SIZE,
        revision,
        OEM_ID,
        table,
        oem_revision,
    )
}

fn affinity(nodes: &[NumaNodeInfo]) -> Vec<u8> {
    let mut srat = table(*b"SRAT", SRAT_REVISION);
    // Reserved; the first word is 1 since ever.
    srat.append_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for (number, node) in (0_u32..).zip(nodes) {
        let [low, high @ ..] = number.to_le_bytes();
        for id in &node.cpus {
            let mut entry = vec![LOCAL_APIC, 16, low, *id];
            entry.extend(ENABLED.to_le_bytes());
            entry.push(0);
            entry.extend(high);
            entry.extend([0; 4]);
            srat.append_slice(&entry);
        }
        for (start, size) in &node.memory {
            let mut entry = vec![MEMORY, 40];
            entry.extend(number.to_le_bytes());
            entry.extend([0; 2]);
            entry.extend(start.to_le_bytes());
            entry.extend(size.to_le_bytes());
            entry.extend([0; 4]);
            entry.extend(ENABLED.to_le_bytes());
            entry.extend([0; 8]);
            srat.append_slice(&entry);
        }
    }
    srat.as_slice().to_vec()
}

fn distances(nodes: &[NumaNodeInfo]) -> Vec<u8> {
    let mut slit = table(*b"SLIT", SLIT_REVISION);
    slit.append_slice(&(nodes.len() as u64).to_le_bytes());
    for node in nodes {
        slit.append_slice(&node.distances);
    }
    slit.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> MachineDescription {
        let node = |cpus: &[u8], memory: &[(u64, u64)], distances: &[u8]| NumaNodeInfo {
            cpus: cpus.to_vec(),
            memory: memory.to_vec(),
            distances: distances.to_vec(),
        };
        MachineDescription {
            vcpus: 2,
            max_vcpus: 3,
            numa_nodes: vec![
                node(&[0, 2], &[(0, 0x10_0000)], &[10, 20]),
                node(&[1], &[(0x10_0000, 0x1000), (1 << 32, 0x2000)], &[30, 10]),
            ],
            ..super::super::super::testing::machine(0)
        }
    }

    fn sum(table: &[u8]) -> u8 {
        table.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn srat_says_which_node_has_what() {
        let tables = tables(&machine());
        let srat = &tables[0];
        assert_eq!((&srat[..4], sum(srat)), (&b"SRAT"[..], 0));
        assert_eq!(srat[36..48], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let cpu = |node, id| [0, 16, node, id, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0].to_vec();
        let memory = |node, start: u64, size: u64| {
            [
                &[1, 40, node, 0, 0, 0, 0, 0][..],
                &start.to_le_bytes(),
                &size.to_le_bytes(),
                &[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ]
            .concat()
        };
        let expected = [
            cpu(0, 0),
            cpu(0, 2),
            memory(0, 0, 0x10_0000),
            cpu(1, 1),
            memory(1, 0x10_0000, 0x1000),
            memory(1, 1 << 32, 0x2000),
        ];
        assert_eq!(srat[48..], expected.concat());
    }

    #[test]
    fn slit_says_how_far_they_are() {
        let tables = tables(&machine());
        let slit = &tables[1];
        assert_eq!((&slit[..4], sum(slit)), (&b"SLIT"[..], 0));
        assert_eq!(slit[36..], [2, 0, 0, 0, 0, 0, 0, 0, 10, 20, 30, 10]);
    }

    #[test]
    fn a_machine_without_nodes_has_no_tables() {
        let plain = super::super::super::testing::machine(0);
        assert!(tables(&plain).is_empty());
        assert_eq!(node_of_vcpu(&plain, 0), None);
        assert_eq!(node_of_vcpu(&machine(), 1), Some(1));
    }
}

//! Guest memory by NUMA nodes: which addresses a node of the guest has, and which node of the host they
//! are taken from.
#![allow(unsafe_code, reason = "mbind(2) has no safe form")]

use std::io;

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend as _};

use super::{GuestMemory, layout};

/// Bits of the set of host nodes, more than Linux has on any machine (`MAX_NUMNODES` is 1024).
const NODE_BITS: usize = 1024;
const WORD_BITS: usize = u64::BITS as usize;

/// Why memory was not bound to a node of the host.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel refuses.
    #[error(
        "cannot take guest memory from node {node} of the host (mbind): {source}; \
         /sys/devices/system/node names those with memory, and a cgroup's `cpuset.mems` may leave some out \
         (`machine-config.numa_nodes[].host_node`)"
    )]
    Bind {
        /// The node.
        node: u16,
        /// What the host said.
        source: io::Error,
    },
    /// The guest has no memory there.
    #[error("a NUMA node's memory {start:#x}+{size:#x} is not the guest's")]
    NoMemory {
        /// First address.
        start: u64,
        /// Bytes.
        size: u64,
    },
}

/// A range of guest-physical memory: first address and size in bytes.
pub type Range = (u64, u64);

/// The memory of nodes that have so many bytes each, one after another, around the MMIO hole.
pub fn ranges(sizes: &[u64]) -> Vec<Vec<Range>> {
    let mut next = 0_u64;
    let mut of_node = |size: u64| {
        let end = next.saturating_add(size);
        let low = (next, end.min(layout::MMIO_HOLE_START));
        let high = (next.max(layout::MMIO_HOLE_START), end);
        next = end;
        // Memory beyond the start of the hole lies behind its end.
        let hole = layout::MMIO_HOLE_END.saturating_sub(layout::MMIO_HOLE_START);
        let high = (high.0.saturating_add(hole), high.1.saturating_add(hole));
        [low, high]
            .into_iter()
            .filter_map(|(start, end)| Some((start, end.checked_sub(start).filter(|n| *n > 0)?)))
            .collect()
    };
    sizes.iter().map(|size| of_node(*size)).collect()
}

/// Lets `ranges` of `memory` be taken from node `node` of the host, and from no other. To be called before
/// they are touched.
///
/// # Errors
/// When there is no such node, or none that may be used.
pub fn bind(memory: &GuestMemory, ranges: &[Range], node: u16) -> Result<(), Error> {
    let mut nodes = [0_u64; NODE_BITS / WORD_BITS];
    let number = usize::from(node);
    let bit = 1_u64.checked_shl(u32::from(node) % u64::BITS).unwrap_or(0);
    match nodes.get_mut(number / WORD_BITS) {
        Some(word) => *word = bit,
        None => {
            let source = io::ErrorKind::InvalidInput.into();
            return Err(Error::Bind { node, source });
        }
    }
    for &(start, size) in ranges {
        let no_memory = |_| Error::NoMemory { start, size };
        let length = usize::try_from(size).map_err(|_| Error::NoMemory { start, size })?;
        let slice = memory.get_slice(GuestAddress(start), length);
        let slice = slice.map_err(no_memory)?;
        // SAFETY: the range is one of guest memory, which is mapped and stays so; a policy for where its
        // pages come from changes nothing in them. The set has as many bits as the kernel is told, which
        // counts one more.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                slice.ptr_guard_mut().as_ptr(),
                length,
                libc::MPOL_BIND,
                nodes.as_ptr(),
                NODE_BITS + 1,
                0,
            )
        };
        if result != 0 {
            let source = io::Error::last_os_error();
            return Err(Error::Bind { node, source });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn nodes_lie_one_after_another_around_the_hole() {
        assert_eq!(
            ranges(&[64 * MIB, 192 * MIB]),
            [[(0, 64 * MIB)], [(64 * MIB, 192 * MIB)]]
        );
        assert_eq!(
            ranges(&[2 * GIB, 2 * GIB, GIB]),
            [
                vec![(0, 2 * GIB)],
                vec![(2 * GIB, GIB), (4 * GIB, GIB)],
                vec![(5 * GIB, GIB)]
            ]
        );
        assert_eq!(ranges(&[3 * GIB, MIB]), [[(0, 3 * GIB)], [(4 * GIB, MIB)]]);
        assert!(ranges(&[]).is_empty());
    }

    /// The policy of the mapping at `address`, as the kernel tells it.
    fn policy(address: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/numa_maps").expect("a kernel with NUMA");
        let start = format!("{address:08x} ");
        let line = maps.lines().find(|line| line.starts_with(&start));
        let line = line.unwrap_or_else(|| panic!("no mapping at {address:#x}: {maps}"));
        line.split(' ').nth(1).unwrap().to_owned()
    }

    #[test]
    fn memory_is_bound_to_a_node_of_the_host() {
        let memory = crate::memory::allocate(4 * MIB).unwrap();
        bind(&memory, &[(MIB, MIB)], 0).unwrap();
        let at = |address| {
            let slice = memory.get_slice(GuestAddress(address), 1).unwrap();
            slice.ptr_guard().as_ptr() as usize
        };
        memory.write_obj(1_u8, GuestAddress(MIB)).unwrap();
        assert_eq!(policy(at(MIB)), "bind:0");
        assert_eq!(policy(at(2 * MIB)), "default");
    }

    #[test]
    fn a_node_that_the_host_has_not_is_named() {
        let memory = crate::memory::allocate(MIB).unwrap();
        for node in [1023, 1024, u16::MAX] {
            let error = bind(&memory, &[(0, MIB)], node).unwrap_err().to_string();
            assert!(
                error.contains(&format!("node {node} of the host")),
                "{error}"
            );
        }
        let error = bind(&memory, &[(0, 2 * MIB)], 0).unwrap_err();
        assert!(matches!(error, Error::NoMemory { .. }), "{error}");
    }
}

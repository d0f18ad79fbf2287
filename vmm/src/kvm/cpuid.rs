//! What CPUID says inside: the host's offer, with our topology and without what cannot be honoured.
//!
//! Sources: Intel SDM volume 2A "CPUID"; AMD APM volume 3 appendix E; Linux
//! Documentation/virt/kvm/x86/cpuid.rst for the leaves from 0x4000_0000.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::Error;

/// Leaf 1, ECX: DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, SDBG, xTPR, PDCM, DCA. Parts of the host's
/// power management, debug store and virtualization that no guest of ours has.
const LEAF_1_ECX_REMOVED: u32 = bits(&[2, 3, 4, 5, 6, 7, 8, 11, 14, 15, 18]);
/// Leaf 1, EDX: DS, ACPI (thermal), TM, PBE.
const LEAF_1_EDX_REMOVED: u32 = bits(&[21, 22, 29, 31]);
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_HTT: u32 = 1 << 28;
/// Leaf 6, EAX: only ARAT (the APIC timer never stops).
const LEAF_6_EAX_KEPT: u32 = 1 << 2;
/// Leaf 7.0, EBX: SGX, resource monitoring and allocation, MPX, processor trace.
const LEAF_7_EBX_REMOVED: u32 = bits(&[2, 12, 14, 15, 25]);
/// Leaf 7.0, ECX: total memory encryption, key locker, SGX launch control.
const LEAF_7_ECX_REMOVED: u32 = bits(&[13, 23, 30]);
/// Leaf 7.0, EDX: hybrid CPU, PCONFIG.
const LEAF_7_EDX_REMOVED: u32 = bits(&[15, 18]);
/// AMX. KVM offers it also where a guest may not have its state, which a process has to ask for
/// (ARCH_REQ_XCOMP_GUEST_PERM) and we do not: the guest would fault on its first use. Leaf 7.0, EDX:
/// BF16, TILE, INT8; leaf 7.1, EAX: FP16; leaf 7.1, EDX: COMPLEX.
const LEAF_7_EDX_AMX: u32 = bits(&[22, 24, 25]);
const LEAF_7_1_EAX_AMX: u32 = bits(&[21]);
const LEAF_7_1_EDX_AMX: u32 = bits(&[8]);
/// Leaf 0xd.0, EAX: tile configuration and tile data, the state of AMX.
const LEAF_D_EAX_AMX: u32 = bits(&[17, 18]);
/// Tiles, and how they are multiplied.
const LEAVES_AMX: [u32; 2] = [0x1d, 0x1e];
/// Leaves 4 and 0x8000_001d, EAX: how many threads share the cache, minus one.
const CACHE_SHARING: u32 = 0xfff << 14;
/// Leaf 0x8000_0001, ECX: SVM, extended APIC space, IBS, SKINIT, watchdog, LWP, node id MSR (its leaf
/// says it too), performance counters of all kinds, MONITORX.
const EXTENDED_ECX_REMOVED: u32 = bits(&[2, 3, 10, 12, 13, 15, 19, 23, 24, 26, 27, 28, 29]);
/// Leaf 0x8000_0001, ECX: more than one core, in AMD's older way.
const EXTENDED_ECX_CMP_LEGACY: u32 = 1 << 1;

/// Leaves of what was removed above: SGX, resource control, trace, PCONFIG, IBS, LWP,
/// SEV, AMD's resource control, PMU v2; and AMD's newer topology leaf, which is not rewritten here.
const LEAVES_REMOVED: [u32; 14] = [
    0xf,
    0x10,
    0x12,
    0x14,
    0x1b,
    0x23,
    0x24,
    0x8000_000a,
    0x8000_001b,
    0x8000_001c,
    0x8000_001f,
    0x8000_0020,
    0x8000_0022,
    0x8000_0026,
];
/// Leaves that stay and read as zero: MONITOR, PMU.
const LEAVES_ZEROED: [u32; 2] = [0x5, 0xa];

const fn bits(positions: &[u32]) -> u32 {
    let mut mask = 0;
    let mut at = 0;
    while at < positions.len() {
        mask |= 1 << positions[at];
        at += 1;
    }
    mask
}

/// One socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// All threads of all cores.
    pub vcpus: u8,
    /// Threads of a core: 1 or 2.
    pub threads: u8,
}

impl Topology {
    fn cores(self) -> u8 {
        self.vcpus.div_ceil(self.threads.max(1))
    }
}

impl From<u8> for Topology {
    /// So many cores with one thread each.
    fn from(vcpus: u8) -> Self {
        Self { vcpus, threads: 1 }
    }
}

/// The CPUID of a machine, but for what differs from vCPU to vCPU.
pub struct MachineCpuid {
    entries: Vec<kvm_cpuid_entry2>,
    /// The NUMA node of each vCPU; empty where there is one at most.
    nodes: Vec<u8>,
    threads: u8,
}

impl MachineCpuid {
    /// Makes `supported` (KVM_GET_SUPPORTED_CPUID) that of a machine of this topology.
    pub fn new(supported: &CpuId, shape: impl Into<Topology>, tsc_deadline: bool) -> Self {
        let shape = shape.into();
        let mut entries = supported.as_slice().to_vec();
        let max_basic = entries
            .iter()
            .find(|e| e.function == 0)
            .map_or(0, |e| e.eax);
        let has_tiles = entries.iter().any(|entry| {
            (entry.function, entry.index) == (0xd, 0)
                && entry.eax & LEAF_D_EAX_AMX == LEAF_D_EAX_AMX
        });
        let host = Host {
            is_amd: entries.iter().any(is_amd),
            has_tiles,
            tsc_deadline,
        };
        entries.retain(|entry| !LEAVES_REMOVED.contains(&entry.function));
        entries.retain(|entry| has_tiles || !LEAVES_AMX.contains(&entry.function));
        entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
        for entry in &mut entries {
            normalise(entry, shape, &host);
        }
        for leaf in [0xb, 0x1f] {
            if leaf <= max_basic {
                entries.extend(topology(leaf, shape));
            }
        }
        Self {
            entries,
            nodes: Vec::new(),
            threads: shape.threads.max(1),
        }
    }

    /// Puts the vCPUs into these NUMA nodes. They share no cache then: one of all would contradict the nodes.
    /// (Of an AMD CPU without topology extensions Linux believes that all cores of a socket share one. It says
    /// once that it ignores that.)
    pub fn set_nodes(&mut self, of_vcpus: Vec<u8>) {
        self.nodes = of_vcpus;
        for entry in &mut self.entries {
            if matches!(entry.function, 0x4 | 0x8000_001d) {
                entry.eax &= !CACHE_SHARING;
            }
        }
    }

    /// Bits of a guest-physical address (leaf 0x8000_0008; 36 where there is none).
    pub fn physical_address_bits(&self) -> u8 {
        let leaf = self.entries.iter().find(|e| e.function == 0x8000_0008);
        leaf.map_or(36, |entry| entry.eax as u8)
    }

    /// What the vCPU with this APIC id reads.
    ///
    /// # Errors
    /// When KVM offered more entries than it takes.
    pub fn of_vcpu(&self, id: u8) -> Result<CpuId, Error> {
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                0x1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | u32::from(id) << 24,
                0xb | 0x1f => entry.edx = u32::from(id),
                0x8000_001e => {
                    entry.eax = u32::from(id);
                    // Core id, and threads of a core, less one.
                    let core = u32::from(id) / u32::from(self.threads);
                    entry.ebx = core | u32::from(self.threads.saturating_sub(1)) << 8;
                    let node = self.nodes.get(usize::from(id));
                    entry.ecx = node.copied().unwrap_or(0).into();
                }
                _ => {}
            }
        }
        CpuId::from_entries(&entries).map_err(|_| Error::TooManyEntries("CPUID"))
    }
}

/// Leaves whose bits are features, and of which registers.
const FEATURES: [(u32, u32, [bool; 4]); 8] = [
    (0x1, 0, [false, false, true, true]),
    (0x7, 0, [false, true, true, true]),
    (0x7, 1, [true, true, true, true]),
    (0x7, 2, [false, false, false, true]),
    (0xd, 0, [true, false, false, true]),
    (0xd, 1, [true, false, true, true]),
    (0x8000_0001, 0, [false, false, true, true]),
    (0x8000_0008, 0, [false, true, false, false]),
];
/// OSXSAVE in ECX of leaf 1: a copy of a bit of CR4.
const OSXSAVE: u32 = 1 << 27;

/// Whether a vCPU that reads `entries` finds on this host what it was told of: what a new one would be told of `here`.
///
/// # Errors
/// When not: the first leaf with a feature that is not.
pub fn check_features(entries: &[kvm_cpuid_entry2], here: &CpuId) -> Result<(), Error> {
    for (leaf, subleaf, which) in FEATURES {
        let is_it = |e: &&kvm_cpuid_entry2| (e.function, e.index) == (leaf, subleaf);
        let registers = |entry: &kvm_cpuid_entry2| [entry.eax, entry.ebx, entry.ecx, entry.edx];
        let Some(saved) = entries.iter().find(is_it).map(registers) else {
            continue;
        };
        let here = here.as_slice().iter().find(is_it);
        let here = here.map(registers).unwrap_or_default();
        let names = ["EAX", "EBX", "ECX", "EDX"];
        for (((saved, here), register), is_feature) in
            saved.into_iter().zip(here).zip(names).zip(which)
        {
            let ignored = if (leaf, register) == (1, "ECX") {
                OSXSAVE
            } else {
                0
            };
            let bits = saved & !here & !ignored;
            if is_feature && bits != 0 {
                return Err(Error::MissingFeatures {
                    leaf,
                    subleaf,
                    register,
                    bits,
                });
            }
        }
    }
    Ok(())
}

/// What of the host decides on more than one leaf.
struct Host {
    is_amd: bool,
    /// A guest may have the state of AMX.
    has_tiles: bool,
    tsc_deadline: bool,
}

/// Whether this is leaf 0 of a CPU that follows AMD's manual.
fn is_amd(entry: &kvm_cpuid_entry2) -> bool {
    let name = [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes);
    let names = [
        [*b"Auth", *b"enti", *b"cAMD"],
        [*b"Hygo", *b"nGen", *b"uine"],
    ];
    entry.function == 0 && names.contains(&name)
}

fn normalise(entry: &mut kvm_cpuid_entry2, topology: Topology, host: &Host) {
    let Topology { vcpus, threads } = topology;
    let count = u32::from(vcpus);
    let last = count.saturating_sub(1);
    match entry.function {
        0x1 => {
            entry.ebx = (entry.ebx & 0xff00_ffff) | count << 16;
            entry.ecx &= !(LEAF_1_ECX_REMOVED | LEAF_1_ECX_TSC_DEADLINE);
            entry.ecx |= LEAF_1_ECX_HYPERVISOR;
            if host.tsc_deadline {
                entry.ecx |= LEAF_1_ECX_TSC_DEADLINE;
            }
            entry.edx &= !(LEAF_1_EDX_REMOVED | LEAF_1_EDX_HTT);
            if vcpus > 1 {
                entry.edx |= LEAF_1_EDX_HTT;
            }
        }
        // Caches: EAX 7..5 is the level, 25..14 how many threads share it, 31..26 (Intel) how many
        // cores there are. The third level is shared by all, the others by the threads of a core.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let siblings = u32::from(threads).saturating_sub(1);
            let sharing = if level >= 3 { last } else { siblings };
            let cores = match entry.function {
                0x4 => u32::from(topology.cores()).saturating_sub(1),
                _ => 0,
            };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
        }
        leaf if LEAVES_ZEROED.contains(&leaf) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        0x6 => {
            entry.eax &= LEAF_6_EAX_KEPT;
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
        }
        0x7 if entry.index == 0 => {
            entry.ebx &= !LEAF_7_EBX_REMOVED;
            entry.ecx &= !LEAF_7_ECX_REMOVED;
            entry.edx &= !LEAF_7_EDX_REMOVED;
            if !host.has_tiles {
                entry.edx &= !LEAF_7_EDX_AMX;
            }
        }
        0x7 if entry.index == 1 && !host.has_tiles => {
            entry.eax &= !LEAF_7_1_EAX_AMX;
            entry.edx &= !LEAF_7_1_EDX_AMX;
        }
        0x8000_0001 => {
            entry.ecx &= !(EXTENDED_ECX_REMOVED | EXTENDED_ECX_CMP_LEGACY);
            if vcpus > 1 && host.is_amd {
                entry.ecx |= EXTENDED_ECX_CMP_LEGACY;
            }
        }
        // ECX, AMD only: 7..0: threads - 1; 15..12: bits of an APIC id that name the thread.
        0x8000_0008 if host.is_amd => entry.ecx = last | id_bits(vcpus) << 12,
        0x8000_0008 => entry.ecx = 0,
        _ => {}
    }
}

/// How many bits number `vcpus` things.
fn id_bits(vcpus: u8) -> u32 {
    u32::from(vcpus).next_power_of_two().trailing_zeros()
}

/// Leaf 0xb or 0x1f: the threads of a core, those of the socket, and the end of the list.
fn topology(leaf: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        ..Default::default()
    };
    [
        level(0, id_bits(topology.threads), topology.threads.into(), 1),
        level(1, id_bits(topology.vcpus), topology.vcpus.into(), 2),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host_of(leaves: &[(u32, u32, [u32; 4])]) -> CpuId {
        let entries: Vec<_> = leaves
            .iter()
            .map(|(function, index, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
                function: *function,
                index: *index,
                eax: *eax,
                ebx: *ebx,
                ecx: *ecx,
                edx: *edx,
                ..Default::default()
            })
            .collect();
        CpuId::from_entries(&entries).unwrap()
    }

    fn read(cpuid: &CpuId, function: u32, index: u32) -> [u32; 4] {
        let mut found = cpuid
            .as_slice()
            .iter()
            .filter(|e| e.function == function && e.index == index);
        let entry = found.next().expect("the leaf");
        assert!(found.next().is_none(), "leaf {function:#x} twice");
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    const ALL: [u32; 4] = [u32::MAX; 4];
    /// "AuthenticAMD", "GenuineIntel".
    const AMD: [u32; 4] = [0x1f, 0x6874_7541, 0x444d_4163, 0x6974_6e65];
    const INTEL: [u32; 4] = [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69];

    #[test]
    fn topology_is_ours() {
        let host = host_of(&[
            (0, 0, AMD),
            (1, 0, ALL),
            (4, 0, [0xfc00_4121, 1, 2, 3]),
            (4, 3, [0xfc03_c163, 1, 2, 3]),
            (0xb, 0, ALL),
            (0xb, 1, ALL),
            (0x1f, 0, ALL),
            (0x1f, 5, ALL),
            (0x8000_0001, 0, ALL),
            (0x8000_0008, 0, [0x3030, 0, u32::MAX, 0]),
            (0x8000_001d, 3, [0x1_c163, 0, 0, 0]),
            (0x8000_001e, 0, ALL),
        ]);
        let machine = MachineCpuid::new(&host, 5, true);
        assert_eq!(machine.physical_address_bits(), 48);
        let vcpu = machine.of_vcpu(3).unwrap();
        assert_eq!(read(&vcpu, 1, 0)[1] >> 16, 0x0305);
        assert_eq!(read(&vcpu, 4, 0)[0], 0x1000_0121);
        assert_eq!(read(&vcpu, 4, 3)[0], 4 << 26 | 4 << 14 | 0x163);
        assert_eq!(read(&vcpu, 0xb, 0), [0, 1, 0x100, 3]);
        assert_eq!(read(&vcpu, 0x1f, 1), [3, 5, 0x201, 3]);
        assert_eq!(read(&vcpu, 0x1f, 2), [0, 0, 2, 3]);
        assert_eq!(read(&vcpu, 0x8000_0008, 0)[2], 4 | 3 << 12);
        assert_eq!(read(&vcpu, 0x8000_001d, 3)[0], 4 << 14 | 0x163);
        assert_eq!(read(&vcpu, 0x8000_001e, 0)[..3], [3, 3, 0]);
        let mut nodes = MachineCpuid::new(&host, 5, true);
        nodes.set_nodes(vec![0, 1, 0, 1, 0]);
        let vcpu = nodes.of_vcpu(3).unwrap();
        assert_eq!(read(&vcpu, 4, 3)[0], 4 << 26 | 0x163);
        assert_eq!(read(&vcpu, 0x8000_001d, 3)[0], 0x163);
        assert_eq!(read(&vcpu, 0x8000_001e, 0)[..3], [3, 3, 1]);
        let pairs = Topology {
            vcpus: 6,
            threads: 2,
        };
        let vcpu = MachineCpuid::new(&host, pairs, true).of_vcpu(3).unwrap();
        assert_eq!(read(&vcpu, 4, 0)[0], 2 << 26 | 1 << 14 | 0x121);
        assert_eq!(read(&vcpu, 4, 3)[0], 2 << 26 | 5 << 14 | 0x163);
        assert_eq!(read(&vcpu, 0xb, 0), [1, 2, 0x100, 3]);
        assert_eq!(read(&vcpu, 0xb, 1), [3, 6, 0x201, 3]);
        assert_eq!(read(&vcpu, 0x8000_001e, 0)[..2], [3, 1 | 1 << 8]);
        let alone = MachineCpuid::new(&host, 1, true).of_vcpu(0).unwrap();
        assert_eq!(read(&alone, 1, 0)[3] & LEAF_1_EDX_HTT, 0);
        assert_eq!(read(&alone, 0xb, 1), [0, 1, 0x201, 0]);
    }

    #[test]
    fn only_amd_counts_cores_in_amds_way() {
        for (vendor, is_amd) in [(AMD, true), (INTEL, false)] {
            let host = host_of(&[
                (0, 0, vendor),
                (0x8000_0001, 0, ALL),
                (0x8000_0008, 0, [0x3030, 0, u32::MAX, 0]),
            ]);
            let vcpu = MachineCpuid::new(&host, 5, true).of_vcpu(0).unwrap();
            let cmp_legacy = read(&vcpu, 0x8000_0001, 0)[2] & EXTENDED_ECX_CMP_LEGACY;
            assert_eq!(cmp_legacy != 0, is_amd);
            assert_eq!(read(&vcpu, 0x8000_0008, 0)[2] != 0, is_amd);
        }
    }

    #[test]
    fn amx_is_there_only_with_its_state() {
        for (components, there) in [(0x7, false), (0x2_0007, false), (0x6_0007, true)] {
            let host = host_of(&[
                (0, 0, INTEL),
                (7, 0, ALL),
                (7, 1, ALL),
                (0xd, 0, [components, 0, 0, 0]),
                (0x1d, 0, ALL),
                (0x1d, 1, ALL),
                (0x1e, 0, ALL),
            ]);
            let vcpu = MachineCpuid::new(&host, 1, true).of_vcpu(0).unwrap();
            let expected = |bits: u32| if there { bits } else { 0 };
            let amx = 1 << 22 | 1 << 24 | 1 << 25;
            assert_eq!(read(&vcpu, 7, 0)[3] & amx, expected(amx));
            let [eax, _, _, edx] = read(&vcpu, 7, 1);
            assert_eq!(eax & 1 << 21, expected(1 << 21));
            assert_eq!(edx & 1 << 8, expected(1 << 8));
            let mut leaves = vcpu.as_slice().iter();
            assert_eq!(leaves.any(|e| LEAVES_AMX.contains(&e.function)), there);
        }
    }

    #[test]
    fn removes_what_cannot_be_honoured() {
        let host = host_of(&[
            (0, 0, [0x1f, 0, 0, 0]),
            (1, 0, ALL),
            (5, 0, ALL),
            (6, 0, ALL),
            (7, 0, ALL),
            (0xa, 0, ALL),
            (0x12, 0, ALL),
            (0x8000_0001, 0, ALL),
            (0x8000_000a, 0, ALL),
        ]);
        let vcpu = MachineCpuid::new(&host, 1, false).of_vcpu(0).unwrap();
        let [_, _, ecx, _] = read(&vcpu, 1, 0);
        assert_eq!(ecx & (1 << 3 | 1 << 5), 0, "MONITOR, VMX");
        assert_eq!(ecx & LEAF_1_ECX_TSC_DEADLINE, 0);
        assert_ne!(ecx & LEAF_1_ECX_HYPERVISOR, 0);
        assert_eq!(read(&vcpu, 5, 0), [0; 4]);
        assert_eq!(read(&vcpu, 0xa, 0), [0; 4]);
        assert_eq!(read(&vcpu, 6, 0), [4, 0, 0, 0]);
        assert_eq!(read(&vcpu, 7, 0)[1] & 1 << 2, 0, "SGX");
        assert_eq!(read(&vcpu, 0x8000_0001, 0)[2] & 1 << 2, 0, "SVM");
        for entry in vcpu.as_slice() {
            assert!(!LEAVES_REMOVED.contains(&entry.function));
        }
    }
}

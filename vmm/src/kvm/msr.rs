//! Model-specific registers at the first instruction.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use log::warn;

use super::{Error, failed};

/// IA32_MISC_ENABLE: bit 0 is fast string operations.
const MISC_ENABLE: u32 = 0x1a0;
/// IA32_MTRR_DEF_TYPE: bit 11 enables, type 6 is write-back.
const MTRR_DEF_TYPE: u32 = 0x2ff;

/// What a firmware would have set; every other MSR is right after KVM's reset. None of them is
/// needed to run, so one that this host's KVM refuses is a warning.
const BOOT_MSRS: [(u32, u64); 2] = [(MISC_ENABLE, 1), (MTRR_DEF_TYPE, 1 << 11 | 6)];

/// Sets [`BOOT_MSRS`].
///
/// # Errors
/// When the call itself fails.
pub(super) fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    let mut entries: &[(u32, u64)] = &BOOT_MSRS;
    while !entries.is_empty() {
        let list: Vec<_> = entries
            .iter()
            .map(|(index, data)| kvm_msr_entry {
                index: *index,
                data: *data,
                ..Default::default()
            })
            .collect();
        let list = Msrs::from_entries(&list).map_err(|_| Error::TooManyEntries("MSR"))?;
        // It stops at the first one that it refuses and says how many it has set.
        let set = vcpu.set_msrs(&list).map_err(failed("set MSRs"))?;
        entries = match entries.get(set..) {
            None | Some([]) => return Ok(()),
            Some([(index, data), rest @ ..]) => {
                warn!("KVM refuses to set MSR {index:#x} to {data:#x}: the guest starts without");
                rest
            }
        };
    }
    Ok(())
}

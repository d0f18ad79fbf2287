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
    for (index, data) in set_list(vcpu, &BOOT_MSRS)? {
        warn!("KVM refuses to set MSR {index:#x} to {data:#x}: the guest starts without");
    }
    Ok(())
}

/// Sets those of a vCPU that was saved. One that this host refuses and that has that value anyway is fine.
///
/// # Errors
/// When the call itself fails.
pub(super) fn restore(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), Error> {
    for (index, data) in set_list(vcpu, msrs)? {
        let mut now = list([(index, 0)])?;
        let read = vcpu.get_msrs(&mut now).map_err(failed("read MSRs"))?;
        let same = now.as_slice().first().is_some_and(|now| now.data == data);
        if read != 1 || !same {
            warn!("KVM refuses to set MSR {index:#x} to {data:#x}: the guest goes on without");
        }
    }
    Ok(())
}

/// Sets `msrs`, and returns those that KVM refused.
fn set_list(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<Vec<(u32, u64)>, Error> {
    set_each(msrs, |entries| {
        let list = list(entries.iter().copied())?;
        vcpu.set_msrs(&list).map_err(failed("set MSRs"))
    })
}

/// The list of them as KVM has it.
pub(super) fn list(msrs: impl IntoIterator<Item = (u32, u64)>) -> Result<Msrs, Error> {
    let entry = |(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries: Vec<_> = msrs.into_iter().map(entry).collect();
    Msrs::from_entries(&entries).map_err(|_| Error::TooManyEntries("MSR"))
}

/// Bits of a register that change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrChange {
    /// The register.
    pub index: u32,
    /// Which bits change.
    pub mask: u64,
    /// What they become; none outside the mask.
    pub value: u64,
}

/// Changes registers one by one, so that one which KVM refuses can be named.
///
/// # Errors
/// When one of them cannot be read or set.
pub(super) fn change(vcpu: &VcpuFd, changes: &[MsrChange]) -> Result<(), Error> {
    for &MsrChange { index, mask, value } in changes {
        let refused = |action: String| Error::Msr { index, action };
        let mut now = list([(index, 0)])?;
        let read = vcpu.get_msrs(&mut now).map_err(failed("read MSRs"))?;
        let before = now.as_slice().first().filter(|_| read == 1);
        let before = before.ok_or_else(|| refused("read".to_owned()))?.data;
        let after = before & !mask | value;
        let set = vcpu.set_msrs(&list([(index, after)])?);
        if set.map_err(failed("set MSRs"))? != 1 {
            return Err(refused(format!("set to {after:#x}")));
        }
    }
    Ok(())
}

/// Sets `entries` by `set`, which stops at the first one that it refuses and says how many it has set.
/// Returns those that were refused.
fn set_each<E>(
    mut entries: &[(u32, u64)],
    mut set: impl FnMut(&[(u32, u64)]) -> Result<usize, E>,
) -> Result<Vec<(u32, u64)>, E> {
    let mut refused = Vec::new();
    while !entries.is_empty() {
        let count = set(entries)?;
        entries = match entries.get(count..) {
            None | Some([]) => break,
            Some([one, rest @ ..]) => {
                refused.push(*one);
                rest
            }
        };
    }
    Ok(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_is_left_out_and_the_rest_is_set() {
        let all = [(1, 10), (2, 20), (3, 30), (4, 40)];
        for refused in [&[][..], &[1], &[4], &[2, 3], &[1, 2, 3, 4]] {
            let mut done = Vec::new();
            let left = set_each(&all, |entries| {
                let accepted = entries.iter().take_while(|one| !refused.contains(&one.0));
                let before = done.len();
                done.extend(accepted);
                Ok::<_, ()>(done.len() - before)
            });
            let (kept, without): (Vec<_>, Vec<_>) =
                all.iter().partition(|one| !refused.contains(&one.0));
            assert_eq!((left, done), (Ok(without), kept));
        }
    }

    #[test]
    fn a_call_that_fails_or_counts_too_far_ends_it() {
        assert_eq!(set_each(&[(1, 1)], |_| Err("no")), Err("no"));
        assert_eq!(set_each(&[(1, 1)], |_| Ok::<_, ()>(9)), Ok(vec![]));
        assert_eq!(set_each(&[], |_| Err("not asked")), Ok(vec![]));
    }
}

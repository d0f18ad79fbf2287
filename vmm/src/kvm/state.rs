//! What vCPUs and the parts of a machine that KVM has itself hold, as plain data: read while the vCPUs are paused, and
//! written before the first of them runs.
//!
//! KVM's own structures go as they are. They are part of its interface, so their bytes mean the same to any kernel; one
//! that is longer on another kernel ends in zeros.

use std::os::fd::{AsRawFd as _, BorrowedFd, IntoRawFd as _};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::{Error, Vcpu, Vm, cpuid, failed, msr};
use crate::memory::GuestMemory;

/// KVM's models of interrupt controllers.
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];
/// Most MSRs that one call reads or writes (MAX_IO_MSRS in the kernel).
const MSRS_AT_ONCE: usize = 256;
/// IA32_TSC_DEADLINE: says when by the time stamp counter, so it is set after that.
const TSC_DEADLINE: u32 = 0x6e0;

/// A vCPU.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// KHz of its time stamp counter, where KVM says it.
    tsc_khz: Option<u32>,
    mp_state: kvm_mp_state,
    registers: kvm_regs,
    special_registers: kvm_sregs,
    extended_registers: kvm_xsave,
    extended_control: kvm_xcrs,
    debug_registers: kvm_debugregs,
    local_apic: kvm_lapic_state,
    /// Number and value.
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

/// What is of the machine and of no vCPU.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    irqchips: Vec<kvm_irqchip>,
    pit: Option<kvm_pit_state2>,
    clock: kvm_clock_data,
}

/// Reads the state of a machine. It has handles of its own, so that the threads that run vCPUs need no more than they do
/// without it.
pub struct StateReader {
    vm: Arc<VmFd>,
    vcpus: Vec<(VcpuFd, CpuId)>,
    msrs: Vec<u32>,
    pit: bool,
}

impl Vm {
    /// A second handle of `vcpu`, for another thread than the one that runs it.
    pub(super) fn second_handle(&self, vcpu: &Vcpu, action: &'static str) -> Result<VcpuFd, Error> {
        // SAFETY: the descriptor is open as long as the vCPU.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu.fd.as_raw_fd()) };
        let copy = vcpu.try_clone_to_owned();
        let copy = copy.map_err(|source| Error::Ioctl { action, source })?;
        // SAFETY: the descriptor is a vCPU's of this machine, and owned by nobody else.
        let fd = unsafe { self.fd.create_vcpu_from_rawfd(copy.into_raw_fd()) };
        fd.map_err(failed(action))
    }

    /// What reads the state of this machine and `vcpus`, each with what CPUID says on it; `pit` if there is an i8254.
    ///
    /// # Errors
    /// When a descriptor cannot be duplicated, or KVM does not say which MSRs there are.
    pub fn state_reader<'a>(
        &self,
        vcpus: impl IntoIterator<Item = (&'a Vcpu, CpuId)>,
        pit: bool,
    ) -> Result<StateReader, Error> {
        let msrs = self.kvm.get_msr_index_list();
        let msrs = msrs.map_err(failed("list the MSRs"))?;
        let handle = |(vcpu, cpuid)| {
            let fd = self.second_handle(vcpu, "share a vCPU with who saves it")?;
            Ok((fd, cpuid))
        };
        Ok(StateReader {
            vm: Arc::clone(&self.fd),
            vcpus: vcpus
                .into_iter()
                .map(handle)
                .collect::<Result<_, Error>>()?,
            msrs: msrs.as_slice().to_vec(),
            pit,
        })
    }

    /// Writes what [`StateReader::vm`] has read. With `by_wall_clock` the guest's clock goes on as if it had run meanwhile,
    /// where the host that saved it said what time it was; else as if no time had passed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn restore(&self, state: &VmState, by_wall_clock: bool) -> Result<(), Error> {
        for chip in &state.irqchips {
            let set = self.fd.set_irqchip(chip);
            set.map_err(failed("restore an interrupt controller"))?;
        }
        if let Some(pit) = &state.pit {
            let set = self.fd.set_pit2(pit);
            set.map_err(failed("restore the i8254 timer"))?;
        }
        let mut clock = state.clock;
        clock.flags &= if by_wall_clock { KVM_CLOCK_REALTIME } else { 0 };
        let set = self.fd.set_clock(&clock);
        set.map_err(failed("restore the guest's clock"))
    }
}

impl StateReader {
    /// What is of the machine and of no vCPU. No vCPU runs meanwhile.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn vm(&self) -> Result<VmState, Error> {
        let chip = |&chip_id: &u32| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            let read = self.vm.get_irqchip(&mut chip);
            read.map_err(failed("read an interrupt controller"))?;
            Ok(chip)
        };
        let pit = self.pit.then(|| self.vm.get_pit2()).transpose();
        Ok(VmState {
            irqchips: CHIPS.iter().map(chip).collect::<Result<_, Error>>()?,
            pit: pit.map_err(failed("read the i8254 timer"))?,
            clock: self
                .vm
                .get_clock()
                .map_err(failed("read the guest's clock"))?,
        })
    }

    /// The pages of each region of the machine's `memory` that the guest has written since the last call
    /// (KVM_GET_DIRTY_LOG), if it is tracked: one bit each, the first page is bit 0 of the first word. What this process
    /// wrote is in the region's [`DirtyPages`](crate::memory::DirtyPages).
    ///
    /// # Errors
    /// When the memory is not tracked, or the kernel refuses.
    pub fn dirty_log(&self, memory: &GuestMemory) -> Result<Vec<Vec<u64>>, Error> {
        // [`Vm::set_memory`] numbers them so.
        (0..)
            .zip(memory.iter())
            .map(|(slot, region)| {
                let size = usize::try_from(region.len());
                let size = size.map_err(|_| Error::TooManyEntries("dirty page"))?;
                let log = self.vm.get_dirty_log(slot, size);
                log.map_err(failed(
                    "read which pages were written (`track_dirty_pages`)",
                ))
            })
            .collect()
    }

    /// What CPUID says on the first vCPU.
    pub fn first_cpuid(&self) -> &[kvm_cpuid_entry2] {
        let first = self.vcpus.first();
        first.map_or(&[], |(_, cpuid)| cpuid.as_slice())
    }

    /// The vCPUs in their order. None of them runs meanwhile.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn vcpus(&self) -> Result<Vec<VcpuState>, Error> {
        let vcpus = self.vcpus.iter();
        vcpus.map(|(fd, cpuid)| self.vcpu(fd, cpuid)).collect()
    }

    fn vcpu(&self, fd: &VcpuFd, cpuid: &CpuId) -> Result<VcpuState, Error> {
        let what = failed;
        Ok(VcpuState {
            cpuid: cpuid.as_slice().to_vec(),
            // First: it makes KVM settle what a start-up interrupt has brought, which the rest then shows.
            mp_state: fd.get_mp_state().map_err(what("read a vCPU's state"))?,
            tsc_khz: fd.get_tsc_khz().ok(),
            registers: fd.get_regs().map_err(what("read registers"))?,
            special_registers: fd.get_sregs().map_err(what("read special registers"))?,
            extended_registers: fd.get_xsave().map_err(what("read extended registers"))?,
            extended_control: fd.get_xcrs().map_err(what("read XCR0"))?,
            debug_registers: fd.get_debug_regs().map_err(what("read debug registers"))?,
            local_apic: fd.get_lapic().map_err(what("read the local APIC"))?,
            msrs: read_msrs(fd, &self.msrs)?,
            events: fd
                .get_vcpu_events()
                .map_err(what("read a vCPU's pending events"))?,
        })
    }
}

/// Those of `wanted` that KVM reads.
fn read_msrs(fd: &VcpuFd, wanted: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
    let mut found = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let part = rest.get(..MSRS_AT_ONCE).unwrap_or(rest);
        let mut list = msr::list(part.iter().map(|&index| (index, 0)))?;
        let count = fd.get_msrs(&mut list).map_err(failed("read MSRs"))?;
        let entries = list.as_slice().iter().take(count);
        found.extend(entries.map(|entry| (entry.index, entry.data)));
        // It stops at the first that it does not read.
        let next = if count < part.len() {
            count.saturating_add(1)
        } else {
            count
        };
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(found)
}

impl VcpuState {
    /// What CPUID says on it.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }
}

impl Vcpu {
    /// Sets what CPUID says, of which `here` is what a new vCPU would be told on this host, and everything else, to what [`StateReader::vcpus`] has read. After this the vCPU is told that
    /// it was stopped, so that its guest does not take that for a lock-up.
    ///
    /// # Errors
    /// When this host has not all of the features, or the kernel refuses. A refused MSR is a warning.
    pub fn restore(&self, state: &VcpuState, here: &CpuId) -> Result<(), Error> {
        cpuid::check_features(&state.cpuid, here)?;
        let list = CpuId::from_entries(&state.cpuid).map_err(|_| Error::TooManyEntries("CPUID"))?;
        let what = failed;
        let fd = &self.fd;
        fd.set_cpuid2(&list).map_err(what("set a vCPU's CPUID"))?;
        if let Some(khz) = state.tsc_khz
            && fd.get_tsc_khz().ok() != Some(khz)
        {
            let set = fd.set_tsc_khz(khz);
            set.map_err(what("set the frequency of the time stamp counter"))?;
        }
        fd.set_mp_state(state.mp_state)
            .map_err(what("restore a vCPU's state"))?;
        fd.set_sregs(&state.special_registers)
            .map_err(what("restore special registers"))?;
        fd.set_regs(&state.registers)
            .map_err(what("restore registers"))?;
        // SAFETY: no thread of this process may have tiles (AMX), so KVM reads these 4096 bytes and no more.
        unsafe { fd.set_xsave(&state.extended_registers) }
            .map_err(what("restore extended registers"))?;
        fd.set_xcrs(&state.extended_control)
            .map_err(what("restore XCR0"))?;
        fd.set_debug_regs(&state.debug_registers)
            .map_err(what("restore debug registers"))?;
        fd.set_lapic(&state.local_apic)
            .map_err(what("restore the local APIC"))?;
        let (late, first): (Vec<_>, Vec<_>) = state
            .msrs
            .iter()
            .partition(|(index, _)| *index == TSC_DEADLINE);
        for part in first.chunks(MSRS_AT_ONCE).chain([&late[..]]) {
            msr::restore(fd, part)?;
        }
        fd.set_vcpu_events(&state.events)
            .map_err(what("restore a vCPU's pending events"))?;
        // It is refused where the guest has not turned its clock on, and then there is nothing to say.
        let _ = fd.kvmclock_ctrl();
        Ok(())
    }
}

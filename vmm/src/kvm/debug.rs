//! A vCPU as a debugger has it: a handle beside that of the thread which runs it. Its calls wait while that thread is
//! in the guest, so the vCPU is to be paused first.

use kvm_bindings::{
    KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_fpu, kvm_guest_debug, kvm_regs, kvm_sregs,
};
use kvm_ioctls::VcpuFd;

use super::{Error, Vcpu, Vm, failed};

/// What a vCPU is to come back for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watched {
    /// After one instruction.
    pub step: bool,
    /// What the debug registers name: DR0 to DR3 and DR7.
    pub registers: Option<([u64; 4], u64)>,
    /// First the guest gets a debug exception (#DB), because the one that the vCPU came back for is its own.
    pub inject: bool,
}

/// A vCPU's second handle.
pub struct DebugVcpu {
    fd: VcpuFd,
    /// Whether KVM can keep interrupts away from a guest that is single-stepped (Linux 5.15).
    blocks_interrupts: bool,
}

impl Vm {
    /// A second handle for each of `vcpus`.
    ///
    /// # Errors
    /// When a descriptor cannot be duplicated, or what it shares with KVM not be mapped.
    pub fn debug_vcpus(&self, vcpus: &[Vcpu]) -> Result<Vec<DebugVcpu>, Error> {
        let flags = self.fd.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
        let flags = u32::try_from(flags).unwrap_or(0);
        let handle = |vcpu: &Vcpu| {
            let fd = self.second_handle(vcpu, "share a vCPU with its debugger")?;
            Ok(DebugVcpu {
                fd,
                blocks_interrupts: flags & KVM_GUESTDBG_BLOCKIRQ != 0,
            })
        };
        vcpus.iter().map(handle).collect()
    }
}

impl DebugVcpu {
    /// General registers (KVM_GET_REGS).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn registers(&self) -> Result<kvm_regs, Error> {
        self.fd.get_regs().map_err(failed("read registers"))
    }

    /// Sets general registers (KVM_SET_REGS).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_registers(&self, registers: &kvm_regs) -> Result<(), Error> {
        self.fd.set_regs(registers).map_err(failed("set registers"))
    }

    /// Segments and control registers (KVM_GET_SREGS).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn special_registers(&self) -> Result<kvm_sregs, Error> {
        self.fd
            .get_sregs()
            .map_err(failed("read special registers"))
    }

    /// Floating-point and SSE registers (KVM_GET_FPU).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn fpu(&self) -> Result<kvm_fpu, Error> {
        self.fd
            .get_fpu()
            .map_err(failed("read floating-point registers"))
    }

    /// Where the vCPU now finds linear address `address` (KVM_TRANSLATE): guest-physical; None if it is not mapped.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn translate(&self, address: u64) -> Result<Option<u64>, Error> {
        let found = self.fd.translate_gva(address);
        let found = found.map_err(failed("translate an address"))?;
        Ok((found.valid != 0).then_some(found.physical_address))
    }

    /// What the vCPU comes back for from now on (KVM_SET_GUEST_DEBUG).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn watch(&self, watched: Watched) -> Result<(), Error> {
        let mut debug = kvm_guest_debug::default();
        if watched != Watched::default() {
            debug.control = KVM_GUESTDBG_ENABLE;
        }
        if watched.step {
            debug.control |= KVM_GUESTDBG_SINGLESTEP;
            if self.blocks_interrupts {
                debug.control |= KVM_GUESTDBG_BLOCKIRQ;
            }
        }
        if let Some((addresses, dr7)) = watched.registers {
            debug.control |= KVM_GUESTDBG_USE_HW_BP;
            let registers = &mut debug.arch.debugreg;
            for (register, address) in registers.iter_mut().zip(addresses) {
                *register = address;
            }
            debug.arch.debugreg[7] = dr7;
        }
        if watched.inject {
            debug.control |= KVM_GUESTDBG_INJECT_DB;
        }
        self.fd
            .set_guest_debug(&debug)
            .map_err(failed("debug a vCPU"))
    }
}

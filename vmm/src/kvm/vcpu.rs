//! One virtual CPU.

use kvm_bindings::{
    CpuId, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};

use super::{Error, MsrChange, failed, kick, msr, registers};
use crate::boot::EntryState;

/// Where an x86 processor begins after a reset, within its code segment.
const RESET_RIP: u64 = 0xfff0;

/// What a guest reaches by ports and MMIO.
pub trait Access {
    /// Reads a port; 1, 2 or 4 bytes.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// Writes a port; 1, 2 or 4 bytes.
    fn port_write(&self, port: u16, data: &[u8]);
    /// Reads at a guest-physical address; 1 to 8 bytes.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// Writes at a guest-physical address; 1 to 8 bytes.
    fn mmio_write(&self, address: u64, data: &[u8]);
}

/// Why a vCPU came back from the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit {
    /// An access, which has been served: go on.
    Served,
    /// Somebody kicked the thread, or a signal came: look for commands.
    Kicked,
    /// The guest halted, and KVM does not wait for the interrupt by itself.
    Halted,
    /// The guest asked for a power-off through KVM.
    Shutdown,
    /// The guest asked for a reset through KVM.
    Reset,
    /// The guest cannot go on; why, and where it was.
    Crashed(String),
    /// A debug exception that a debugger waits for; what DR6 says of it.
    #[cfg(feature = "gdb")]
    Debug(u64),
}

/// A vCPU.
pub struct Vcpu {
    id: u8,
    pub(super) fd: VcpuFd,
}

impl Vcpu {
    /// With `sync_registers` (KVM_CAP_SYNC_REGS), every exit stores the general registers in
    /// `kvm_run`: a sealed thread has no ioctl to ask for them when the guest has crashed.
    pub(super) fn new(id: u8, mut fd: VcpuFd, sync_registers: bool) -> Self {
        if sync_registers {
            fd.set_sync_valid_reg(SyncReg::Register);
        }
        Self { id, fd }
    }

    /// Its number, which is its APIC id.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Sets what CPUID says, then the MSRs of a machine after its firmware, in this order because some
    /// MSRs exist only once CPUID announces them.
    ///
    /// # Errors
    /// When the kernel refuses the CPUID. A refused MSR is a warning.
    pub fn set_features(&self, cpuid: &CpuId) -> Result<(), Error> {
        self.fd
            .set_cpuid2(cpuid)
            .map_err(failed("set a vCPU's CPUID"))?;
        msr::set_boot_msrs(&self.fd)
    }

    /// Changes registers as a CPU template asks, after [`Vcpu::set_features`].
    ///
    /// # Errors
    /// When KVM refuses to read or to set one of them.
    pub fn change_msrs(&self, changes: &[MsrChange]) -> Result<(), Error> {
        msr::change(&self.fd, changes)
    }

    /// Lets the guest's first instruction be the one that `entry` names. For vCPU 0 alone; the others
    /// wait for their start-up interrupt.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_entry(&self, entry: &EntryState) -> Result<(), Error> {
        let mut special = self
            .fd
            .get_sregs()
            .map_err(failed("read special registers"))?;
        registers::enter_mode(&mut special, entry.protocol);
        self.fd
            .set_sregs(&special)
            .map_err(failed("set special registers"))?;
        self.fd
            .set_regs(&registers::general(entry))
            .map_err(failed("set registers"))
    }

    /// Makes the calling thread the one that runs this vCPU, so that kicks find it.
    pub fn attach(&mut self) {
        kick::attach(self.fd.get_kvm_run());
    }

    /// Runs the guest until it comes back, and serves the access if that was why (KVM_RUN).
    pub fn run(&mut self, access: &impl Access) -> Exit {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                kick::acknowledge();
                return Exit::Kicked;
            }
            // Older kernels do not say where.
            Err(error) if error.errno() == libc::EFAULT => {
                let why =
                    "the host has no memory for an address that the guest used: is it plugged in?";
                return Exit::Crashed(self.describe(why));
            }
            Err(error) => {
                let error = failed("run the guest")(error);
                return Exit::Crashed(self.describe(&error.to_string()));
            }
        };
        match exit {
            // A string instruction brings several accesses at once: which width each of them has
            // is in `kvm_run` alone.
            VcpuExit::IoIn(port, data) => {
                let data: *mut [u8] = data;
                let width = self.port_width();
                // SAFETY: the bytes lie in the mapping of `kvm_run`, behind the structure that
                // `port_width` read, and nothing else refers to them now.
                for access_data in unsafe { &mut *data }.chunks_mut(width) {
                    access.port_read(port, access_data);
                }
                Exit::Served
            }
            VcpuExit::IoOut(port, data) => {
                let data: *const [u8] = data;
                let width = self.port_width();
                // SAFETY: as above.
                for access_data in unsafe { &*data }.chunks(width) {
                    access.port_write(port, access_data);
                }
                Exit::Served
            }
            VcpuExit::MmioRead(address, data) => {
                access.mmio_read(address, data);
                Exit::Served
            }
            VcpuExit::MmioWrite(address, data) => {
                access.mmio_write(address, data);
                Exit::Served
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => Exit::Kicked,
            VcpuExit::Hlt => Exit::Halted,
            #[cfg(feature = "gdb")]
            VcpuExit::Debug(debug) => Exit::Debug(debug.dr6),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Exit::Shutdown,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Exit::Reset,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => {
                Exit::Crashed(self.describe("the guest reported that it crashed"))
            }
            VcpuExit::Shutdown => Exit::Crashed(self.describe("triple fault (KVM_EXIT_SHUTDOWN)")),
            VcpuExit::InternalError => {
                let why = self.internal_error();
                Exit::Crashed(self.describe(&why))
            }
            VcpuExit::FailEntry(reason, cpu) => Exit::Crashed(self.describe(&format!(
                "the CPU refused to enter the guest, reason {reason:#x} on host CPU {cpu}"
            ))),
            VcpuExit::MemoryFault { flags, gpa, size } => Exit::Crashed(self.describe(&format!(
                "the host has no memory for guest address {gpa:#x}+{size:#x}, flags {flags:#x}"
            ))),
            other => {
                let why = format!("unexpected exit {other:?}");
                Exit::Crashed(self.describe(&why))
            }
        }
    }

    /// Width in bytes of each access of the port exit that just happened.
    fn port_width(&mut self) -> usize {
        // SAFETY: called for KVM_EXIT_IO alone, where the kernel has filled in `io`.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        usize::from(io.size).max(1)
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: called for KVM_EXIT_INTERNAL_ERROR alone, where the kernel has filled it in.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let kind = match internal.suberror {
            kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => {
                "KVM cannot emulate the guest's instruction"
            }
            kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions at once",
            kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
            _ => "of an unknown kind",
        };
        let count = usize::try_from(internal.ndata).unwrap_or(usize::MAX);
        let data = internal.data.get(..count.min(internal.data.len()));
        format!(
            "KVM internal error {} ({kind}), data {:x?}",
            internal.suberror,
            data.unwrap_or_default()
        )
    }

    /// `why`, with the vCPU and, where KVM left them in `kvm_run`, its instruction pointer.
    fn describe(&mut self, why: &str) -> String {
        let id = self.id;
        let run: &kvm_run = self.fd.get_kvm_run();
        // SAFETY: plain data of the mapping; the bit below says whether the kernel stored them.
        let registers = unsafe { run.s.regs.regs };
        // On AMD a shut-down leaves nothing of the vCPU's state, and KVM resets it.
        if run.kvm_valid_regs == 0 || (registers.rip, registers.rsp) == (RESET_RIP, 0) {
            return format!("vCPU {id}: {why}");
        }
        format!(
            "vCPU {id}: {why}, rip {:#x}, rsp {:#x}",
            registers.rip, registers.rsp
        )
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        kick::detach();
    }
}

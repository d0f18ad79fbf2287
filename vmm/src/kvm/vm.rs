//! The virtual machine as KVM has it.

use std::fs::File;
use std::os::fd::IntoRawFd;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use log::{debug, warn};
use vm_memory::{Address, GuestMemoryBackend as _, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::vcpu::Vcpu;
use super::{Error, failed, irq};
use crate::memory::file_mapping::FileMapping;
use crate::memory::{DirtyPages, GuestMemory, dirty, layout};

/// The version of the interface since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// A virtual machine.
pub struct Vm {
    pub(super) kvm: Kvm,
    pub(super) fd: Arc<VmFd>,
    /// What the memslots point to: mapped as long as the machine can touch it.
    memory: Option<GuestMemory>,
    /// Likewise the files in the guest's address space.
    files: Vec<MappedFile>,
    /// Number of the next memslot.
    next_slot: u32,
    /// Numbers before it that are free again.
    free_slots: Vec<u32>,
}

/// Memslot `slot` for `region`.
fn memslot(
    slot: u32,
    region: &GuestRegionMmap<DirtyPages>,
    log: bool,
) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot,
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
    }
}

/// A file in the guest's address space.
struct MappedFile {
    address: u64,
    mapping: Arc<FileMapping>,
    /// One for each of its pieces.
    slots: Vec<u32>,
}

impl Vm {
    /// Creates a machine without memory, interrupt controllers or vCPUs (KVM_CREATE_VM). To be called
    /// before much is mapped: its cost grows with the number of mappings.
    ///
    /// # Errors
    /// When `device` is not `/dev/kvm`, or the kernel refuses.
    pub fn new(device: File) -> Result<Self, Error> {
        use std::os::fd::FromRawFd;
        // SAFETY: the descriptor comes out of an owned File and is owned by nobody else. Whether
        // it is KVM's is what the next call finds out.
        let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(Error::ApiVersion(version));
        }
        let fd = loop {
            match kvm.create_vm() {
                Ok(fd) => break fd,
                // A signal while the kernel waits for a lock of its own: try again (KVM API 4.2).
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(failed("create a machine")(error)),
            }
        };
        Ok(Self {
            kvm,
            fd: Arc::new(fd),
            memory: None,
            files: Vec::new(),
            next_slot: 0,
            free_slots: Vec::new(),
        })
    }

    /// What the host's CPUs and KVM offer to guests (KVM_GET_SUPPORTED_CPUID).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn supported_cpuid(&self) -> Result<CpuId, Error> {
        self.kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("read the supported CPUID"))
    }

    /// Whether KVM has the capability of this number (KVM_CHECK_EXTENSION).
    pub fn has_capability(&self, number: u32) -> bool {
        self.fd.check_extension_raw(number.into()) > 0
    }

    /// Whether the local APIC's timer has a TSC-deadline mode (not in the supported CPUID).
    pub fn has_tsc_deadline(&self) -> bool {
        self.fd.check_extension(Cap::TscDeadlineTimer)
    }

    /// Makes `memory` the guest's memory, one memslot a region.
    ///
    /// # Errors
    /// When a guest with so many physical address bits does not reach all of it, or the kernel
    /// refuses a memslot.
    pub fn set_memory(&mut self, memory: &GuestMemory, bits: u8) -> Result<(), Error> {
        let last = memory.last_addr().raw_value();
        if last.checked_shr(bits.into()).unwrap_or(0) != 0 {
            let end = last.saturating_add(1);
            return Err(Error::AddressSpace { end, bits });
        }
        // Kept from here on, so that it outlives the memslots.
        self.memory = Some(memory.clone());
        for region in memory.iter() {
            let slot = memslot(self.take_slot(), region, dirty::of(region).is_tracking());
            // SAFETY: the region is mapped with this length and stays so as long as `self.memory`,
            // which lives as long as the machine; regions of a GuestMemory do not overlap.
            unsafe { self.fd.set_user_memory_region(slot) }
                .map_err(failed("give the guest so much memory (`mem_size_mib`)"))?;
        }
        Ok(())
    }

    /// Has KVM keep which pages the guest writes from now on, or no longer. Its vCPUs may run.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn log_writes(&self, log: bool) -> Result<(), Error> {
        let regions = self.memory.iter().flat_map(|memory| memory.iter());
        for (number, region) in (0..).zip(regions) {
            // SAFETY: the memslot is as `set_memory` made it, but for the log.
            unsafe { self.fd.set_user_memory_region(memslot(number, region, log)) }
                .map_err(failed("keep which pages the guest writes"))?;
        }
        Ok(())
    }

    fn take_slot(&mut self) -> u32 {
        if let Some(slot) = self.free_slots.pop() {
            return slot;
        }
        let slot = self.next_slot;
        self.next_slot = slot.saturating_add(1);
        slot
    }

    /// Puts a file into the guest's address space at `address`, one memslot a piece. A guest's write to one that is
    /// read-only is an access without memory, which no device claims.
    ///
    /// # Errors
    /// When a guest with so many physical address bits does not reach all of it, or the kernel
    /// refuses a memslot; nothing of it is there then.
    pub fn map_file(
        &mut self,
        mapping: Arc<FileMapping>,
        address: u64,
        bits: u8,
    ) -> Result<(), Error> {
        let end = address.saturating_add(mapping.size());
        if end.saturating_sub(1).checked_shr(bits.into()).unwrap_or(0) != 0 {
            return Err(Error::AddressSpace { end, bits });
        }
        let pieces: Vec<_> = mapping.pieces().collect();
        let slots: Vec<u32> = pieces.iter().map(|_| self.take_slot()).collect();
        // Kept from here on, so that it outlives the memslots.
        self.files.push(MappedFile {
            address,
            mapping: Arc::clone(&mapping),
            slots: slots.clone(),
        });
        for (piece, number) in pieces.into_iter().zip(slots) {
            let slot = kvm_userspace_memory_region {
                slot: number,
                guest_phys_addr: address.saturating_add(piece.offset),
                memory_size: piece.len,
                userspace_addr: piece.host_address,
                flags: if mapping.is_read_only() {
                    KVM_MEM_READONLY
                } else {
                    0
                },
            };
            // SAFETY: the piece is mapped with this length and stays so as long as `self.files` has it, which
            // lives as long as the machine; nothing in this process refers to its bytes. KVM refuses slots that
            // overlap.
            let set = unsafe { self.fd.set_user_memory_region(slot) };
            if let Err(error) = set {
                // The one that was pushed last, whatever else begins there.
                self.unmap(self.files.len().saturating_sub(1))?;
                return Err(failed("put a file into the guest's address space")(error));
            }
        }
        Ok(())
    }

    /// Takes the file at `address` out of the guest's address space, if there is one, and unmaps it.
    ///
    /// # Errors
    /// When the kernel refuses; the file stays mapped then.
    pub fn unmap_file(&mut self, address: u64) -> Result<(), Error> {
        let mut files = self.files.iter();
        match files.position(|file| file.address == address) {
            Some(at) => self.unmap(at),
            None => Ok(()),
        }
    }

    fn unmap(&mut self, at: usize) -> Result<(), Error> {
        let slots = self.files.get(at).map(|file| file.slots.clone());
        for slot in slots.iter().flatten() {
            // One of no length is none. Deleting what was not set is refused by EINVAL.
            let none = kvm_userspace_memory_region {
                slot: *slot,
                ..Default::default()
            };
            // SAFETY: it takes memory away from the guest and refers to none.
            match unsafe { self.fd.set_user_memory_region(none) } {
                Err(error) if error.errno() != libc::EINVAL => {
                    return Err(failed("take a file out of the guest's address space")(
                        error,
                    ));
                }
                _ => {}
            }
        }
        // KVM has let go of the memory: the mapping may go.
        if at < self.files.len() {
            self.free_slots.extend(self.files.swap_remove(at).slots);
        }
        Ok(())
    }

    /// Where files are in the guest's address space: address and size in bytes, in no order.
    pub fn mapped_files(&self) -> impl Iterator<Item = (u64, u64)> {
        let files = self.files.iter();
        files.map(|file| (file.address, file.mapping.size()))
    }

    /// Creates the local APICs' and the I/O APIC's model, and an i8254 with `pit`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn create_irqchip(&self, pit: bool) -> Result<(), Error> {
        // Intel without unrestricted guest needs pages in the guest's address space for real mode.
        self.fd
            .set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(failed("place the identity map"))?;
        let tss = usize::try_from(layout::KVM_TSS).map_err(|_| Error::TooManyEntries("TSS"))?;
        self.fd
            .set_tss_address(tss)
            .map_err(failed("place the TSS"))?;
        self.fd
            .create_irq_chip()
            .map_err(failed("create the interrupt controllers"))?;
        if pit {
            // With the port that switches and reads the third counter: guests calibrate by it.
            let config = kvm_pit_config {
                flags: KVM_PIT_SPEAKER_DUMMY,
                ..Default::default()
            };
            self.fd
                .create_pit2(config)
                .map_err(failed("create the i8254 timer"))?;
        }
        Ok(())
    }

    /// Takes the performance counters away from the guest. Its CPUID names none, but AMD's oldest ones
    /// have no CPUID bit: a guest could count with them whatever it is told. To be called before any
    /// vCPU is created; a kernel that cannot (before 5.18) is left as it is.
    pub fn disable_pmu(&self) {
        let capability = KVM_CAP_PMU_CAPABILITY;
        let offered = self.fd.check_extension_raw(capability.into());
        if offered & KVM_PMU_CAP_DISABLE.cast_signed() == 0 {
            return debug!("KVM has no switch for the performance counters");
        }
        let mut request = kvm_enable_cap {
            cap: capability,
            ..Default::default()
        };
        if let Some(flags) = request.args.first_mut() {
            *flags = KVM_PMU_CAP_DISABLE.into();
        }
        if let Err(error) = self.fd.enable_cap(&request) {
            warn!("KVM leaves the performance counters to the guest: {error}");
        }
    }

    /// Creates vCPUs 0 to `count` - 1, whose APIC ids are the same numbers.
    ///
    /// # Errors
    /// When the host allows fewer, or the kernel refuses.
    pub fn create_vcpus(&self, count: u8) -> Result<Vec<Vcpu>, Error> {
        let allowed = self.kvm.get_max_vcpus();
        if usize::from(count) > allowed {
            return Err(Error::TooManyVcpus {
                wanted: count,
                allowed,
            });
        }
        // The answer is the set of registers that can be stored; general ones are bit 0.
        let sync_registers = self.fd.check_extension_int(Cap::SyncRegs) & 1 != 0;
        (0..count)
            .map(|id| {
                let fd = self.fd.create_vcpu(u64::from(id));
                let fd = fd.map_err(failed("create a vCPU"))?;
                Ok(Vcpu::new(id, fd, sync_registers))
            })
            .collect()
    }

    /// Sets the table of interrupt routes, once: every pin of the I/O APIC under its own number.
    /// With `pic`, the first 16 also reach the i8259 pair.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_gsi_routing(&self, pic: bool) -> Result<(), Error> {
        self.fd
            .set_gsi_routing(&irq::routes(pic)?)
            .map_err(failed("set the interrupt routes"))
    }

    /// Makes a write to `irq` an edge on interrupt pin `gsi` (KVM_IRQFD).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn register_irqfd(&self, irq: &EventFd, gsi: u32) -> Result<(), Error> {
        self.fd
            .register_irqfd(irq, gsi)
            .map_err(failed("bind an interrupt"))
    }

    /// Makes a write of `value`, in its width, to `address` a write to `event` (KVM_IOEVENTFD), with no
    /// exit to user space. To be called after everything else: it makes later memslot changes slow.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn register_ioeventfd(
        &self,
        event: &EventFd,
        address: u64,
        value: impl Into<u64>,
    ) -> Result<(), Error> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(failed("bind a doorbell"))
    }

    /// What sends message-signalled interrupts.
    ///
    /// # Errors
    /// When this kernel's KVM cannot (before Linux 3.5).
    pub fn msi_port(&self) -> Result<MsiPort, Error> {
        if self.fd.check_extension(Cap::SignalMsi) {
            Ok(MsiPort(Arc::clone(&self.fd)))
        } else {
            Err(Error::NoMsi)
        }
    }
}

/// Sends message-signalled interrupts (KVM_SIGNAL_MSI), with no route set up before.
pub struct MsiPort(Arc<VmFd>);

impl MsiPort {
    /// Sends one to the local APIC that `address` names. It fails for an APIC that is not there, and is lost then
    /// as it is on a wire.
    pub fn send(&self, address: u64, data: u32) {
        let sent = self.0.signal_msi(kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        });
        if let Err(error) = sent {
            debug!("KVM does not send {data:#x} to {address:#x}: {error}");
        }
    }
}

#[cfg(test)]
#[path = "vm_tests.rs"]
mod tests;

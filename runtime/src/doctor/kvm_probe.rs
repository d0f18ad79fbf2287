//! Measures how `/dev/kvm` runs the kernel mode of a guest.
//!
//! Some hosts (virtual machines without nested virtualization) offer a `/dev/kvm` that runs user-mode guest code at
//! native speed and *interprets* kernel-mode code, about a thousand times slower; a Linux guest does not get far
//! there. No capability of KVM tells, so a loop of known length is timed in ring 0.
// Handing memory to KVM is unsafe by the type of the call; it is this module's whole purpose.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

/// The only stable API version of KVM (KVM API, 4.1 `KVM_GET_API_VERSION`).
pub const API_VERSION: i32 = 12;
/// Turns of the timed loop: 10 µs natively, 25 ms in an interpreter.
const TURNS: u32 = 20_000;
/// A turn that takes longer than this is interpreted. Natively it takes 0.3 ns, on a software-emulated host
/// some 10 ns, in KVM's instruction emulator over 1000 ns.
const NATIVE_LIMIT: Duration = Duration::from_nanos(150);
/// How often the loop is timed; the fastest counts, so that a busy host is not taken for a slow one.
const REPEATS: u32 = 5;

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A KVM call failed.
    #[error("{call}: {source}")]
    Call {
        /// The call's name.
        call: &'static str,
        /// Its error.
        source: kvm_ioctls::Error,
    },
    /// The guest did not halt where it should.
    #[error("the test guest ended with {0} instead of a halt")]
    UnexpectedExit(String),
}

/// One page of guest memory: code at its start.
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Times one turn of a loop of two instructions in ring 0.
pub fn time_per_turn(kvm: &Kvm) -> Result<Duration, Error> {
    let call = |call| move |source| Error::Call { call, source };
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;

    let mut page = Box::new(Page([0; 4096]));
    // dec ecx; jnz -4; hlt
    for (place, byte) in page.0.iter_mut().zip([0x49, 0x75, 0xfd, 0xf4]) {
        *place = byte;
    }
    let page = Box::into_raw(page);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: 4096,
        userspace_addr: page as u64,
    };
    // SAFETY: `page` is one aligned, initialised page that stays allocated until after `vm` and its vCPU are gone
    // (freed below), and no reference to it exists while the guest can write to it.
    let result = unsafe { vm.set_user_memory_region(region) }
        .map_err(call("KVM_SET_USER_MEMORY_REGION"))
        .and_then(|()| {
            let mut vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
            measure(&mut vcpu)
        });
    drop(vm);
    // SAFETY: from `Box::into_raw` above; the VM and its vCPU, the only other users, were dropped.
    drop(unsafe { Box::from_raw(page) });
    result
}

/// Best time per turn, without the cost of entering and leaving the guest.
fn measure(vcpu: &mut VcpuFd) -> Result<Duration, Error> {
    // The first run pays for page faults and lazy set-up.
    time_run(vcpu, 1)?;
    let (mut short, mut long) = (Duration::MAX, Duration::MAX);
    for _ in 0..REPEATS {
        short = short.min(time_run(vcpu, 1)?);
        long = long.min(time_run(vcpu, TURNS)?);
    }
    Ok(long.saturating_sub(short) / TURNS)
}

/// Runs the loop `turns` times in flat 32-bit protected mode, ring 0, until it halts.
///
/// Not in real mode: that one is emulated on older native hosts too.
fn time_run(vcpu: &mut VcpuFd, turns: u32) -> Result<Duration, Error> {
    let call = |call| move |source| Error::Call { call, source };
    let mut sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(0x8, 0xb);
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = flat(0x10, 0x3);
    }
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;

    let mut regs = vcpu.get_regs().map_err(call("KVM_GET_REGS"))?;
    regs.rip = 0;
    regs.rcx = u64::from(turns);
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;

    let start = Instant::now();
    // Without an in-kernel interrupt controller a halt comes back to us.
    match vcpu.run().map_err(call("KVM_RUN"))? {
        VcpuExit::Hlt => Ok(start.elapsed()),
        other => Err(Error::UnexpectedExit(format!("{other:?}"))),
    }
}

/// Whether a time per turn is that of a processor.
pub fn is_native(per_turn: Duration) -> bool {
    per_turn <= NATIVE_LIMIT
}

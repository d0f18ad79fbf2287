//! Calling a vCPU thread out of KVM_RUN, without a moment in which the call is lost.
//!
//! The signal's handler sets `kvm_run.immediate_exit`. If the thread is in KVM_RUN, the signal itself ends
//! that; if it is anywhere else, the next KVM_RUN returns at once (KVM API, section 5).

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use libc::siginfo_t;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::Error;

thread_local! {
    /// This thread's `kvm_run.immediate_exit`. Constant and without a destructor, so that the
    /// signal handler's access is one to plain thread-local memory.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that kicks a vCPU thread.
pub fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// Installs the handler of [`kick_signal`], for all threads. Once, before vCPU threads start.
///
/// # Errors
/// When the kernel refuses.
pub fn install_kick_handler() -> Result<(), Error> {
    register_signal_handler(kick_signal(), on_kick).map_err(super::failed("handle kicks"))
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    set(1);
}

/// Says which vCPU this thread runs.
pub(super) fn attach(run: &mut kvm_run) {
    IMMEDIATE_EXIT.set(&raw mut run.immediate_exit);
}

/// Says that this thread runs none any more.
pub(super) fn detach() {
    IMMEDIATE_EXIT.set(ptr::null_mut());
}

/// Forgets kicks up to now. Whoever kicked has said before what it wants, so: first this, then look.
pub(super) fn acknowledge() {
    set(0);
}

fn set(value: u8) {
    let flag = IMMEDIATE_EXIT.get();
    if flag.is_null() {
        return;
    }
    // SAFETY: `attach` took the pointer from the mapping of this thread's vCPU, and `Vcpu::drop`
    // detaches before that is unmapped. Thread and handler are the same thread, the kernel
    // only reads it: an atomic byte suffices.
    unsafe { AtomicU8::from_ptr(flag) }.store(value, Ordering::Relaxed);
}

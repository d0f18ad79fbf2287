//! Entering a filter, and the two things a thread needs for that to be no silent death: SIGSYS
//! unblocked, and a handler that reports. The only module of this crate with `unsafe`.
#![allow(unsafe_code)] // prctl, seccomp, sigaction and a signal handler have no safe form.

mod reporter;

use std::io;

use thiserror::Error;

use crate::{Patch, Role, Stage, program};

pub use reporter::install_violation_reporter;

/// Why a thread could not enter a filter.
#[derive(Debug, Error)]
pub enum Error {
    /// no_new_privs, without which an unprivileged thread may not enter a filter.
    #[error("set no_new_privs: {0}")]
    NoNewPrivs(#[source] io::Error),
    /// The signal mask could not be changed.
    #[error("unblock SIGSYS: {0}")]
    Unblock(#[source] io::Error),
    /// The kernel refused the filter.
    #[error("enter the seccomp filter of role {role}, stage {stage}: {source}")]
    Seccomp {
        /// Whose filter.
        role: &'static str,
        /// Which one.
        stage: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Puts the calling thread, and every thread and process it starts from now on, under the filter
/// of `role` in `stage`, for good. Also sets no_new_privs and unblocks SIGSYS.
///
/// # Errors
/// When the kernel refuses; the thread is then not under the filter.
pub fn install(role: Role, stage: Stage) -> Result<(), Error> {
    unblock_sigsys()?;
    // SAFETY: this prctl takes no pointers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(Error::NoNewPrivs(io::Error::last_os_error()));
    }
    let refused = |source| Error::Seccomp {
        role: role.name(),
        stage: stage.name(),
        source,
    };
    let mut program = program(role, stage, &Patch::of_this_process());
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len())
            .map_err(|_| refused(io::Error::from_raw_os_error(libc::E2BIG)))?,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: `filter` points to `len` instructions that live through the call, and the kernel
    // copies them. A filter can only refuse calls, it touches no memory.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const filter,
        )
    };
    if result != 0 {
        return Err(refused(io::Error::last_os_error()));
    }
    Ok(())
}

/// Unblocks SIGSYS in the calling thread: the kernel kills a thread that violates its filter
/// while the signal is blocked, and nobody would learn why.
fn unblock_sigsys() -> Result<(), Error> {
    // SAFETY: sigset_t is plain data, initialized by sigemptyset before it is used, and the
    // pointers are to live locals.
    let result = unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigaddset(&raw mut signals, libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const signals, std::ptr::null_mut())
    };
    if result != 0 {
        return Err(Error::Unblock(io::Error::from_raw_os_error(result)));
    }
    Ok(())
}

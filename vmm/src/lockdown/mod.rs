//! The VMM's own walls: seccomp per thread and Landlock for the process.
//!
//! The order in `main`, which nothing may swap:
//!
//! 1. [`install_violation_reporter`], so that no violation is a silent death;
//! 2. [`name_thread`]`("control")`; without a jailer, everything is opened now and the broker is
//!    forked now, for the setup filter allows neither;
//! 3. [`enter`]`(Control, Setup)`, then [`landlock_nothing`]: while the process has one thread, for
//!    a Landlock domain holds for the calling thread and those it starts;
//! 4. configuration, kernel and devices are parsed; KVM is set up; threads are started;
//! 5. each thread, control last, calls [`enter`]`(its role, Sealed)` and waits at a barrier;
//! 6. the guest's first instruction.

mod landlock;

use thiserror::Error;

pub use casemate_seccomp_filters::{EXIT_VIOLATION, Role, Stage};

pub use landlock::{LandlockOutcome, landlock_nothing};

/// Why a wall could not be put up.
#[derive(Debug, Error)]
pub enum Error {
    /// The seccomp filter.
    #[error("lock down: {0}")]
    Seccomp(#[from] casemate_seccomp_filters::Error),
    /// The handler of violations.
    #[error("lock down: install the SIGSYS handler: {0}")]
    Reporter(#[source] std::io::Error),
    /// Tracing and core dumps could not be forbidden.
    #[error("lock down: forbid tracing and core dumps: {0}")]
    Dumpable(#[source] nix::errno::Errno),
    /// The Landlock domain.
    #[error("lock down: enter the Landlock domain: {0}")]
    Landlock(#[from] ::landlock::RulesetError),
    /// The kernel has no Landlock.
    #[error(
        "lock down: this kernel offers no Landlock ({0}); enable it (lsm=landlock,...) or allow its absence"
    )]
    NoLandlock(&'static str),
}

/// Everything is open: from here on nothing can be opened any more. While the process has one thread.
///
/// # Errors
/// When the kernel refuses a wall; nothing of a guest may run then.
pub fn lock_down() -> Result<(), Error> {
    let role = if cfg!(feature = "gdb") {
        Role::Debugged
    } else {
        Role::Control
    };
    enter(role, Stage::Setup)?;
    // Whether its absence is tolerable is the jailer's decision, and it has been made.
    let outcome = landlock_nothing(true)?;
    log::info!("{outcome}");
    Ok(())
}

/// Puts the calling thread under the filter of `role` in `stage`, for good.
///
/// The first of them also makes the process one that nobody of its user can trace (its broker and the
/// runtime's monitor are of that user, too), and of which no core, with the guest's memory, is dumped.
///
/// # Errors
/// When the kernel refuses; nothing of a guest may run then.
pub fn enter(role: Role, stage: Stage) -> Result<(), Error> {
    if stage == Stage::Setup {
        // exec has undone what the jailer did about it.
        nix::sys::prctl::set_dumpable(false).map_err(Error::Dumpable)?;
    }
    Ok(casemate_seccomp_filters::install(role, stage)?)
}

/// Makes a seccomp violation end the process with a line on standard error and exit code
/// [`EXIT_VIOLATION`].
///
/// # Errors
/// When the handler can't be installed.
pub fn install_violation_reporter() -> Result<(), Error> {
    casemate_seccomp_filters::install_violation_reporter().map_err(Error::Reporter)
}

/// The calling thread's name, up to its first zero byte. Safe in a signal handler.
pub fn thread_name() -> [u8; 16] {
    let mut name = [0_u8; 16];
    #[allow(unsafe_code)] // As below.
    // SAFETY: PR_GET_NAME writes 16 bytes at most, into an array of that size.
    unsafe {
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr(), 0, 0, 0);
    }
    name
}

/// Names the calling thread, of which the first 15 bytes count, in reports and in `/proc`.
/// Threads started with [`std::thread::Builder`] have their names already.
pub fn name_thread(name: &str) {
    let mut bytes = [0_u8; 16];
    for (place, byte) in bytes.iter_mut().take(15).zip(name.bytes()) {
        *place = byte;
    }
    #[allow(unsafe_code)] // PR_SET_NAME has no safe form in the libraries at hand.
    // SAFETY: PR_SET_NAME reads at most 16 bytes of a live array that ends in a zero byte.
    unsafe {
        // It fails for an invalid pointer alone.
        libc::prctl(libc::PR_SET_NAME, bytes.as_ptr(), 0, 0, 0);
    }
}

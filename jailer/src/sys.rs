//! System calls that no safe wrapper offers.
#![allow(unsafe_code)] // The jailer's only unsafe module: thin wrappers, each with its reason.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, Pid};

/// Secure bits (`capabilities(7)`): root's uid gives no capabilities, the change of user keeps
/// none, ambient ones cannot be raised; each locked, so that it stays so.
const SECURE_BITS: libc::c_ulong = 0b1110_1011;

/// Closes every descriptor of 3 and more except `keep`.
///
/// # Errors
/// `ENOSYS` before Linux 5.9.
pub fn close_all_but(keep: Option<RawFd>) -> nix::Result<()> {
    const FIRST: u32 = 3;
    match keep.and_then(|number| u32::try_from(number).ok()) {
        Some(number) => {
            if let Some(last) = number.checked_sub(1).filter(|last| *last >= FIRST) {
                close_range(FIRST, last)?;
            }
            close_range(number.saturating_add(1).max(FIRST), u32::MAX)
        }
        None => close_range(FIRST, u32::MAX),
    }
}

fn close_range(first: u32, last: u32) -> nix::Result<()> {
    // SAFETY: called before this program has opened anything, so nothing owns these numbers.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0u32) }).map(drop)
}

/// Gives SIGCHLD its default meaning: if the caller ignores it, children's exit codes are lost.
///
/// # Errors
/// What `sigaction(2)` says.
pub fn default_sigchld() -> nix::Result<()> {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed, so none can run at a bad time.
    unsafe { sigaction(Signal::SIGCHLD, &action) }.map(drop)
}

/// Leaves real-time and deadline scheduling for the ordinary kind; batch and idle stay.
///
/// # Errors
/// What `sched_setscheduler(2)` says.
pub fn leave_real_time() -> nix::Result<()> {
    // SAFETY: no pointers.
    let policy = Errno::result(unsafe { libc::sched_getscheduler(0) })?;
    match policy & !libc::SCHED_RESET_ON_FORK {
        libc::SCHED_OTHER | libc::SCHED_BATCH | libc::SCHED_IDLE => Ok(()),
        _ => {
            let ordinary = libc::sched_param { sched_priority: 0 };
            // SAFETY: the kernel reads one sched_param, which lives here.
            Errno::result(unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, &ordinary) })
                .map(drop)
        }
    }
}

/// Raises a negative nice value to 0.
///
/// # Errors
/// What `getpriority(2)` or `setpriority(2)` says.
pub fn raise_nice_to_zero() -> nix::Result<()> {
    // A nice value of -1 looks like an error.
    Errno::clear();
    // SAFETY: no pointers.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    if nice == -1 && Errno::last_raw() != 0 {
        return Err(Errno::last());
    }
    if nice >= 0 {
        return Ok(());
    }
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 0) }).map(drop)
}

/// Forks.
///
/// # Errors
/// What `fork(2)` says.
pub fn fork() -> nix::Result<ForkResult> {
    // SAFETY: the jailer never creates a thread, so the child has everything that the parent has.
    unsafe { nix::unistd::fork() }
}

/// A descriptor for a process, which its number's next owner cannot inherit.
///
/// # Errors
/// What `pidfd_open(2)` says.
pub fn pidfd_open(process: Pid) -> nix::Result<OwnedFd> {
    // SAFETY: no pointers. PIDFD_NONBLOCK is not needed, and the descriptor is close-on-exec.
    let number =
        Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, process.as_raw(), 0u32) })?;
    let number = RawFd::try_from(number).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sends a signal to the process of a pidfd.
///
/// # Errors
/// What `pidfd_send_signal(2)` says; `ESRCH` once it has ended.
pub fn pidfd_send_signal(process: BorrowedFd<'_>, signal: Signal) -> nix::Result<()> {
    let info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: without siginfo the kernel fills it in as kill(2) does.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal as libc::c_int,
            info,
            0u32,
        )
    };
    Errno::result(result).map(drop)
}

/// Empties the bounding set but for the bits of `keep`: every number that the kernel knows, which may be more than
/// we do.
///
/// # Errors
/// `EPERM` without CAP_SETPCAP.
pub fn drop_bounding_set(keep: u64) -> nix::Result<()> {
    for capability in (0..64).filter(|number| keep >> number & 1 == 0) {
        // SAFETY: no pointers.
        let result =
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability as libc::c_ulong, 0, 0, 0) };
        match Errno::result(result) {
            Ok(_) => {}
            // The first number that the kernel does not know.
            Err(Errno::EINVAL) if capability > 0 => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Another descriptor for an open file, of at least that number, which closes at exec.
///
/// # Errors
/// What `fcntl(2)` says.
pub fn duplicate_from(file: BorrowedFd<'_>, least: RawFd) -> nix::Result<OwnedFd> {
    let number = fcntl(file, FcntlArg::F_DUPFD_CLOEXEC(least))?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes `number` another descriptor for an open file, which exec keeps, whatever it was before.
///
/// # Errors
/// What `dup2(2)` says.
pub fn duplicate_as(file: BorrowedFd<'_>, number: RawFd) -> nix::Result<()> {
    // SAFETY: called right before exec or exit, so no owner of that number uses it any more.
    Errno::result(unsafe { libc::dup2(file.as_raw_fd(), number) }).map(drop)
}

/// Sets and locks the secure bits.
///
/// # Errors
/// `EPERM` without CAP_SETPCAP.
pub fn lock_secure_bits() -> nix::Result<()> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECURE_BITS, 0, 0, 0) }).map(drop)
}

/// Leaves the session keyring for a new, empty one (`keyctl(2)`).
///
/// # Errors
/// What `keyctl(2)` says; a kernel without keyrings has none to leave.
pub fn new_session_keyring() -> nix::Result<()> {
    let name: *const libc::c_char = std::ptr::null();
    // SAFETY: without a name the kernel makes a keyring of its own and reads nothing.
    let result =
        unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, name) };
    match Errno::result(result) {
        Err(Errno::ENOSYS) => Ok(()),
        other => other.map(drop),
    }
}

/// Attaches an open `/dev/net/tun` to the interface of that name.
///
/// # Errors
/// What `TUNSETIFF` says; `EINVAL` for a name that is too long.
pub fn attach_tap(tun: BorrowedFd<'_>, name: &str, flags: libc::c_int) -> nix::Result<()> {
    let mut request = empty_request();
    let room = request.ifr_name.len().saturating_sub(1);
    if name.len() > room {
        return Err(Errno::EINVAL);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(|_| Errno::EINVAL)?;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives here; its name ends with a NUL.
    Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) }).map(drop)
}

/// The flags of the interface that a tun descriptor is attached to.
///
/// # Errors
/// What `TUNGETIFF` says.
pub fn tap_flags(tun: BorrowedFd<'_>) -> nix::Result<libc::c_int> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF writes one ifreq, which lives here.
    Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNGETIFF, &mut request) })?;
    // SAFETY: TUNGETIFF has set the flags, and every value of a short is one.
    Ok(unsafe { request.ifr_ifru.ifru_flags }.into())
}

fn empty_request() -> libc::ifreq {
    // SAFETY: ifreq is numbers and arrays of numbers, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

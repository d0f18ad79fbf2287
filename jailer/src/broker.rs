//! The half of the jailer that stays: broker, bearer of signals and of the exit code.
//!
//! It runs in the same namespaces, empty root and user as the VMM, under a Landlock domain that
//! knows only the directories of its policy and a seccomp filter of its own.

use std::os::fd::{AsFd, OwnedFd};

use casemate_broker::{BrokerPolicy, Server, ServerEvent, exit};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::error::{Context, Result, say};
use crate::landlock::Domain;
use crate::sys;

/// The VMM, as its parent sees it.
#[derive(Debug)]
pub struct Child {
    /// Its process id here.
    pub pid: Pid,
    /// Its pidfd.
    pub pidfd: OwnedFd,
}

/// Blocks the signals that the parent forwards or waits for, and makes a descriptor for them.
///
/// Before the fork, or the first ones would be lost; the child lifts it again.
///
/// # Errors
/// What `signalfd(2)` says.
pub fn watch_signals() -> Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
        set.add(signal);
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&set), None).doing("block", "signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .doing("make", "a signal descriptor")
}

/// Blocks no signal.
///
/// # Errors
/// What `sigprocmask(2)` says.
pub fn unblock_signals() -> Result<()> {
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).doing("unblock", "signals")
}

/// Blocks the signals that end a VMM, which keeps them until it asks for them.
///
/// For the first process of a PID namespace: to that one the kernel drops a signal that is neither
/// blocked nor handled, so an early SIGTERM would be lost.
///
/// # Errors
/// What `sigprocmask(2)` says.
pub fn hold_back_signals() -> Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&set), None).doing("hold back", "signals")
}

/// What of the file system the policy needs: to open beneath some directories, to make files beneath others.
pub fn domain(policy: &BrokerPolicy) -> Domain<'_> {
    let beneath = |create| {
        let allowed = policy.allowed.iter();
        let allowed = allowed.filter(move |allowed| allowed.create == create);
        allowed.map(|allowed| allowed.directory.as_fd())
    };
    let chroot = policy.chroot.as_ref().map(AsFd::as_fd);
    Domain::Broker {
        open: beneath(false).collect(),
        create: beneath(true).chain(chroot).collect(),
    }
}

/// Serves until the VMM has ended, and returns the exit code that stands for its end.
///
/// # Errors
/// If waiting fails, which it cannot.
pub fn serve(mut server: Option<Server>, child: &Child, signals: &SignalFd) -> Result<u8> {
    loop {
        match server
            .as_mut()
            .map(|server| server.serve(Some(signals.as_fd())))
        {
            Some(Ok(ServerEvent::Watched)) => {}
            // Its end is closed: nobody asks any more, and the VMM's own end comes by signal.
            Some(Ok(ServerEvent::Closed)) => server = None,
            Some(Err(error)) => {
                say(format!("broker: {error}"));
                server = None;
            }
            None => {
                let mut wait = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
                match poll(&mut wait, PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    other => other.map(drop).doing("wait for", "signals")?,
                }
            }
        }
        while let Some(signal) = signals.read_signal().doing("read", "signals")? {
            if i32::try_from(signal.ssi_signo) == Ok(Signal::SIGCHLD as i32) {
                continue;
            }
            // A terminal's Ctrl-C goes to the VMM, too; a second one would end it harshly.
            if signal.ssi_code == nix::libc::SI_KERNEL {
                continue;
            }
            let number = i32::try_from(signal.ssi_signo).unwrap_or(0);
            if let Ok(signal) = Signal::try_from(number) {
                // ESRCH: it has ended meanwhile, which comes up below.
                let _ = sys::pidfd_send_signal(child.pidfd.as_fd(), signal);
            }
        }
        match waitpid(child.pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => {
                return Ok(u8::try_from(code).unwrap_or(exit::JAIL_FAILED));
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(exit::by_signal(signal as i32)),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).doing("wait for", "the VMM"),
        }
    }
}

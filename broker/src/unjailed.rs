//! A broker for a VMM that runs without a jailer: the same loop in a forked process.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::client::Client;
use crate::fdpass::{Fork, fork_single_threaded};
use crate::policy::BrokerPolicy;
use crate::server::Server;

/// Why no broker was started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start a broker: {action}: {source}")]
pub struct UnjailedError {
    /// What was being done.
    pub action: &'static str,
    /// Why it failed (`EBUSY`: the process has several threads already).
    pub source: Errno,
}

/// Forks a broker with this policy and returns the client for it. It ends with this process, or when the
/// client is dropped.
///
/// `seal` runs in the new process before it reads its first request: install the broker's seccomp
/// filter there. Call it before any thread is created and before descriptors are opened that the
/// broker should not have.
///
/// # Errors
/// If this process has several threads, or the kernel refuses the socket pair or the fork.
pub fn spawn_unjailed<E: std::fmt::Display>(
    policy: BrokerPolicy,
    seal: impl FnOnce() -> Result<(), E>,
) -> Result<Client, UnjailedError> {
    let [socket] = spawn_unjailed_for(policy, seal)?;
    Ok(Client::new(socket))
}

/// The same for so many threads that ask; returns a socket for the [`Client`] of each.
///
/// # Errors
/// As [`spawn_unjailed`].
pub fn spawn_unjailed_for<const THREADS: usize, E: std::fmt::Display>(
    policy: BrokerPolicy,
    seal: impl FnOnce() -> Result<(), E>,
) -> Result<[OwnedFd; THREADS], UnjailedError> {
    let failed = |action| move |source| UnjailedError { action, source };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..THREADS {
        let pair = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        );
        let (our, their) = pair.map_err(failed("socketpair"))?;
        ours.push(our);
        theirs.push(their);
    }
    match fork_single_threaded().map_err(failed("fork"))? {
        Fork::Parent(_) => ours
            .try_into()
            .map_err(|_| failed("socketpair")(Errno::EINVAL)),
        Fork::Child => {
            drop(ours);
            let code = run(Server::with_sockets(theirs, policy), seal);
            std::process::exit(code);
        }
    }
}

fn run<E: std::fmt::Display>(mut server: Server, seal: impl FnOnce() -> Result<(), E>) -> i32 {
    // A broker without its VMM is of no use. It notices the end by its sockets, whose other ends only the
    // VMM has; a signal of the kernel's (PR_SET_PDEATHSIG) would be in the way of clearing up.
    // Only for `ps`.
    let _ = prctl::set_name(c"broker");
    if let Err(error) = seal() {
        log::error!("the broker cannot seal itself: {error}");
        return 1;
    }
    match server.serve(None) {
        Ok(_) => 0,
        Err(error) => {
            log::error!("{error}");
            1
        }
    }
}

//! `casemate monitor`: the only process of ours that reads what a guest writes.
//!
//! It carries the command's streams between the guest's vsock connection and the standard streams, keeps the end of the
//! console, and passes the VMM's log on. `run` starts it, orders and hears through [`wire`]; before the first byte from the
//! guest it gives up everything else ([`sandbox`]).

mod console;
mod session;
mod sink;
pub mod wire;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use casemate_broker::fdpass;
use casemate_init::protocol;
use casemate_seccomp_filters::Role;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};

use crate::cli::MonitorArgs;
use crate::sandbox::{self, Walls};
use session::{End, Session};
use wire::{Event, Setup};

/// Address space of the monitor, in bytes: many times what it needs.
const MAX_MEMORY: u64 = 256 << 20;

/// Why the monitor could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A descriptor that should have been inherited.
    #[error("monitor: {0}")]
    Adopt(#[from] fdpass::AdoptError),
    /// The first packet did not come.
    #[error("monitor: no set-up received: {0}")]
    Receive(Errno),
    /// The first packet makes no sense.
    #[error("monitor: bad set-up: {0}")]
    Setup(#[from] serde_json::Error),
    /// A wall could not be built.
    #[error("monitor: {0}")]
    Sandbox(#[from] sandbox::Error),
    /// The command does not fit into the protocol.
    #[error("{0}")]
    Spec(#[from] protocol::Error),
    /// The handler that names a forbidden system call.
    #[error("monitor: {0}")]
    Reporter(std::io::Error),
    /// Waiting for events failed.
    #[error("monitor: poll: {0}")]
    Poll(Errno),
}

/// The descriptors that the monitor works with.
struct Streams {
    control: OwnedFd,
    listener: Option<UnixListener>,
    console: File,
    log: File,
    console_input: Option<File>,
}

/// Runs until the VMM has ended or `run` is gone.
pub fn main(args: &MonitorArgs) -> Result<(), Error> {
    // First of all, before any number can mean something else.
    let adopt = |number: Option<RawFd>| number.map(fdpass::adopt).transpose();
    let streams = Streams {
        control: fdpass::adopt(args.control)?,
        listener: adopt(args.listener)?.map(UnixListener::from),
        console: fdpass::adopt(args.console)?.into(),
        log: fdpass::adopt(args.log)?.into(),
        console_input: adopt(args.console_input)?.map(File::from),
    };
    // By which `ps` and reports know it; else it would be called after /proc/self/exe.
    let _ = nix::sys::prctl::set_name(c"monitor");
    sandbox::hold_signals()?;
    casemate_seccomp_filters::install_violation_reporter().map_err(Error::Reporter)?;
    let mut kept: Vec<&dyn AsFd> = vec![&streams.control, &streams.console, &streams.log];
    kept.extend(streams.listener.as_ref().map(|fd| fd as &dyn AsFd));
    kept.extend(streams.console_input.as_ref().map(|fd| fd as &dyn AsFd));
    sandbox::close_others(&kept);

    let setup = receive_setup(&streams.control)?;
    // `run` changes and restores the terminal; should it be killed, this process restores it.
    let terminal = tcgetattr(std::io::stdin()).ok();
    let session = Session::new(streams, &setup)?;
    sandbox::enter(&Walls {
        uid: setup.uid,
        role: Role::Monitor,
        memory: MAX_MEMORY,
        allow_missing_landlock: setup.allow_missing_landlock,
    })?;
    let control = session.control();
    wire::report(control, Event::Sealed);
    if session.run()? == End::Orphaned {
        restore(terminal.as_ref());
    }
    Ok(())
}

fn receive_setup(control: &OwnedFd) -> Result<Setup, Error> {
    use std::os::fd::AsRawFd;
    let mut buffer = vec![0; wire::MAX_SETUP];
    let length =
        recv(control.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(Error::Receive)?;
    Ok(serde_json::from_slice(
        buffer.get(..length).unwrap_or_default(),
    )?)
}

fn restore(terminal: Option<&Termios>) {
    if let Some(terminal) = terminal {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, terminal);
    }
}

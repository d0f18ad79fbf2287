//! `casemate migrate`: moves a running machine to another VMM, here or on another host.
//!
//! The two VMMs do all of it ([`moving`](../../../vmm/src/machine/moving.rs)); this process carries the bytes between them, and
//! tells how far they are. Either VMM may have been taken over, and the network is nobody's: so before the first byte of
//! them this process has given up all but its connections ([`sandbox`]).
//!
//! Between two hosts there are two such processes, and TLS between them. Who listens first says, in a line, that its VMM
//! takes a machine; before that the machine's own VMM hears nothing of it.

mod args;
mod coming;
mod ends;
mod frames;
mod leaving;
mod places;
mod relay;
mod show;
mod tls;
mod waiter;
mod watch;

use std::io;

use casemate_seccomp_filters::{Role, install_violation_reporter};
use nix::errno::Errno;
use nix::unistd::geteuid;

pub use args::MigrateArgs;

use self::args::To;
use self::leaving::{Source, depart};
use self::places::Listener;
use self::show::Show;
use self::tls::{Identity, Tls};
use self::waiter::Waiter;
use self::watch::Watch;
use crate::sandbox::{self, Walls};
use crate::{say, state};

/// User and group id of whoever carries a machine. No account has it, nor any machine.
pub const MIGRATION_ID: u32 = 0x6361_0003;
/// Its address space, in bytes.
const MAX_MEMORY: u64 = 1 << 30;

/// Why a machine has not moved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not have a user of its own.
    #[error("a move is root's to start: it changes to a user that has nothing")]
    NotRoot,
    /// The options contradict each other.
    #[error("{0}")]
    Usage(String),
    /// The machine.
    #[error(transparent)]
    State(#[from] state::Error),
    /// It has no API.
    #[error("{0} has no API, and thus cannot be moved: start it with --snapshots or --max-cpus")]
    NoApi(String),
    /// A socket.
    #[error("cannot reach {what}: {source}")]
    Reach {
        /// Which.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// TLS.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// A wall could not be built.
    #[error("migrate: {0}")]
    Sandbox(#[from] sandbox::Error),
    /// Something that should not fail.
    #[error("migrate: {action}: {source}")]
    Call {
        /// What was being done.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// It went wrong before the machine's VMM was asked.
    #[error("{who}: {why}. The machine was not asked to move")]
    NotAsked {
        /// Who.
        who: String,
        /// Why.
        why: String,
    },
    /// A VMM says no.
    #[error("{0} refuses: {1}. The machine runs on where it is")]
    Refused(String, String),
    /// It was not to be, before anything was done.
    #[error("cancelled before anything was moved")]
    NotBegun,
    /// The machine stays.
    #[error("the machine runs on in {from}: {why}")]
    Stays {
        /// Where it is.
        from: String,
        /// Why.
        why: String,
    },
    /// Nobody knows.
    #[error("it is not known where the machine is: {0}")]
    Unknown(String),
    /// Its VMM is no more.
    #[error(
        "{0} has ended while its machine was on its way, and the machine with it: the other VMM was not told to run it"
    )]
    NotGone(String),
    /// The other VMM has not got it.
    #[error("no machine has come: {0}")]
    NotCome(String),
}

fn call(action: &'static str) -> impl FnOnce(Errno) -> Error {
    move |source| Error::Call {
        action,
        source: source.into(),
    }
}

/// Moves a machine, or takes one.
pub fn run(args: &MigrateArgs) -> Result<(), Error> {
    if !geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    let to = args.to().map_err(Error::Usage)?;
    sandbox::close_others(&[]);
    match (&args.listen, &args.from, to) {
        (Some(address), _, To::Here(path)) => {
            let identity = Identity::read(args)?.server()?;
            let api = places::api(&path)?;
            let listener = Listener::bind(address)?;
            let waiter = Waiter::new()?;
            enter(args)?;
            say::line(format_args!("listening on {}", listener.address()));
            let network = coming::accept(&waiter, &listener, &identity)?;
            drop(listener);
            coming::arrive(&waiter, network, (api, &args.to), &args.overrides())
        }
        (None, Some(from), to) => {
            let path = places::source(from)?;
            let source = Source {
                name: path.display().to_string(),
                socket: places::api(&path)?,
                watch: Watch::new(places::api(&path)?),
                show: Show::new(),
            };
            leave(args, source, to)
        }
        _ => Err(Error::Usage("FROM is missing".to_string())),
    }
}

fn leave(args: &MigrateArgs, source: Source, to: To) -> Result<(), Error> {
    match to {
        To::Here(path) => {
            let mut target = places::api(&path)?;
            let waiter = Waiter::new()?;
            enter(args)?;
            waiter.upgrade(
                &mut target,
                &args.to,
                "/migration/receive",
                &args.overrides(),
            )?;
            depart(&waiter, source, Box::new(target), &args.limits())
        }
        To::There(tcp) => {
            let name = args.peer_name.as_deref().unwrap_or(&tcp.host);
            let connection = Identity::read(args)?.client(name)?;
            let mut target = Tls::new(places::connect(&tcp)?, connection);
            let waiter = Waiter::new()?;
            enter(args)?;
            leaving::greet(&waiter, &mut target, &args.to)?;
            depart(&waiter, source, Box::new(target), &args.limits())
        }
    }
}

/// Gives up all but what is open.
fn enter(args: &MigrateArgs) -> Result<(), Error> {
    install_violation_reporter().map_err(|source| Error::Call {
        action: "install the violation reporter",
        source,
    })?;
    Ok(sandbox::enter(&Walls {
        uid: MIGRATION_ID,
        role: Role::Migration,
        memory: MAX_MEMORY,
        allow_missing_landlock: args.allow_missing.is_some(),
    })?)
}

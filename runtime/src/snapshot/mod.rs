//! `casemate snapshot`: machines that run are saved, and what was saved is looked at and removed.
//!
//! A snapshot is one directory, root's: `state` and `memory` as the VMM wrote them (docs/snapshot-format.md), `layer` if
//! the machine has a disk of its own, and [`snapshot.json`](meta). It is put together under a name with a dot before it,
//! and gets its own when it is whole.

mod copy;
mod create;
mod guard;
mod hold;
mod lease;
mod look;
pub mod meta;
mod staged;

use std::io;
use std::path::{Path, PathBuf};

use crate::cli::SnapshotCommand;
use crate::places::{MissingProgram, Places};
use crate::{page_handler, say, state};
pub use copy::copy;
pub use guard::guard;
pub use meta::Snapshot;
pub use staged::{collect, lock};

/// Why there is no snapshot, or nothing to say of one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine.
    #[error(transparent)]
    State(#[from] state::Error),
    /// Our programs.
    #[error(transparent)]
    Program(#[from] MissingProgram),
    /// Not root.
    #[error("snapshots are root's")]
    NotRoot,
    /// A name that none can have.
    #[error(
        "{0:?}: not the name of a snapshot (1-64 of A-Za-z0-9-_., the first of A-Za-z0-9_); a path has a / in it"
    )]
    BadName(String),
    /// It is there.
    #[error("{} exists: choose another name, or remove it by `casemate snapshot rm`", .0.display())]
    Taken(PathBuf),
    /// It is not there.
    #[error("snapshot {0} does not exist: `casemate snapshot ls` lists those that have names")]
    Unknown(String),
    /// Its description makes no sense.
    #[error("{}: {why}", path.display())]
    BadMeta {
        /// Where it is.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Somebody else could have written it.
    #[error("{}: others than root own it or may write to it, and could have made it what they like", .0.display())]
    Foreign(PathBuf),
    /// The machine was started without.
    #[error("{0} cannot be saved: start it with --snapshots")]
    NotSaveable(String),
    /// Somebody else is at it.
    #[error("another snapshot of {0} is being made")]
    Busy(String),
    /// A file.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Its API cannot be used.
    #[error("cannot ask the VMM of {id} to {what}: {source}")]
    Ask {
        /// The machine.
        id: String,
        /// To do what.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It refuses.
    #[error("the VMM of {id} does not {what}: {words}")]
    Refused {
        /// The machine.
        id: String,
        /// What it was asked to do.
        what: &'static str,
        /// What it says.
        words: String,
    },
    /// It was taken over, or it is not our VMM.
    #[error("the VMM of {id} has not let go of {file}: the snapshot would change")]
    NotLetGo {
        /// The machine.
        id: String,
        /// The file.
        file: &'static str,
    },
    /// It gives something else for a file.
    #[error("the VMM of {id} gives no file as {file}")]
    NoFile {
        /// The machine.
        id: String,
        /// The file.
        file: &'static str,
    },
    /// A system call.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The VMM in a jail says that something is wrong with it.
    #[error("snapshot {name}: {words}")]
    Damaged {
        /// Its name.
        name: String,
        /// What is wrong.
        words: String,
    },
    /// Its memory could not be served.
    #[error(transparent)]
    Serve(#[from] page_handler::Error),
    /// It could not be looked at.
    #[error("snapshot {name} cannot be looked at: {words}")]
    Look {
        /// Its name.
        name: String,
        /// Why.
        words: String,
    },
}

impl Error {
    /// An error with a file.
    pub fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::Io { what, path, source }
    }

    /// An error of a system call.
    pub fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::System {
            what,
            source: error.into(),
        }
    }
}

/// Exit code of `verify` when a snapshot is not whole.
const DAMAGED: u8 = 1;

/// Does what was asked for, and returns the exit code.
pub fn run(command: &SnapshotCommand) -> Result<u8, Error> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    let places = Places::from_env();
    let find = |name: &str| Snapshot::find(&places, name);
    match command {
        SnapshotCommand::Create(args) => return create::create(&places, args),
        SnapshotCommand::Ls(args) => match look::list(&Snapshot::all(&places), args) {
            // Nobody reads on.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            other => other.map_err(Error::system("list the snapshots"))?,
        },
        SnapshotCommand::Describe(args) => look::describe(&places, &find(&args.name)?)?,
        SnapshotCommand::Verify(args) => match look::verify(&places, &find(&args.name)?) {
            Err(error @ Error::Damaged { .. }) => {
                say::warn(error);
                return Ok(DAMAGED);
            }
            other => other?,
        },
        SnapshotCommand::Rm(args) => {
            for name in &args.names {
                staged::remove(&find(name)?)?;
            }
        }
        SnapshotCommand::Serve(args) => page_handler::run(args)?,
    }
    Ok(0)
}

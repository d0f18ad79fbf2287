//! Why a step failed: what was being done, to what, and what the kernel said.

use std::fmt::Display;
use std::io::Write;

use nix::errno::Errno;

/// Why a step of building the jail failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("cannot {action} {object}: {source}")]
    Call {
        /// What was being done.
        action: &'static str,
        /// To what.
        object: String,
        /// What the kernel said.
        source: Errno,
    },
    /// Something is not as it must be; the text says what to do.
    #[error("{object}: {why}")]
    Refused {
        /// What.
        object: String,
        /// Why, and what to do.
        why: String,
    },
    /// Landlock refused a ruleset.
    #[error("Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The capability sets.
    #[error("capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// The hand-over table.
    #[error(transparent)]
    Handover(#[from] casemate_broker::HandoverError),
    /// The broker's seccomp filter.
    #[error(transparent)]
    Seccomp(#[from] casemate_seccomp_filters::Error),
    /// The other half of the jailer has ended.
    #[error("the jailer's other half has ended, and with it the broker")]
    ParentGone,
    /// Whoever started the jailer has ended.
    #[error("whoever started the jailer has ended")]
    CallerGone,
}

/// The result of a step.
pub type Result<T> = std::result::Result<T, Error>;

/// Says what a system call was for.
pub trait Context<T> {
    /// `cannot ACTION OBJECT: ERRNO`.
    fn doing(self, action: &'static str, object: impl Into<String>) -> Result<T>;
}

impl<T> Context<T> for nix::Result<T> {
    fn doing(self, action: &'static str, object: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::Call {
            action,
            object: object.into(),
            source,
        })
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn doing(self, action: &'static str, object: impl Into<String>) -> Result<T> {
        self.map_err(errno).doing(action, object)
    }
}

/// The errno of an I/O error; EIO for one that the standard library made up.
pub fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
}

/// Something that is not as it must be.
pub fn refused<T>(object: impl Into<String>, why: impl Into<String>) -> Result<T> {
    Err(Error::Refused {
        object: object.into(),
        why: why.into(),
    })
}

/// One line to standard error. That nobody reads it is no reason to abort, as `eprintln!` would.
pub fn say(text: impl Display) {
    let _ = std::io::stderr().write_all(format!("casemate-jailer: {text}\n").as_bytes());
}

//! Running machines on disk: `vms/ID/` with a record and sockets, and `uids/` beside it.
//!
//! The directory of a machine is locked (flock(2)) by the `casemate run` that made it, for as long as it lives. A directory
//! that is not locked is thus stale, however its owner ended, and [`gc`] may remove it with all that belongs to it.

pub mod gc;
pub mod process;
mod uids;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use casemate_broker::MachineId;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::places::Places;
use process::ProcessRef;
pub use uids::UidRange;

const RECORD: &str = "state.json";
/// Its lock is the one over all machines.
const LOCK: &str = "lock";

/// Why the state of a machine could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The id is taken.
    #[error("a machine named {0} is running: choose another --id, or end it first")]
    Running(String),
    /// What is left of one that was killed.
    #[error(
        "something of an earlier machine named {0} cannot be removed yet: choose another --id, or try again"
    )]
    Stuck(String),
    /// No such machine.
    #[error("machine {0} does not exist: `casemate ps` lists those that run")]
    Unknown(String),
    /// The range of user ids is malformed.
    #[error(
        "CASEMATE_UID_RANGE={0:?}: give FIRST-LAST, both from 1000 to 4294967293, without 65534 and 1667301377 between them, \
         such as 900000-965535"
    )]
    BadRange(String),
    /// All user ids are in use.
    #[error("all user ids from {} to {} are in use, by machines or by others on this host: end some machines, or widen CASEMATE_UID_RANGE", .0.first, .0.last)]
    NoUidLeft(UidRange),
    /// A record does not parse.
    #[error("{}: {source}", path.display())]
    BadRecord {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Io { what, path, source }
}

/// What is known about a machine outside of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub id: MachineId,
    /// Its user id and group id on the host.
    pub uid: u32,
    /// The `casemate run` that owns it.
    pub owner: ProcessRef,
    /// Its jailer, once started: the root of its process tree.
    #[serde(default)]
    pub jailer: Option<ProcessRef>,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Its kernel: a registered name, a file, or `default`.
    pub kernel: String,
    /// Its command.
    pub command: Vec<String>,
}

/// A machine that this process owns. Dropping it removes its directory and gives its user id back.
#[derive(Debug)]
pub struct Machine {
    places: Places,
    directory: PathBuf,
    record: Record,
    ended: bool,
    _lock: Flock<File>,
}

/// What a new machine is, for its record.
#[derive(Debug, Clone, Default)]
pub struct Traits {
    /// Virtual CPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Its kernel.
    pub kernel: String,
    /// Its command.
    pub command: Vec<String>,
}

impl Machine {
    /// Makes the directory of a new machine and takes a user id for it.
    ///
    /// # Errors
    /// When one of that name runs, no user id is left, or the directories cannot be made; nothing is left then.
    pub fn create(
        places: &Places,
        id: &MachineId,
        range: UidRange,
        traits: Traits,
    ) -> Result<Self, Error> {
        // Taking names and user ids and collecting stale ones exclude each other: so nobody ever sees half of a machine.
        let _all = lock_all(places)?;
        let directory = places.machine(id.as_str());
        if directory.exists() {
            match gc::collect(places, id.as_str(), &directory, gc::KILL_BOUND)? {
                gc::Collected::Removed => {}
                gc::Collected::Lives => return Err(Error::Running(id.to_string())),
                gc::Collected::Stuck => return Err(Error::Stuck(id.to_string())),
            }
        }
        let uid = match uids::take(places, range, id.as_str()) {
            Err(Error::NoUidLeft(_)) => {
                gc::collect_all(places, gc::KILL_BOUND)?;
                uids::take(places, range, id.as_str())
            }
            other => other,
        }?;
        // The machine's user may pass through to its sockets, and list nothing.
        let made = DirBuilder::new()
            .mode(0o711)
            .create(&directory)
            .map_err(io_error("cannot make the directory", &directory))
            .and_then(|()| {
                let filled = Self::fill(places, directory.clone(), id, uid, traits);
                if filled.is_err() {
                    let _ = fs::remove_dir_all(&directory);
                }
                filled
            });
        if made.is_err() {
            uids::release(places, uid, id.as_str());
        }
        made
    }

    fn fill(
        places: &Places,
        directory: PathBuf,
        id: &MachineId,
        uid: u32,
        traits: Traits,
    ) -> Result<Self, Error> {
        // Whoever else has it locked only looks whether this machine lives, and is done at once.
        let gone = || io_error("cannot lock", &directory)(Errno::ENOENT.into());
        let lock = try_lock(&directory, FlockArg::LockExclusive)?.ok_or_else(gone)?;
        let created = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let machine = Self {
            places: places.clone(),
            directory,
            record: Record {
                id: id.clone(),
                uid,
                owner: ProcessRef::own(),
                jailer: None,
                created,
                cpus: traits.cpus,
                memory_mib: traits.memory_mib,
                kernel: traits.kernel,
                command: traits.command,
            },
            ended: false,
            _lock: lock,
        };
        machine.write_record()?;
        Ok(machine)
    }

    /// Notes the jailer, so that it can be found if this process is killed.
    pub fn set_jailer(&mut self, pid: u32) -> Result<(), Error> {
        self.record.jailer = Some(ProcessRef::of(pid));
        self.write_record()
    }

    fn write_record(&self) -> Result<(), Error> {
        let text = serde_json::to_vec_pretty(&self.record).unwrap_or_default();
        self.write(RECORD, &text).map(drop)
    }

    /// Writes a file into the machine's directory, whole or not at all, and returns its path.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<PathBuf, Error> {
        let path = self.directory.join(name);
        let temporary = self.directory.join(format!(".{name}"));
        OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(content))
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(io_error("cannot write", &path))?;
        Ok(path)
    }

    /// Its user id and group id on the host.
    pub fn uid(&self) -> u32 {
        self.record.uid
    }

    /// Every process of it is known to have ended: none needs to be looked for.
    pub fn processes_ended(&mut self) {
        self.ended = true;
    }

    /// Its name.
    pub fn id(&self) -> &MachineId {
        &self.record.id
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Kills what may be left of it: its user id is about to be given to another.
        gc::remove(
            &self.places,
            &self.directory,
            Some(&self.record),
            self.ended,
            gc::KILL_BOUND,
        );
    }
}

/// Makes the directories and takes the lock over all of them.
fn lock_all(places: &Places) -> Result<Flock<File>, Error> {
    for directory in [
        places.state.clone(),
        places.machines(),
        uids::directory(places),
    ] {
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&directory)
            .map_err(io_error("cannot make the directory", &directory))?;
    }
    let (path, file) = open_lock(places)?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| io_error("cannot lock", &path)(errno.into()))
}

/// The lock over all of them, unless another process holds it.
fn try_lock_all(places: &Places) -> Result<Option<Flock<File>>, Error> {
    let (path, file) = open_lock(places)?;
    lock(&path, file, FlockArg::LockExclusiveNonblock)
}

/// A file, which others may not open, and not the directory: whoever can read that could hold everybody up.
fn open_lock(places: &Places) -> Result<(PathBuf, File), Error> {
    let path = places.state.join(LOCK);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(io_error("cannot open", &path))?;
    Ok((path, file))
}

/// Locks a directory itself: there is no lock file to be left or removed too early. None when another process holds it
/// or when it is gone.
fn try_lock(directory: &Path, how: FlockArg) -> Result<Option<Flock<File>>, Error> {
    let file = match File::open(directory) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("cannot open", directory)(error)),
    };
    lock(directory, file, how)
}

fn lock(path: &Path, file: File, how: FlockArg) -> Result<Option<Flock<File>>, Error> {
    match Flock::lock(file, how) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(io_error("cannot lock", path)(errno.into())),
    }
}

/// True when a live process owns the machine.
fn is_live(directory: &Path) -> bool {
    // A shared lock, so that two who look do not take each other for the owner.
    directory.exists() && matches!(try_lock(directory, FlockArg::LockSharedNonblock), Ok(None))
}

fn read_record(directory: &Path) -> Result<Record, Error> {
    let path = directory.join(RECORD);
    let text = fs::read(&path).map_err(io_error("cannot read", &path))?;
    serde_json::from_slice(&text).map_err(|source| Error::BadRecord { path, source })
}

/// The record of a running machine.
pub fn find(places: &Places, id: &str) -> Result<Record, Error> {
    let unknown = || Error::Unknown(id.to_string());
    // Checked before it becomes part of a path.
    let id: MachineId = id.parse().map_err(|_| unknown())?;
    let directory = places.machine(id.as_str());
    if !is_live(&directory) {
        return Err(unknown());
    }
    read_record(&directory)
}

/// The records of all running machines, by name.
pub fn list(places: &Places) -> Vec<Record> {
    let mut records: Vec<Record> = fs::read_dir(places.machines())
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| is_live(&entry.path()))
        .filter_map(|entry| read_record(&entry.path()).ok())
        .collect();
    records.sort_by(|a, b| a.id.cmp(&b.id));
    records
}

#[cfg(test)]
mod tests;

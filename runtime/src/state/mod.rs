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
    /// No such machine.
    #[error("machine {0} does not exist: `casemate ps` lists those that run")]
    Unknown(String),
    /// The range of user ids is malformed.
    #[error(
        "CASEMATE_UID_RANGE={0:?}: give FIRST-LAST, both from 1000 to 4294967293, such as 900000-965535"
    )]
    BadRange(String),
    /// All user ids are in use.
    #[error("all user ids from {} to {} are in use: end some machines, or widen CASEMATE_UID_RANGE", .0.first, .0.last)]
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
        if directory.exists() && !gc::collect(places, id.as_str(), &directory)? {
            return Err(Error::Running(id.to_string()));
        }
        let uid = match uids::take(places, range, id.as_str()) {
            Err(Error::NoUidLeft(_)) => {
                gc::collect_all(places)?;
                uids::take(places, range, id.as_str())
            }
            other => other,
        }?;
        let made = Self::fill(places, directory.clone(), id, uid, traits);
        if made.is_err() {
            let _ = fs::remove_dir_all(&directory);
            uids::release(places, uid);
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
        // The machine's user may pass through to its sockets, and list nothing.
        DirBuilder::new()
            .mode(0o711)
            .create(&directory)
            .map_err(io_error("cannot make the directory", &directory))?;
        let busy = || io_error("cannot lock", &directory)(Errno::EWOULDBLOCK.into());
        let lock = try_lock(&directory, FlockArg::LockExclusiveNonblock)?.ok_or_else(busy)?;
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
    let path = &places.state;
    let file = File::open(path).map_err(io_error("cannot open", path))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| io_error("cannot lock", path)(errno.into()))
}

/// Locks a directory itself: there is no lock file to be left or removed too early. None when another process holds it
/// or when it is gone.
fn try_lock(directory: &Path, how: FlockArg) -> Result<Option<Flock<File>>, Error> {
    let file = match File::open(directory) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("cannot open", directory)(error)),
    };
    match Flock::lock(file, how) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(io_error("cannot lock", directory)(errno.into())),
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
mod tests {
    use super::*;

    pub fn places() -> (tempfile::TempDir, Places) {
        let directory = tempfile::tempdir().unwrap();
        let places = Places {
            data: directory.path().join("data"),
            state: directory.path().join("state"),
            libexec: directory.path().to_path_buf(),
        };
        (directory, places)
    }

    // User ids that no process has: dropping a machine kills those of its user.
    const RANGE: UidRange = UidRange {
        first: 4_000_000_000,
        last: 4_000_000_001,
    };

    fn create(places: &Places, id: &str) -> Result<Machine, Error> {
        Machine::create(places, &id.parse().unwrap(), RANGE, Traits::default())
    }

    #[test]
    fn a_machine_is_there_until_dropped() {
        let (_guard, places) = places();
        let one = create(&places, "one").unwrap();
        assert_eq!(list(&places).len(), 1);
        assert_eq!(find(&places, "one").unwrap().uid, one.uid());
        assert!(matches!(create(&places, "one"), Err(Error::Running(_))));
        drop(one);
        assert!(matches!(find(&places, "one"), Err(Error::Unknown(_))));
        assert_eq!(fs::read_dir(places.machines()).unwrap().count(), 0);
    }

    #[test]
    fn user_ids_are_distinct_and_recycled() {
        let (_guard, places) = places();
        let one = create(&places, "one").unwrap();
        let two = create(&places, "two").unwrap();
        assert_ne!(one.uid(), two.uid());
        assert!(matches!(create(&places, "three"), Err(Error::NoUidLeft(_))));
        assert!(!places.machine("three").exists());
        let freed = one.uid();
        drop(one);
        assert_eq!(create(&places, "three").unwrap().uid(), freed);
    }

    #[test]
    fn what_a_killed_owner_left_is_collected() {
        let (_guard, places) = places();
        let one = create(&places, "one").unwrap();
        let uid = one.uid();
        // As after SIGKILL: the lock is free, all else is there.
        let stale = places.machine("stale");
        fs::create_dir(&stale).unwrap();
        let mut record = one.record.clone();
        record.id = "stale".parse().unwrap();
        record.uid = 4_000_000_001;
        fs::write(stale.join(RECORD), serde_json::to_vec(&record).unwrap()).unwrap();
        fs::write(uids::directory(&places).join("4000000001"), "stale").unwrap();

        assert_eq!(gc::run(&places).unwrap(), ["stale"]);
        assert!(!stale.exists());
        assert!(find(&places, "one").is_ok());
        let left: Vec<_> = fs::read_dir(uids::directory(&places))
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name().into_string().unwrap())
            .filter(|name| name != "last")
            .collect();
        assert_eq!(left, [uid.to_string()]);
    }

    #[test]
    fn ids_are_never_paths() {
        let (_guard, places) = places();
        for bad in ["..", "a/b", "", "."] {
            assert!(
                matches!(find(&places, bad), Err(Error::Unknown(_))),
                "{bad:?}"
            );
        }
    }
}

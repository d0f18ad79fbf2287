//! Removing a machine: its processes, cgroups, directory and user id, whoever made it.

use std::fs::{self, File};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;

use super::process::kill_user;
use super::{Error, Record, is_live, lock_all, read_record, try_lock, try_lock_all, uids};
use crate::cgroups::Hierarchies;
use crate::layer;
use crate::places::Places;
use crate::run::origin;
use crate::snapshot;

/// How long killed processes may take to be gone.
pub(super) const KILL_BOUND: Duration = Duration::from_secs(3);
/// Between two looks at them.
const KILL_POLL: Duration = Duration::from_millis(5);
/// How often somebody who only looks at a machine may be in the way in a row.
const LOOKERS: u32 = 100;

/// What came of trying to remove a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Collected {
    /// Its owner lives.
    Lives,
    /// Something of it cannot be removed yet.
    Stuck,
    /// Nothing is left of it.
    Removed,
}

/// Removes what machines left whose owner is dead. Returns their names.
pub fn run(places: &Places) -> Result<Vec<String>, Error> {
    if !places.state.exists() {
        return Ok(Vec::new());
    }
    let _all = lock_all(places)?;
    collect_all(places, KILL_BOUND)
}

/// As [`run`], but waits for nothing: neither for another process that is at it, nor for killed processes to be gone. What
/// is not gone at once is for the next one to remove.
pub fn try_run(places: &Places) -> Result<(), Error> {
    match try_lock_all(places)? {
        Some(_all) => collect_all(places, Duration::ZERO).map(drop),
        None => Ok(()),
    }
}

/// As [`run`], with the lock held, waiting so long for each machine.
pub(super) fn collect_all(places: &Places, patience: Duration) -> Result<Vec<String>, Error> {
    let mut collected = Vec::new();
    for entry in fs::read_dir(places.machines())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        if path.is_dir() && collect(places, &name, &path, patience)? == Collected::Removed {
            collected.push(name);
        }
    }
    uids::release_orphans(places);
    snapshot::collect(places);
    collected.sort();
    Ok(collected)
}

/// Removes one machine if its owner is dead.
pub(super) fn collect(
    places: &Places,
    id: &str,
    directory: &Path,
    patience: Duration,
) -> Result<Collected, Error> {
    let Some(_lock) = lock_stale(directory)? else {
        return Ok(if directory.exists() {
            Collected::Lives
        } else {
            Collected::Removed
        });
    };
    let record = read_record(directory)
        .ok()
        .filter(|record| record.id.as_str() == id);
    let removed = remove(places, directory, record.as_ref(), false, patience);
    Ok(if removed {
        Collected::Removed
    } else {
        Collected::Stuck
    })
}

/// The lock of a machine whose owner is dead.
fn lock_stale(directory: &Path) -> Result<Option<Flock<File>>, Error> {
    for _ in 0..LOOKERS {
        if let Some(lock) = try_lock(directory, FlockArg::LockExclusiveNonblock)? {
            return Ok(Some(lock));
        }
        if is_live(directory) || !directory.exists() {
            return Ok(None);
        }
        // Somebody only looked whether it lives, as we just did.
        sleep(KILL_POLL);
    }
    Ok(None)
}

/// Removes everything of a machine; kills its processes before, unless they have `ended`. Without a record only its
/// directory and cgroups are known. False when something is left.
pub(super) fn remove(
    places: &Places,
    directory: &Path,
    record: Option<&Record>,
    ended: bool,
    patience: Duration,
) -> bool {
    // A record speaks for its user id only as long as that was not given back, and maybe to another machine since.
    let record = record.filter(|record| uids::is_of(places, record.uid, record.id.as_str()));
    // A user id that still has a process is never given to another machine: all stays for the next collection.
    if !ended && record.is_some_and(|record| !kill_all(record, patience)) {
        return false;
    }
    if let Some(name) = directory.file_name().and_then(|name| name.to_str()) {
        remove_cgroups(name, patience);
        layer::remove(&places.layer(name));
        origin::remove(&places.saved(name));
    }
    // While the directory is there, and its lock is ours, nobody else gives this number back.
    if let Some(record) = record {
        uids::release(places, record.uid, record.id.as_str());
    }
    fs::remove_dir_all(directory).is_ok() || !directory.exists()
}

/// Kills the jailer and every process of the machine's user, and waits until they are gone.
fn kill_all(record: &Record, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let jailer = record.jailer.filter(|jailer| jailer.exists());
        if let Some(jailer) = jailer {
            jailer.signal(Signal::SIGKILL);
        }
        // When the user id was taken no process had it: those that are older than the owner are not the machine's.
        let killed = kill_user(record.uid, record.owner.start_time);
        if killed == 0 && jailer.is_none() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        sleep(KILL_POLL);
    }
}

/// Removes the machine's cgroups, waiting a little for the kernel to take dead tasks out of them.
fn remove_cgroups(id: &str, patience: Duration) {
    let deadline = Instant::now() + patience;
    for directory in Hierarchies::read(Path::new("/")).directories(id) {
        while directory.exists() && fs::remove_dir(&directory).is_err() && Instant::now() < deadline
        {
            sleep(KILL_POLL);
        }
    }
}

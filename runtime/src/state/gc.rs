//! Removing a machine: its processes, cgroups, directory and user id, whoever made it.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::fcntl::FlockArg;
use nix::sys::signal::Signal;

use super::process::{of_user, signal_pid};
use super::{Error, Record, lock_all, read_record, try_lock, uids};
use crate::cgroups::Hierarchies;
use crate::places::Places;

/// How long killed processes may take to be gone.
const KILL_BOUND: Duration = Duration::from_secs(3);
/// Between two looks at them.
const KILL_POLL: Duration = Duration::from_millis(5);

/// Removes what machines left whose owner is dead. Returns their names.
pub fn run(places: &Places) -> Result<Vec<String>, Error> {
    if !places.state.exists() {
        return Ok(Vec::new());
    }
    let _all = lock_all(places)?;
    collect_all(places)
}

/// As [`run`], unless another process is at it.
pub fn try_run(places: &Places) -> Result<(), Error> {
    match try_lock(&places.state, FlockArg::LockExclusiveNonblock)? {
        Some(_all) => collect_all(places).map(drop),
        None => Ok(()),
    }
}

/// As [`run`], with the lock held.
pub(super) fn collect_all(places: &Places) -> Result<Vec<String>, Error> {
    let mut collected = Vec::new();
    for entry in fs::read_dir(places.machines())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() && collect(places, &name, &entry.path())? {
            collected.push(name);
        }
    }
    uids::release_orphans(places);
    collected.sort();
    Ok(collected)
}

/// Removes one machine if its owner is dead; false when it lives.
pub(super) fn collect(places: &Places, id: &str, directory: &Path) -> Result<bool, Error> {
    let Some(_lock) = try_lock(directory, FlockArg::LockExclusiveNonblock)? else {
        return Ok(false);
    };
    let record = read_record(directory)
        .ok()
        .filter(|record| record.id.as_str() == id);
    remove(places, directory, record.as_ref(), false);
    Ok(true)
}

/// Removes everything of a machine; kills its processes before, unless they have `ended`. Without a record only its directory and cgroups are known.
pub(super) fn remove(places: &Places, directory: &Path, record: Option<&Record>, ended: bool) {
    // A user id that still has a process is never given to another machine: all stays for the next collection.
    if !ended && record.is_some_and(|record| !kill_all(record)) {
        return;
    }
    if let Some(name) = directory.file_name().and_then(|name| name.to_str()) {
        remove_cgroups(name);
    }
    let _ = fs::remove_dir_all(directory);
    if let Some(record) = record {
        uids::release(places, record.uid);
    }
}

/// Kills the jailer and every process of the machine's user, and waits until they are gone.
fn kill_all(record: &Record) -> bool {
    let deadline = Instant::now() + KILL_BOUND;
    let own = std::process::id();
    loop {
        if let Some(jailer) = record.jailer {
            jailer.signal(Signal::SIGKILL);
        }
        let mut left = of_user(record.uid);
        left.retain(|pid| *pid != own);
        for pid in &left {
            signal_pid(*pid, Signal::SIGKILL);
        }
        if left.is_empty() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        sleep(KILL_POLL);
    }
}

/// Removes the machine's cgroups, waiting a little for the kernel to take dead tasks out of them.
fn remove_cgroups(id: &str) {
    let deadline = Instant::now() + KILL_BOUND;
    for directory in Hierarchies::read(Path::new("/")).directories(id) {
        while directory.exists() && fs::remove_dir(&directory).is_err() && Instant::now() < deadline
        {
            sleep(KILL_POLL);
        }
    }
}

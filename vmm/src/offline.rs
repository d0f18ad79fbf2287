//! What the program does with the files of snapshots where there is no machine.

use crate::resources::{Served, Source};
use crate::snapshot::{describe, memory};
use crate::{Error, lockdown};

/// What errors call the files.
const BASE: &str = "memory file";
const DIFFERENCES: &str = "memory file of differences";
const MERGED: &str = "merged memory file";

/// A file of a snapshot in words, for `--describe-snapshot`.
///
/// # Errors
/// When it is none.
pub fn describe(path: &str) -> Result<String, Error> {
    let failed = |source| Error::Describe {
        path: path.to_owned(),
        source,
    };
    let file = describe::open(path).map_err(failed)?;
    // Whoever wrote it finds the walls up.
    lockdown::lock_down()?;
    describe::describe(&file).map_err(failed)
}

/// Makes `new` of a snapshot's memory and what has changed since, for `--merge-memory`. Both stay as they are, and whatever
/// happens, `new` is there whole or not at all.
///
/// # Errors
/// When they do not belong together, are damaged, or the host refuses.
pub fn merge([base, differences, new]: [&str; 3]) -> Result<(), Error> {
    let mut source = Source::Served(Box::new(Served::direct()?));
    source.lock_down()?;
    let whole = source.open_file(BASE, base)?;
    let changes = source.open_file(DIFFERENCES, differences)?;
    let file = source.create_later(MERGED, new)?;
    memory::merge(&whole, &changes, &file).map_err(Error::Merge)?;
    let synced = file.sync_all();
    synced.map_err(|error| Error::Sync(new.to_owned(), error))?;
    Ok(source.commit(MERGED, new)?)
}

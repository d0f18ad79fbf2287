//! What the program does with the files of snapshots where there is no machine.

use std::fs::File;

use casemate_broker::{Handover, Kind};

use crate::arguments::{Look, What};
use crate::resources::{Served, Source};
use crate::snapshot::{describe, memory};
use crate::{Error, lockdown};

/// What errors call the files.
const BASE: &str = "memory file";
const DIFFERENCES: &str = "memory file of differences";
const MERGED: &str = "merged memory file";

/// What there is to say of a snapshot, for `--describe-snapshot` and `--verify-snapshot`. Whoever wrote its files finds the
/// walls up.
///
/// # Errors
/// When they are none, or damaged.
pub fn look(look: &Look) -> Result<String, Error> {
    let (option, paths) = match &look.what {
        What::Describe(path) => ("--describe-snapshot", vec![path.as_str()]),
        What::Verify(state, memory) => ("--verify-snapshot", vec![state.as_str(), memory]),
    };
    let failed = |source| Error::Look {
        option,
        paths: paths.join(" "),
        source,
    };
    let files: Vec<File> = match look.handover_fd {
        Some(number) => {
            lockdown::lock_down()?;
            let mut handover = Handover::from_inherited(number)?;
            let take = |path: &&str| handover.take(path, &[Kind::FileRo]).map(File::from);
            paths.iter().map(take).collect::<Result<_, _>>()?
        }
        None => {
            let files = paths.iter().map(|path| describe::open(path));
            let files = files.collect::<Result<_, _>>().map_err(failed)?;
            lockdown::lock_down()?;
            files
        }
    };
    match files.as_slice() {
        [file] => describe::describe(file),
        [state, memory] => describe::verify(state, memory),
        // There are one or two paths.
        _ => Ok(String::new()),
    }
    .map_err(failed)
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

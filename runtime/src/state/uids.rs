//! A user id and group id of its own for each machine.
//!
//! A file named by the number says that it is taken, and by which machine. Numbers are handed out in turn, so one that
//! was given back rests as long as possible. The caller holds the lock over all state.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::{Error, io_error};
use crate::places::Places;

const LAST: &str = "last";
const DEFAULT: UidRange = UidRange {
    first: 900_000,
    last: 965_535,
};

/// The numbers that machines may have, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UidRange {
    /// The lowest.
    pub first: u32,
    /// The highest.
    pub last: u32,
}

impl UidRange {
    /// From `CASEMATE_UID_RANGE`, or the default.
    pub fn from_env() -> Result<Self, Error> {
        match env::var("CASEMATE_UID_RANGE") {
            Ok(text) => Self::parse(&text).ok_or(Error::BadRange(text)),
            Err(env::VarError::NotPresent) => Ok(DEFAULT),
            Err(env::VarError::NotUnicode(text)) => {
                Err(Error::BadRange(text.to_string_lossy().into_owned()))
            }
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let (first, last) = text.split_once('-')?;
        let range = Self {
            first: first.parse().ok()?,
            last: last.parse().ok()?,
        };
        // Below 1000 are the system's own; 65534 is nobody; -1 and -2 have meanings in system calls.
        let usable = range.first >= 1000 && range.last <= u32::MAX - 2 && range.first <= range.last;
        let has_nobody = (range.first..=range.last).contains(&65534);
        (usable && !has_nobody).then_some(range)
    }

    fn from(self, start: u32) -> impl Iterator<Item = u32> {
        let start = if (self.first..=self.last).contains(&start) {
            start
        } else {
            self.first
        };
        (start..=self.last).chain(self.first..start)
    }
}

/// Where the files are.
pub fn directory(places: &Places) -> PathBuf {
    places.state.join("uids")
}

/// Takes the next free number for a machine.
pub fn take(places: &Places, range: UidRange, id: &str) -> Result<u32, Error> {
    let directory = directory(places);
    let last: Option<u32> = fs::read_to_string(directory.join(LAST))
        .ok()
        .and_then(|text| text.trim().parse().ok());
    for uid in range.from(last.map_or(range.first, |last| last.saturating_add(1))) {
        let path = directory.join(uid.to_string());
        let made = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&path);
        match made.and_then(|mut file| file.write_all(id.as_bytes())) {
            Ok(()) => {
                // Only a hint where to start: losing it costs nothing.
                let _ = fs::write(directory.join(LAST), uid.to_string());
                return Ok(uid);
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(io_error("cannot make", &path)(error)),
        }
    }
    Err(Error::NoUidLeft(range))
}

/// Gives a number back.
pub fn release(places: &Places, uid: u32) {
    let _ = fs::remove_file(directory(places).join(uid.to_string()));
}

/// Gives back the numbers of machines that do not exist.
pub fn release_orphans(places: &Places) {
    for entry in fs::read_dir(directory(places))
        .into_iter()
        .flatten()
        .flatten()
    {
        let is_uid = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.parse::<u32>().is_ok());
        let orphan = || match fs::read_to_string(entry.path()) {
            Ok(id) => id.is_empty() || !places.machine(&id).exists(),
            Err(_) => false,
        };
        if is_uid && orphan() {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        assert_eq!(
            UidRange::parse("900000-965535"),
            Some(UidRange {
                first: 900_000,
                last: 965_535
            })
        );
        for bad in [
            "",
            "5",
            "0-10",
            "999-2000",
            "2000-1000",
            "1000-4294967294",
            "60000-70000",
            "a-b",
        ] {
            assert_eq!(UidRange::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn numbers_go_round() {
        let range = UidRange {
            first: 10,
            last: 13,
        };
        assert_eq!(range.from(12).collect::<Vec<_>>(), [12, 13, 10, 11]);
        assert_eq!(range.from(14).collect::<Vec<_>>(), [10, 11, 12, 13]);
    }
}

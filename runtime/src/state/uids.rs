//! A user id and group id of its own for each machine.
//!
//! A file named by the number says that it is taken, and by which machine. Numbers are handed out in turn, so one that
//! was given back rests as long as possible. The caller holds the lock over all state.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{Error, io_error, process};
use crate::kernels::UNPACKER_ID;
use crate::migrate::MIGRATION_ID;
use crate::page_handler::PAGE_HANDLER_ID;
use crate::places::Places;

const LAST: &str = "last";
/// Whoever has no user of his own.
pub const NOBODY: u32 = 65534;
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
        // Below 1000 are the system's own; -1 and -2 have meanings in system calls.
        let usable = range.first >= 1000 && range.last <= u32::MAX - 2 && range.first <= range.last;
        let has = |uid| (range.first..=range.last).contains(&uid);
        let taken = [NOBODY, UNPACKER_ID, PAGE_HANDLER_ID, MIGRATION_ID];
        (usable && !taken.into_iter().any(has)).then_some(range)
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

/// Numbers that somebody else has: at a machine's end all processes of its user are killed.
#[derive(Debug, Default)]
struct Others {
    ids: BTreeSet<u32>,
    /// First ones and counts.
    ranges: Vec<(u32, u32)>,
}

impl Others {
    /// Accounts and groups in the files below `etc`, and users of processes. Accounts that only a directory service
    /// knows are for CASEMATE_UID_RANGE to avoid.
    fn read(etc: &Path) -> Self {
        let fields = |file: &str| -> Vec<(Option<u32>, Option<u32>)> {
            let text = fs::read(etc.join(file)).unwrap_or_default();
            let number = |field: Option<&str>| field?.trim().parse().ok();
            String::from_utf8_lossy(&text)
                .lines()
                .map(|line| {
                    let mut fields = line.split(':').skip(1);
                    (number(fields.next()), number(fields.next()))
                })
                .collect()
        };
        let accounts = ["passwd", "group"].into_iter().flat_map(fields);
        let ranges = ["subuid", "subgid"].into_iter().flat_map(fields);
        let mut ids = process::all_users();
        ids.extend(accounts.filter_map(|(_, id)| id));
        Self {
            ids,
            ranges: ranges
                .filter_map(|(first, count)| Some((first?, count?)))
                .collect(),
        }
    }

    fn have(&self, uid: u32) -> bool {
        let in_range =
            |(first, count): &(u32, u32)| uid.checked_sub(*first).is_some_and(|n| n < *count);
        self.ids.contains(&uid) || self.ranges.iter().any(in_range)
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
    let others = Others::read(Path::new("/etc"));
    for uid in range.from(last.map_or(range.first, |last| last.saturating_add(1))) {
        if others.have(uid) {
            continue;
        }
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

/// True while the number is taken for this machine.
pub fn is_of(places: &Places, uid: u32, id: &str) -> bool {
    fs::read_to_string(directory(places).join(uid.to_string())).is_ok_and(|owner| owner == id)
}

/// Gives a number back, unless it has become another machine's.
pub fn release(places: &Places, uid: u32, id: &str) {
    if is_of(places, uid, id) {
        let _ = fs::remove_file(directory(places).join(uid.to_string()));
    }
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
            "1667301377-1667301377",
            "1667301379-1667301379",
            "a-b",
        ] {
            assert_eq!(UidRange::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_others_have_is_not_taken() {
        let etc = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(etc.path().join(name), text).unwrap();
        write(
            "passwd",
            "root:x:0:0::/:/bin/sh\nmad\u{e9}:x:900001:900009::/:/bin/sh\n",
        );
        write("group", "root:x:0:\nteam:x:900002:root\n");
        write("subuid", "some:900100:10\nbroken\nlast:4294967295:5\n");
        let others = Others::read(etc.path());
        for uid in [0, 900_001, 900_002, 900_100, 900_109, u32::MAX] {
            assert!(others.have(uid), "{uid}");
        }
        for uid in [900_000, 900_003, 900_099, 900_110] {
            assert!(!others.have(uid), "{uid}");
        }
        assert!(others.have(nix::unistd::geteuid().as_raw()), "of a process");
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

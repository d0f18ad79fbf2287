//! Directories of snapshots that are not whole: in the making, or on their way out.
//!
//! Their names begin with a dot, and whoever is at one holds its lock, so that it can be told from what was left.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2};

use super::{Error, Snapshot};
use crate::places::Places;

/// How often somebody who collects may be in the way.
const ATTEMPTS: u32 = 5;

/// A directory that becomes a snapshot. Dropping it removes it.
#[derive(Debug)]
pub struct Staged {
    path: PathBuf,
    named: bool,
    lock: Flock<File>,
}

/// What `target` is called before it is whole, by this process.
fn hidden(target: &Path, what: &str) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!(".{name}.{what}-{}", std::process::id()))
}

impl Staged {
    /// Makes one beside `target`.
    pub fn new(target: &Path) -> Result<Self, Error> {
        if let Some(parent) = target.parent() {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(parent);
            made.map_err(Error::io("cannot make the directory", parent))?;
        }
        let path = hidden(target, "new");
        let mut made = DirBuilder::new().mode(0o700).create(&path);
        for _ in 0..ATTEMPTS {
            made.map_err(Error::io("cannot make the directory", &path))?;
            match lock(&path) {
                Ok(Some(lock)) => {
                    return Ok(Self {
                        path,
                        named: false,
                        lock,
                    });
                }
                // Somebody who collects what was left has just taken it for that.
                _ => made = DirBuilder::new().recursive(true).mode(0o700).create(&path),
            }
        }
        Err(Error::io("cannot lock", &path)(Errno::EBUSY.into()))
    }

    /// Where it is now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a file with this content.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        let path = self.path.join(name);
        let mut options = File::options();
        let made = options.create_new(true).write(true).mode(0o600).open(&path);
        made.and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()))
            .map_err(Error::io("cannot write", &path))
    }

    /// Makes it the snapshot at `target`, at once and for good. Whatever has that name stays.
    pub fn give_name(mut self, target: &Path) -> Result<(), Error> {
        sync(&self.lock).map_err(Error::io("cannot sync", &self.path))?;
        match rename(&self.path, target) {
            Ok(()) => {}
            Err(Errno::EEXIST | Errno::ENOTEMPTY) => {
                return Err(Error::Taken(target.to_path_buf()));
            }
            Err(errno) => return Err(Error::io("cannot give its name to", target)(errno.into())),
        }
        self.named = true;
        let parent = target.parent().unwrap_or(Path::new("/"));
        let synced = File::open(parent).and_then(|parent| sync(&parent));
        synced.map_err(Error::io("cannot sync", parent))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.named {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Syncs a directory, where there is something to sync.
fn sync(directory: &File) -> io::Result<()> {
    match directory.sync_all() {
        Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => Ok(()),
        other => other,
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), Errno> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // File systems that do not know how. A directory that is not empty is not replaced there either.
        Err(Errno::EINVAL) if !to.exists() => {
            fs::rename(from, to).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
        }
        other => other,
    }
}

/// Takes the lock of a directory, unless another process has it.
pub fn lock(directory: &Path) -> io::Result<Option<Flock<File>>> {
    match Flock::lock(File::open(directory)?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

/// Removes a snapshot. Machines that go on from it have its files open, and do not notice.
pub fn remove(snapshot: &Snapshot) -> Result<(), Error> {
    let hidden = hidden(&snapshot.directory, "rm");
    let renamed = fs::rename(&snapshot.directory, &hidden);
    renamed.map_err(Error::io("cannot remove", &snapshot.directory))?;
    match fs::remove_dir_all(&hidden) {
        // Somebody who collects what was left was faster.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(Error::io("cannot remove", &hidden)),
    }
}

/// Removes what was left of snapshots that were being made or removed by processes that were killed, and of machines that
/// could be saved.
pub fn collect(places: &Places) {
    let saved = places.saved("x");
    let saved = saved.ancestors().nth(2);
    for path in [Some(places.snapshots()).as_deref(), saved]
        .into_iter()
        .flatten()
    {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        for entry in entries {
            let is_hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            let path = entry.path();
            if Some(path.as_path()) == saved || !(is_hidden || path.parent() == saved) {
                continue;
            }
            // Held until it is gone.
            if let Ok(Some(_lock)) = lock(&path) {
                let _ = fs::remove_dir_all(&path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap().flatten();
        let mut names: Vec<_> = entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_directory_gets_its_name_when_it_is_whole_and_replaces_nothing() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("snapshots").join("a");
        let parent = target.parent().unwrap();
        let staged = Staged::new(&target).unwrap();
        staged.write("x", b"1").unwrap();
        assert!(!target.exists());
        staged.give_name(&target).unwrap();
        assert_eq!(
            (names(parent), names(&target)),
            (vec!["a".to_owned()], vec!["x".to_owned()])
        );
        let staged = Staged::new(&target).unwrap();
        staged.write("y", b"2").unwrap();
        assert!(matches!(staged.give_name(&target), Err(Error::Taken(_))));
        assert_eq!(
            (names(parent), names(&target)),
            (vec!["a".to_owned()], vec!["x".to_owned()])
        );
        drop(Staged::new(&target).unwrap());
        assert_eq!(names(parent), ["a"]);
    }

    #[test]
    fn what_was_left_is_collected_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let places = Places {
            data: root.path().into(),
            state: root.path().into(),
            libexec: root.path().into(),
        };
        collect(&places);
        let target = places.snapshots().join("a");
        let made = Staged::new(&target).unwrap();
        for name in ["b", ".old.new-1", ".new", ".new/dead", ".new/lives"] {
            fs::create_dir(places.snapshots().join(name)).unwrap();
        }
        let lives = places.saved("lives");
        let lives = lock(lives.parent().unwrap()).unwrap().unwrap();
        let own = format!(".a.new-{}", std::process::id());
        collect(&places);
        assert_eq!(names(&places.snapshots()), [own.as_str(), ".new", "b"]);
        assert_eq!(names(&places.snapshots().join(".new")), ["lives"]);
        drop((made, lives));
    }
}

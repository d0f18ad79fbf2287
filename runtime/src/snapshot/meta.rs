//! What a snapshot says of itself beside its state and memory (`snapshot.json`).

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;
use crate::places::Places;
use crate::run::origin::Origin;

/// Its file.
pub const FILE: &str = "snapshot.json";
/// A copy of the machine's own disk, if it has one.
pub const LAYER: &str = "layer";
/// Version of [`Meta`].
pub const VERSION: u32 = 1;
/// Longest name of a snapshot.
const MAX_NAME: usize = 64;
/// Most bytes of the file: a command's description has 64 KiB at most.
const MAX_META: u64 = 1 << 20;

/// A snapshot's description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    /// [`VERSION`].
    pub version: u32,
    /// Of which machine it is.
    pub id: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// What that machine is.
    pub origin: Origin,
    /// Of each disk size and time of the last change, when it was made: its content is not in the snapshot.
    pub disks: Vec<Option<(u64, i64)>>,
}

/// A snapshot's directory, and what is in it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Its name, or its path.
    pub name: String,
    /// Its directory, without symbolic links.
    pub directory: PathBuf,
    /// Its description.
    pub meta: Meta,
}

impl Snapshot {
    /// The snapshot called `name`, or whose directory is the path `name`.
    pub fn find(places: &Places, name: &str) -> Result<Self, Error> {
        let directory = match is_path(name) {
            true => PathBuf::from(name),
            false => places.snapshots().join(checked(name)?),
        };
        let unknown = || Error::Unknown(name.to_owned());
        let directory = fs::canonicalize(&directory).map_err(|_| unknown())?;
        let path = directory.join(FILE);
        if !path.is_file() {
            return Err(unknown());
        }
        for owned in [&directory, &path] {
            check_owner(owned)?;
        }
        let failed = |source| Error::io("cannot read", &path)(source);
        let length = fs::metadata(&path).map_err(failed)?.len();
        let bad = |why: String| Error::BadMeta {
            path: path.clone(),
            why,
        };
        if length > MAX_META {
            return Err(bad(format!("it has {length} bytes")));
        }
        let text = fs::read(&path).map_err(failed)?;
        let meta: Meta = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
        if meta.version != VERSION {
            let version = meta.version;
            return Err(bad(format!(
                "it has version {version}, this program knows {VERSION}"
            )));
        }
        Ok(Self {
            name: name.to_owned(),
            directory,
            meta,
        })
    }

    /// All that have names, by them; those that cannot be read are left out.
    pub fn all(places: &Places) -> Vec<Self> {
        let entries = fs::read_dir(places.snapshots()).into_iter().flatten();
        let names = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok());
        let found = names.filter_map(|name| Self::find(places, checked(&name).ok()?).ok());
        let mut found: Vec<Self> = found.collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    /// One of its files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Bytes that it takes on disk.
    pub fn size(&self) -> u64 {
        let entries = fs::read_dir(&self.directory).into_iter().flatten();
        let files = entries.flatten().filter_map(|entry| entry.metadata().ok());
        files
            .map(|data| data.blocks().saturating_mul(512))
            .fold(0, u64::saturating_add)
    }
}

/// Whether nobody but root has written it: it says which files of the host a machine gets.
fn check_owner(path: &Path) -> Result<(), Error> {
    let data = fs::metadata(path).map_err(Error::io("cannot look at", path))?;
    match data.uid() == nix::unistd::geteuid().as_raw() && data.mode() & 0o022 == 0 {
        true => Ok(()),
        false => Err(Error::Foreign(path.to_path_buf())),
    }
}

/// Whether `name` says where a snapshot is, and not what it is called.
pub fn is_path(name: &str) -> bool {
    name.contains('/')
}

/// A name that a snapshot can have: those that begin with a dot are ours.
pub fn checked(name: &str) -> Result<&str, Error> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let good = (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(fits);
    match good && !name.starts_with(['.', '-']) {
        true => Ok(name),
        false => Err(Error::BadName(name.to_owned())),
    }
}

/// The directory that a snapshot will be, which must not be there, in one that is.
pub fn target(places: &Places, name: &str) -> Result<PathBuf, Error> {
    let path = match is_path(name) {
        false => places.snapshots().join(checked(name)?),
        true => {
            let path = Path::new(name);
            let last = path.file_name().and_then(|last| last.to_str());
            let last = checked(last.ok_or_else(|| Error::BadName(name.to_owned()))?)?;
            let parent = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("/"));
            let parent = fs::canonicalize(parent).map_err(Error::io("cannot find", parent))?;
            parent.join(last)
        }
    };
    match path.symlink_metadata() {
        Ok(_) => Err(Error::Taken(path)),
        Err(_) => Ok(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "build-1", "v1.2_x"] {
            checked(good).unwrap();
        }
        for bad in ["", ".new", "..", "-x", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(matches!(checked(bad), Err(Error::BadName(_))), "{bad}");
        }
    }

    #[test]
    fn targets() {
        let root = tempfile::tempdir().unwrap();
        let places = Places {
            data: root.path().join("data"),
            state: root.path().into(),
            libexec: root.path().into(),
        };
        let here = fs::canonicalize(root.path()).unwrap();
        assert_eq!(target(&places, "s").unwrap(), places.snapshots().join("s"));
        let path = here.join("s");
        assert_eq!(target(&places, path.to_str().unwrap()).unwrap(), path);
        fs::create_dir(&path).unwrap();
        let refused = target(&places, path.to_str().unwrap());
        assert!(matches!(refused, Err(Error::Taken(_))));
        let nowhere = here.join("none/s");
        assert!(matches!(
            target(&places, nowhere.to_str().unwrap()),
            Err(Error::Io { .. })
        ));
        assert!(matches!(
            Snapshot::find(&places, "s"),
            Err(Error::Unknown(_))
        ));
        fs::write(path.join(FILE), "{}").unwrap();
        let found = Snapshot::find(&places, path.to_str().unwrap());
        assert!(matches!(found, Err(Error::BadMeta { .. })));
        let everybodys = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        fs::set_permissions(&path, everybodys).unwrap();
        let found = Snapshot::find(&places, path.to_str().unwrap());
        assert!(matches!(found, Err(Error::Foreign(_))));
    }
}

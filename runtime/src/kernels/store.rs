//! The directory of registered kernels.
//!
//! `CASEMATE_DATA_DIR/kernels/NAME/{vmlinux, config?, modules/, meta.json}`, made under a temporary name and renamed, so a
//! kernel that is there is whole. A file `.default` beside them names the default one.

use super::Error;
use super::index::Index;
use crate::places::Places;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Version of [`Meta`] in `meta.json`.
const META_VERSION: u32 = 1;
/// Prefix of directories in the making.
const STAGING: &str = ".new-";

/// What is known of a kernel (`meta.json`).
#[derive(Debug, Serialize, Deserialize)]
pub struct Meta {
    /// [`META_VERSION`].
    pub version: u32,
    /// `uname -r`, or empty.
    pub release: String,
    /// Where it came from, for people.
    pub source: String,
    /// SHA-256 of what it was made from, in hexadecimal.
    pub digest: String,
    /// Its drivers; `None` when it came without modules and lists of built-in ones.
    pub index: Option<Index>,
}

impl Meta {
    /// The description of a new kernel.
    pub fn new(release: String, source: String, digest: String, index: Option<Index>) -> Self {
        Self {
            version: META_VERSION,
            release,
            source,
            digest,
            index,
        }
    }
}

/// The kernels of this host.
pub struct Store {
    data: PathBuf,
    kernels: PathBuf,
}

impl Store {
    /// The store in the data directory; nothing is made yet.
    pub fn open() -> Self {
        Self::at(Places::from_env().data)
    }

    /// A store somewhere else.
    pub fn at(data: PathBuf) -> Self {
        Self {
            kernels: data.join("kernels"),
            data,
        }
    }

    /// Where composed initrds are kept.
    pub fn initrd_cache(&self) -> PathBuf {
        self.data.join("cache/initrd")
    }

    /// A kernel's own directory.
    pub fn directory(&self, name: &str) -> PathBuf {
        self.kernels.join(name)
    }

    /// A kernel's ELF file.
    pub fn vmlinux(&self, name: &str) -> PathBuf {
        self.directory(name).join("vmlinux")
    }

    /// True when a kernel of this name is registered.
    pub fn has(&self, name: &str) -> bool {
        is_name(name) && self.directory(name).join("meta.json").is_file()
    }

    /// Names of all kernels, sorted.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        let entries = match fs::read_dir(&self.kernels) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("read", &self.kernels, error)),
        };
        let names = entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> = names.filter(|name| self.has(name)).collect();
        names.sort();
        Ok(names)
    }

    /// A kernel's description.
    pub fn meta(&self, name: &str) -> Result<Meta, Error> {
        if !self.has(name) {
            return Err(Error::Unknown(name.into()));
        }
        let path = self.directory(name).join("meta.json");
        let text = fs::read(&path).map_err(|error| Error::io("read", &path, error))?;
        let damaged = |why: String| Error::Damaged {
            name: name.into(),
            why,
        };
        let meta: Meta =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if meta.version != META_VERSION {
            return Err(damaged(format!(
                "format {} where {META_VERSION} is expected",
                meta.version
            )));
        }
        Ok(meta)
    }

    /// The name of the default kernel: the chosen one, or the only one.
    pub fn default_name(&self) -> Result<String, Error> {
        if let Some(name) = self.chosen_default() {
            return Ok(name);
        }
        let mut names = self.names()?;
        match (names.len(), names.pop()) {
            (1, Some(name)) => Ok(name),
            (_, None) => Err(Error::NoKernel),
            (_, Some(_)) => Err(Error::NoDefault(self.names()?.join(", "))),
        }
    }

    fn chosen_default(&self) -> Option<String> {
        let name = fs::read_to_string(self.kernels.join(".default")).ok()?;
        let name = name.trim();
        self.has(name).then(|| name.to_owned())
    }

    /// Makes a kernel the default one.
    pub fn set_default(&self, name: &str) -> Result<(), Error> {
        if !self.has(name) {
            return Err(Error::Unknown(name.into()));
        }
        let (path, new) = (
            self.kernels.join(".default"),
            self.kernels.join(".default.new"),
        );
        fs::write(&new, name)
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|error| Error::io("write", &path, error))
    }

    /// Takes the store's lock, for what changes it, and clears what an interrupted change left behind.
    pub fn lock(&self) -> Result<Flock<File>, Error> {
        fs::create_dir_all(&self.kernels)
            .map_err(|error| Error::io("make", &self.kernels, error))?;
        let path = self.kernels.join(".lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| Error::io("open", &path, error))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| Error::io("lock", &path, errno.into()))?;
        for entry in fs::read_dir(&self.kernels)
            .map_err(|error| Error::io("read", &self.kernels, error))?
            .flatten()
        {
            if entry.file_name().to_string_lossy().starts_with(STAGING) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(lock)
    }

    /// A directory to put a new kernel together in.
    pub fn staging(&self) -> Result<tempfile::TempDir, Error> {
        tempfile::Builder::new()
            .prefix(STAGING)
            .tempdir_in(&self.kernels)
            .map_err(|error| Error::io("make a directory in", &self.kernels, error))
    }

    /// Gives a finished kernel its name. The first one becomes the default.
    pub fn publish(&self, staged: &Path, name: &str, meta: &Meta) -> Result<(), Error> {
        let first = self.names()?.is_empty();
        let path = staged.join("meta.json");
        let text = serde_json::to_vec_pretty(meta)
            .map_err(|error| Error::io("write", &path, error.into()))?;
        fs::write(&path, text).map_err(|error| Error::io("write", &path, error))?;
        let target = self.directory(name);
        fs::rename(staged, &target).map_err(|error| Error::io("rename to", &target, error))?;
        if first {
            self.set_default(name)?;
        }
        Ok(())
    }

    /// Removes a kernel: out of sight first, so that nobody sees half of one.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        if !self.has(name) {
            return Err(Error::Unknown(name.into()));
        }
        let (path, hidden) = (
            self.directory(name),
            self.kernels.join(format!("{STAGING}{name}")),
        );
        fs::rename(&path, &hidden)
            .and_then(|()| fs::remove_dir_all(&hidden))
            .map_err(|error| Error::io("remove", &path, error))
    }
}

/// Whether a kernel may have this name: it becomes a directory's.
pub fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() <= 64
        && bytes
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"._+-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["6.1.0-56-cloud-amd64", "a", "5.15.0+x_y"] {
            assert!(is_name(good), "{good}");
        }
        for bad in [
            "",
            ".hidden",
            "../x",
            "a/b",
            "-x",
            "a b",
            "a\n",
            &"x".repeat(65),
        ] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn life_of_a_kernel() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::at(data.path().into());
        assert!(matches!(store.default_name(), Err(Error::NoKernel)));
        let _lock = store.lock().unwrap();
        for name in ["b", "a"] {
            let staged = store.staging().unwrap();
            fs::write(staged.path().join("vmlinux"), "x").unwrap();
            store
                .publish(
                    &staged.keep(),
                    name,
                    &Meta::new("1".into(), "s".into(), "d".into(), None),
                )
                .unwrap();
        }
        assert_eq!(store.names().unwrap(), ["a", "b"]);
        assert_eq!(store.default_name().unwrap(), "b");
        store.set_default("a").unwrap();
        assert_eq!(store.default_name().unwrap(), "a");
        store.remove("a").unwrap();
        assert_eq!(store.default_name().unwrap(), "b");
        assert!(matches!(store.remove("a"), Err(Error::Unknown(_))));
        assert!(matches!(store.meta("../b"), Err(Error::Unknown(_))));
        fs::write(data.path().join("kernels/b/meta.json"), "{").unwrap();
        assert!(matches!(store.meta("b"), Err(Error::Damaged { .. })));
    }

    #[test]
    fn the_lock_clears_leftovers() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::at(data.path().into());
        drop(store.lock().unwrap());
        let leftover = store.staging().unwrap().keep();
        drop(store.lock().unwrap());
        assert!(!leftover.exists());
    }
}

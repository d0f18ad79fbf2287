//! Root file systems for guests: a directory becomes a read-only erofs image, cached by content.
//!
//! Extended attributes are neither part of the key nor of the image.

mod key;

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use key::Key;
use nix::fcntl::{Flock, FlockArg};

use crate::places::Places;

/// Prefix of images in the making.
pub const BUILDING: &str = ".building-";
/// Age of one in the making that nobody makes any more.
const SWEEP_AGE: Duration = Duration::from_secs(3600);
/// How often a tree that changes meanwhile is made into an image.
const ATTEMPTS: u32 = 2;

/// Why a directory did not become an image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path.
    #[error("--rootfs: {what} {}: {source}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The host's own root.
    #[error("--rootfs /: that is the host's own root; give a directory that holds a guest's")]
    HostRoot,
    /// Neither directory nor image.
    #[error("--rootfs {}: give a directory or an image (a regular file or block device)", .0.display())]
    Kind(PathBuf),
    /// The tool is missing.
    #[error("mkfs.erofs not found, which makes a directory into an image: apt install erofs-utils")]
    NoMkfs,
    /// It does not hold still.
    #[error("--rootfs {}: it changes while it is read: give a directory that nobody writes to", .0.display())]
    Changing(PathBuf),
    /// The tool failed.
    #[error("mkfs.erofs failed on {}: {message}", directory.display())]
    Mkfs {
        /// Its input.
        directory: PathBuf,
        /// Its last line.
        message: String,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Io { what, path, source }
}

/// What is given to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The image, without symbolic links in its path.
    pub path: PathBuf,
    /// Its file system.
    pub fs_type: String,
}

/// Finds `mkfs.erofs`.
pub fn find_mkfs() -> Option<PathBuf> {
    find_program("mkfs.erofs")
}

/// Finds a program in `PATH` and where root's programs are.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}

/// The image for a `--rootfs`: a directory is made into one, a file is taken as it is, of the type given.
///
/// The type of a file is never guessed from its content, which a guest may have written.
pub fn prepare(places: &Places, given: &Path, fs_type: &str) -> Result<Image, Error> {
    let path = fs::canonicalize(given).map_err(io_error("cannot find", given))?;
    if path == Path::new("/") {
        return Err(Error::HostRoot);
    }
    let kind = fs::metadata(&path)
        .map_err(io_error("cannot look at", &path))?
        .file_type();
    if kind.is_dir() {
        return Ok(Image {
            path: build(places, &path)?,
            fs_type: "erofs".to_string(),
        });
    }
    if !crate::run::is_disk(kind) {
        return Err(Error::Kind(path));
    }
    Ok(Image {
        path,
        fs_type: fs_type.to_string(),
    })
}

fn build(places: &Places, directory: &Path) -> Result<PathBuf, Error> {
    build_with(places, directory, make)
}

/// With `make` for `mkfs.erofs`.
fn build_with(
    places: &Places,
    directory: &Path,
    make: impl Fn(&Path, &Path, &Key) -> Result<(), Error>,
) -> Result<PathBuf, Error> {
    let cache = places.data.join("cache").join("rootfs");
    fs::create_dir_all(&cache).map_err(io_error("cannot make", &cache))?;
    let cache = fs::canonicalize(&cache).map_err(io_error("cannot find", &cache))?;
    let mut key = key::of_tree(directory)?;
    for _ in 0..ATTEMPTS {
        let image = cache.join(format!("{key}.erofs"));
        if image.is_file() {
            return Ok(image);
        }
        sweep(&cache);
        // Built under another name, so that no half of an image is ever used; removed when anything fails.
        let temporary = tempfile::Builder::new()
            .prefix(BUILDING)
            .tempfile_in(&cache)
            .map_err(io_error("cannot write to", &cache))?;
        // Held until it has its name, so that nobody sweeps it away.
        let _lock = temporary
            .as_file()
            .try_clone()
            .map(|file| Flock::lock(file, FlockArg::LockShared));
        make(directory, temporary.path(), &key)?;
        // The tree was read twice: what the key was made of need not be what is in the image.
        let after = key::of_tree(directory)?;
        if after == key {
            temporary
                .persist(&image)
                .map_err(|error| io_error("cannot name", &image)(error.error))?;
            return Ok(image);
        }
        key = after;
    }
    Err(Error::Changing(directory.to_path_buf()))
}

/// Removes from a cache what builds left that were killed.
pub fn sweep(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let is_old = |file: &File| {
            let time = file.metadata().and_then(|data| data.modified());
            time.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > SWEEP_AGE))
        };
        if !entry.file_name().to_string_lossy().starts_with(BUILDING) {
            continue;
        }
        let old = File::open(entry.path()).ok().filter(is_old);
        if old.is_some_and(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn make(directory: &Path, image: &Path, key: &Key) -> Result<(), Error> {
    let mkfs = find_mkfs().ok_or(Error::NoMkfs)?;
    let output = Command::new(&mkfs)
        // No time of the clock and no random UUID: the same tree gives the same image.
        .args(["-zlz4", "-T0", "-x-1", "-U"])
        .arg(key.uuid())
        .arg(image)
        .arg(directory)
        .stdin(Stdio::null())
        .output()
        .map_err(io_error("cannot run", &mkfs))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let message = text
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("no message");
    Err(Error::Mkfs {
        directory: directory.to_path_buf(),
        message: message.trim().to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(root: &Path) -> Places {
        Places {
            data: root.join("data"),
            state: root.join("state"),
            libexec: root.to_path_buf(),
        }
    }

    #[test]
    fn a_directory_becomes_an_image_once() {
        if find_mkfs().is_none() {
            panic!("install erofs-utils: this test makes an image");
        }
        let root = tempfile::tempdir().unwrap();
        let tree = root.path().join("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("file"), "content").unwrap();
        let places = places(root.path());
        let first = prepare(&places, &tree, "ext4").unwrap();
        assert_eq!(first.fs_type, "erofs");
        let bytes = fs::read(&first.path).unwrap();
        // The magic number of erofs, at its superblock's place.
        assert_eq!(bytes[1024..1028], 0xe0f5_e1e2u32.to_le_bytes());

        fs::remove_file(&first.path).unwrap();
        let second = prepare(&places, &tree, "erofs").unwrap();
        assert_eq!(first, second);
        assert!(bytes == fs::read(&second.path).unwrap(), "not reproducible");
        let cache = root.path().join("data/cache/rootfs");
        assert_eq!(fs::read_dir(cache).unwrap().count(), 1);
    }

    #[test]
    fn an_image_has_the_key_of_what_is_in_it() {
        let root = tempfile::tempdir().unwrap();
        let (tree, places) = (root.path().join("tree"), places(root.path()));
        fs::create_dir(&tree).unwrap();
        let write = |text: &str| fs::write(tree.join("file"), text).unwrap();
        let images = || fs::read_dir(root.path().join("data/cache/rootfs")).unwrap();
        write("0");
        // Somebody writes while the image is made: each time, or only the first one.
        let made = std::cell::Cell::new(0u32);
        let changing = |directory: &Path, image: &Path, _: &Key| {
            fs::copy(directory.join("file"), image).unwrap();
            made.set(made.get() + 1);
            write(&format!("{:02}", made.get()));
            Ok(())
        };
        let refused = build_with(&places, &tree, changing).unwrap_err();
        assert!(matches!(refused, Error::Changing(_)), "{refused}");
        assert_eq!((made.get(), images().count()), (ATTEMPTS, 0));

        made.set(0);
        let once = |directory: &Path, image: &Path, key: &Key| match made.get() {
            0 => changing(directory, image, key),
            _ => {
                fs::copy(directory.join("file"), image).unwrap();
                Ok(())
            }
        };
        let image = build_with(&places, &tree, once).unwrap();
        assert_eq!(fs::read(&image).unwrap(), b"01");
        let name = format!("{}.erofs", key::of_tree(&tree).unwrap());
        assert!(image.ends_with(name) && images().count() == 1);
    }

    #[test]
    fn what_killed_builds_left_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let make = |name: &str, age: u64| {
            let file = File::create(root.path().join(name)).unwrap();
            let time = std::time::SystemTime::now() - Duration::from_secs(age);
            file.set_modified(time).unwrap();
            file
        };
        make(".building-old", 4000);
        make(".building-new", 0);
        make("image.erofs", 4000);
        let busy = Flock::lock(make(".building-busy", 4000), FlockArg::LockShared).unwrap();
        sweep(root.path());
        let mut left: Vec<_> = fs::read_dir(root.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, [".building-busy", ".building-new", "image.erofs"]);
        drop(busy);
    }

    #[test]
    fn an_image_keeps_the_type_given() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("image");
        fs::write(&file, "x").unwrap();
        let image = prepare(&places(root.path()), &file, "ext4").unwrap();
        assert_eq!(image.fs_type, "ext4");
    }

    #[test]
    fn what_cannot_be_a_root_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let places = places(root.path());
        assert!(matches!(
            prepare(&places, Path::new("/"), "erofs"),
            Err(Error::HostRoot)
        ));
        assert!(matches!(
            prepare(&places, Path::new("/dev/null"), "erofs"),
            Err(Error::Kind(_))
        ));
        assert!(matches!(
            prepare(&places, Path::new("/nonexistent"), "erofs"),
            Err(Error::Io { .. })
        ));
    }
}

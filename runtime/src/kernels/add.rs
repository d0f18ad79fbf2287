//! `casemate kernel add`: takes a kernel apart in jailed processes and gives the result its name.

use super::index::{Index, module_name};
use super::initrd::hex;
use super::jail::{self, Job, Task, UNPACKER_ID};
use super::store::{Meta, Store, is_name};
use super::unpack::Image;
use super::{Error, Needs, deb};
use crate::say;
use nix::unistd::{Gid, Uid, fchown, geteuid};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use walkdir::WalkDir;

/// Where a kernel comes from.
#[derive(Debug)]
pub enum Origin {
    /// Debian packages: one with the kernel, and others if its modules are apart.
    Packages(Vec<PathBuf>),
    /// A bzImage or ELF file, and the directory of its modules (`/lib/modules/RELEASE`).
    File {
        /// The image.
        image: PathBuf,
        /// Its modules.
        modules: Option<PathBuf>,
    },
}

impl Origin {
    /// The kernel that this host runs.
    pub fn host() -> Self {
        let release = match nix::sys::utsname::uname() {
            Ok(name) => name.release().to_string_lossy().into_owned(),
            Err(_) => String::new(),
        };
        Self::File {
            image: Path::new("/boot").join(format!("vmlinuz-{release}")),
            modules: Some(Path::new("/lib/modules").join(release)),
        }
    }

    fn inputs(&self) -> Vec<&Path> {
        match self {
            Self::Packages(paths) => paths.iter().map(PathBuf::as_path).collect(),
            Self::File { image, .. } => vec![image],
        }
    }
}

/// What [`add`] did.
pub struct Added {
    /// The kernel's name.
    pub name: String,
    /// It was there already, made from the same files.
    pub already: bool,
}

/// Registers a kernel. The same files under the same name again are no error and no work, unless an earlier version of
/// this program registered them and looked for fewer drivers: then they are registered anew.
pub fn add(
    store: &Store,
    origin: &Origin,
    name: Option<&str>,
    allow_missing_landlock: bool,
) -> Result<Added, Error> {
    if let Some(name) = name.filter(|name| !is_name(name)) {
        return Err(Error::BadName(name.into()));
    }
    if !geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    let digest = digest(origin)?;
    let _lock = store.lock()?;
    let before = registered(store, name, &digest)?;
    if let Some(name) = &before
        && is_complete(store, name)?
    {
        return Ok(Added {
            name: name.clone(),
            already: true,
        });
    }
    let staging = store.staging()?;
    let work = staging.path().join("work");
    fs::create_dir(&work).map_err(|error| Error::io("make", &work, error))?;
    give(&work, UNPACKER_ID, 0o700)?;

    let mut add = Adding {
        staging: staging.path(),
        work: &work,
        allow_missing_landlock,
        release: String::new(),
    };
    let source = add.gather(origin)?;
    let image = add.image(origin)?;
    let release = if add.release.is_empty() {
        image.release
    } else {
        add.release.clone()
    };
    // It is shown to people, whatever the name.
    if !release.is_empty() && !is_name(&release) {
        return Err(Error::BadRelease(release));
    }
    let name = match &before {
        Some(name) => name.clone(),
        None => choose_name(name, &release, origin)?,
    };
    if before.is_none() && store.has(&name) {
        return Err(Error::Exists(name));
    }
    let index = add.index(&source)?;
    let index = add.adopt(index)?;
    // Said now, and not when somebody wants to run something.
    if let Some(Err(lack)) = index
        .as_ref()
        .map(|index| index.load_order(&name, &Needs::default()))
    {
        say::warn(format_args!(
            "warning: {lack}; no command can be run with it"
        ));
    }
    fs::remove_dir_all(&work).map_err(|error| Error::io("remove", &work, error))?;
    fs::set_permissions(staging.path(), Permissions::from_mode(0o755))
        .map_err(|error| Error::io("change the mode of", staging.path(), error))?;
    let was_default = before.is_some() && store.default_name().is_ok_and(|default| default == name);
    if before.is_some() {
        store.remove(&name)?;
    }
    // Renamed away from where it would be removed; if that fails, the next lock clears it.
    store.publish(
        &staging.keep(),
        &name,
        &Meta::new(release, source, digest, index),
    )?;
    if was_default {
        store.set_default(&name)?;
    }
    Ok(Added {
        name,
        already: false,
    })
}

/// Whether all drivers that machines may need were looked for in a kernel's modules.
fn is_complete(store: &Store, name: &str) -> Result<bool, Error> {
    let index = store.meta(name)?.index;
    Ok(index.is_none_or(|index| index.is_complete()))
}

/// A kernel made from the same files, under the name if one is given.
fn registered(store: &Store, name: Option<&str>, digest: &str) -> Result<Option<String>, Error> {
    if let Some(name) = name {
        if !store.has(name) {
            return Ok(None);
        }
        let same = store.meta(name).is_ok_and(|meta| meta.digest == digest);
        return if same {
            Ok(Some(name.into()))
        } else {
            Err(Error::Exists(name.into()))
        };
    }
    Ok(store
        .names()?
        .into_iter()
        .find(|name| store.meta(name).is_ok_and(|meta| meta.digest == digest)))
}

fn choose_name(given: Option<&str>, release: &str, origin: &Origin) -> Result<String, Error> {
    if let Some(name) = given {
        return Ok(name.into());
    }
    let file = origin
        .inputs()
        .first()
        .and_then(|path| path.file_stem())
        .map(|name| name.to_string_lossy().into_owned());
    let name = if release.is_empty() {
        file.unwrap_or_default()
    } else {
        release.to_owned()
    };
    if is_name(&name) {
        Ok(name)
    } else {
        Err(Error::BadName(name))
    }
}

/// SHA-256 of everything that the kernel is made from; of a directory of modules, names, sizes and times.
fn digest(origin: &Origin) -> Result<String, Error> {
    let mut hash = Sha256::new();
    for path in origin.inputs() {
        hash.update(file_digest(open(path)?).map_err(|error| Error::io("read", path, error))?);
    }
    if let Origin::File {
        modules: Some(directory),
        ..
    } = origin
    {
        for file in module_files(directory)? {
            let path = directory.join(&file);
            let data = fs::metadata(&path).map_err(|error| Error::io("read", &path, error))?;
            hash.update(format!(
                "{file}\n{} {} {}\n",
                data.len(),
                data.mtime(),
                data.mtime_nsec()
            ));
        }
    }
    Ok(hex(&hash.finalize()))
}

fn file_digest(mut file: File) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().into()),
            length => hash.update(buffer.get(..length).unwrap_or_default()),
        }
    }
}

/// Opens a regular file; anything else could hang or never end.
fn open(path: &Path) -> Result<File, Error> {
    open_with(path, 0)
}

fn open_with(path: &Path, flags: i32) -> Result<File, Error> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | flags)
        .open(path)
        .map_err(|error| Error::io("open", path, error))?;
    match file.metadata() {
        Ok(data) if data.is_file() => Ok(file),
        Ok(_) => Err(Error::io(
            "open",
            path,
            io::Error::other("not a regular file"),
        )),
        Err(error) => Err(Error::io("open", path, error)),
    }
}

/// The modules and lists of built-in ones below a directory, relative to it, sorted.
fn module_files(directory: &Path) -> Result<Vec<String>, Error> {
    let mut files = Vec::new();
    for entry in WalkDir::new(directory).sort_by_file_name() {
        let entry = entry.map_err(|error| Error::io("read", directory, error.into()))?;
        let Some(path) = entry
            .path()
            .strip_prefix(directory)
            .ok()
            .and_then(Path::to_str)
        else {
            continue;
        };
        let wanted = module_name(path).is_some()
            || matches!(path, "modules.builtin" | "modules.builtin.modinfo");
        if entry.file_type().is_file() && wanted && !path.contains('\n') {
            files.push(path.to_owned());
        }
    }
    Ok(files)
}

/// Changes owner and mode of something that must be a directory or a regular file with one name.
fn give(path: &Path, id: u32, mode: u32) -> Result<(), Error> {
    let failed = |error| Error::io("take over", path, error);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    let data = file.metadata().map_err(failed)?;
    let sound = data.is_dir() || (data.is_file() && data.nlink() == 1);
    if !sound {
        return Err(failed(io::Error::other(
            "neither a directory nor a regular file with one name",
        )));
    }
    fchown(&file, Some(Uid::from_raw(id)), Some(Gid::from_raw(id)))
        .map_err(|errno| failed(errno.into()))?;
    file.set_permissions(Permissions::from_mode(mode))
        .map_err(failed)
}

struct Adding<'a> {
    staging: &'a Path,
    /// Where the jailed processes work; theirs until [`Self::adopt`].
    work: &'a Path,
    allow_missing_landlock: bool,
    release: String,
}

impl Adding<'_> {
    fn task<'t>(&'t self, job: Job, input: File, name: &'t str) -> Task<'t> {
        Task {
            job,
            directory: self.work,
            input,
            output: None,
            allow_missing_landlock: self.allow_missing_landlock,
            name,
        }
    }

    /// Brings modules, configuration and a packed kernel into the working directory; returns the origin's name.
    fn gather(&mut self, origin: &Origin) -> Result<String, Error> {
        match origin {
            Origin::Packages(paths) => {
                let mut kernel = false;
                for path in paths {
                    let name = path.display().to_string();
                    say::warn(format_args!("unpacking {name}"));
                    let contents: deb::Contents =
                        jail::run(self.task(Job::Package, open(path)?, &name))?;
                    kernel |= contents.kernel;
                    if contents.kernel || self.release.is_empty() {
                        self.release = contents.release;
                    }
                }
                let names = paths
                    .iter()
                    .map(|path| path.display().to_string())
                    .collect::<Vec<_>>()
                    .join(", ");
                if !kernel {
                    return Err(Error::NoKernelInPackage(names));
                }
                Ok(names)
            }
            Origin::File { image, modules } => {
                if let Some(directory) = modules {
                    self.copy_modules(directory)?;
                }
                Ok(image.display().to_string())
            }
        }
    }

    /// Copies modules without looking into them.
    fn copy_modules(&self, directory: &Path) -> Result<(), Error> {
        let files = module_files(directory)?;
        say::warn(format_args!(
            "copying {} files from {}",
            files.len(),
            directory.display()
        ));
        let target = self.work.join("modules");
        for file in files {
            let (from, to) = (directory.join(&file), target.join(&file));
            let parent = to.parent().unwrap_or(&target);
            fs::create_dir_all(parent).map_err(|error| Error::io("make", parent, error))?;
            fs::copy(&from, &to).map_err(|error| Error::io("copy", &from, error))?;
        }
        for entry in WalkDir::new(&target).into_iter().flatten() {
            let mode = if entry.file_type().is_dir() {
                0o755
            } else {
                0o644
            };
            give(entry.path(), UNPACKER_ID, mode)?;
        }
        Ok(())
    }

    /// Unpacks the image to `vmlinux`.
    fn image(&self, origin: &Origin) -> Result<Image, Error> {
        let packed = match origin {
            Origin::Packages(_) => self.work.join("vmlinuz"),
            Origin::File { image, .. } => image.clone(),
        };
        let path = self.staging.join("vmlinux");
        let output = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&path)
            .map_err(|error| Error::io("make", &path, error))?;
        let name = match origin {
            Origin::Packages(paths) => paths
                .first()
                .map(|path| path.display().to_string())
                .unwrap_or_default(),
            Origin::File { image, .. } => image.display().to_string(),
        };
        // Where the unpacker has been, a name must be a file's: what a link leads to would be read as root.
        let flags = match origin {
            Origin::Packages(_) => libc::O_NOFOLLOW,
            Origin::File { .. } => 0,
        };
        let mut task = self.task(Job::Image, open_with(&packed, flags)?, &name);
        task.output = Some(output);
        jail::run(task)
    }

    /// Indexes the modules, if there are any or it is known what is built in.
    fn index(&self, name: &str) -> Result<Option<Index>, Error> {
        let modules = self.work.join("modules");
        // Of the link itself, should it be one.
        if !fs::symlink_metadata(&modules).is_ok_and(|data| data.is_dir()) {
            return Ok(None);
        }
        let files = module_files(&modules)?;
        let failed = |error| Error::io("make a list in", self.staging, error);
        let mut list = tempfile::tempfile_in(self.staging).map_err(failed)?;
        for file in files.iter().filter(|file| module_name(file).is_some()) {
            writeln!(list, "{file}").map_err(failed)?;
        }
        list.rewind().map_err(failed)?;
        jail::run(self.task(Job::Index, list, name)).map(Some)
    }

    /// Makes what the jailed processes left behind ours, having checked what it is: they are gone, so it changes no more.
    fn adopt(&self, index: Option<Index>) -> Result<Option<Index>, Error> {
        for entry in WalkDir::new(self.work) {
            let entry = entry.map_err(|error| Error::io("read", self.work, error.into()))?;
            give(
                entry.path(),
                0,
                if entry.file_type().is_dir() {
                    0o755
                } else {
                    0o644
                },
            )?;
        }
        for name in ["modules", "config"] {
            let (from, to) = (self.work.join(name), self.staging.join(name));
            if from.exists() {
                fs::rename(&from, &to).map_err(|error| Error::io("move", &from, error))?;
            }
        }
        let Some(mut index) = index else {
            return Ok(None);
        };
        for (name, module) in &mut index.modules {
            // A name becomes part of a path in the initrd, and a word of its list.
            if !is_name(name.trim_start_matches('_')) {
                return Err(Error::BadName(name.clone()));
            }
            let path = self.staging.join("modules").join(&module.file);
            let inside = path
                .canonicalize()
                .is_ok_and(|path| path.starts_with(self.staging.join("modules")));
            if !inside {
                return Err(Error::io(
                    "find module",
                    &path,
                    io::ErrorKind::NotFound.into(),
                ));
            }
            module.digest =
                hex(&file_digest(open(&path)?).map_err(|error| Error::io("read", &path, error))?);
        }
        Ok(Some(index))
    }
}

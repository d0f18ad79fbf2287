//! Files that the VMM makes, such as snapshots: nobody sees them until they are whole.
//!
//! A file that is being made has no name at all (`O_TMPFILE`, open(2)), so that it is gone whenever and
//! however broker and VMM end. Committing links it, or where the name is taken links it to a hidden name
//! beside it and renames it over the other file at once: linkat(2) replaces nothing. Where that does not
//! work (file systems without `O_TMPFILE`; before Linux 6.10 also every process without
//! CAP_DAC_READ_SEARCH), it has the hidden name from the start. The broker removes hidden names; only a
//! SIGKILL of the broker leaves one.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, openat2, renameat};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{UnlinkatFlags, fsync, linkat, unlinkat};

use crate::policy::{BrokerPolicy, beneath};
use crate::protocol::{NameError, check_name};

/// Most files that are made at once in one conversation.
pub const MAX_CREATIONS: usize = 4;

/// How many hidden names are tried. They are random, so a second one is hardly ever needed.
const ATTEMPTS: usize = 8;

/// How much of a file's name its hidden one repeats, in bytes: with what is added it stays a name (255).
const REPEATED: usize = 200;

/// What one conversation is making. Dropping it gives up what is not committed.
#[derive(Debug, Default)]
pub struct Creations(Vec<Creation>);

/// Why a file is not made, or does not get its name. The text goes back to the VMM.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The name cannot be one.
    #[error("{0}")]
    Name(#[from] NameError),
    /// It ends in `/` or `/.`, or is `.`.
    #[error("{0:?} is no file's name")]
    NotAName(String),
    /// Nothing allows the name.
    #[error("{0:?} may not be made: start the jailer with `--allow-create {0}`")]
    NotGranted(String),
    /// What was handed over at start stays what it is.
    #[error("{0:?} was granted as the file that it is, and cannot be replaced: use another name")]
    Passed(String),
    /// It is being made already.
    #[error("{0:?} is being made already")]
    Twice(String),
    /// [`MAX_CREATIONS`] are being made.
    #[error("{0:?} cannot be made: {MAX_CREATIONS} files are being made already")]
    TooMany(String),
    /// There is nothing to commit or discard.
    #[error("{0:?} is not being made")]
    NotMade(String),
    /// What has the name is not to be replaced.
    #[error("{name:?} is {found}: only a regular file can be replaced")]
    NotReplaced {
        /// The name asked for.
        name: String,
        /// What it is.
        found: &'static str,
    },
    /// The kernel refused.
    #[error("cannot {action} {name:?}: {source}{}", hint(*source))]
    Refused {
        /// What was being done.
        action: &'static str,
        /// The name asked for.
        name: String,
        /// Why.
        source: Errno,
    },
    /// The file is in its place, but a crash of the host may undo that.
    #[error("{name:?} is in place, but its directory cannot be synced: {source}")]
    NotSynced {
        /// The name asked for.
        name: String,
        /// Why.
        source: Errno,
    },
}

/// Makes a file without a name in a directory, where that is possible.
type First = fn(BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno>;

/// A file that is being made.
#[derive(Debug)]
struct Creation {
    /// Its name as asked for.
    name: String,
    /// Where it will be. By descriptor, so that it ends up there whatever the path leads to by then.
    directory: OwnedFd,
    /// Its name there.
    file_name: String,
    file: Arc<OwnedFd>,
    /// Its hidden name, while it has one.
    hidden: Option<String>,
}

impl Creations {
    /// Makes an empty file for a name.
    ///
    /// # Errors
    /// If nothing allows the name, something else than a regular file has it, or the kernel refuses.
    pub fn create(
        &mut self,
        policy: &BrokerPolicy,
        name: &str,
    ) -> Result<Arc<OwnedFd>, CreateError> {
        check_name(name)?;
        if self.position(name).is_ok() {
            return Err(CreateError::Twice(name.to_owned()));
        }
        if self.0.len() >= MAX_CREATIONS {
            return Err(CreateError::TooMany(name.to_owned()));
        }
        let creation = Creation::new(policy, name, make_unnamed)?;
        let file = Arc::clone(&creation.file);
        self.0.push(creation);
        Ok(file)
    }

    /// Gives a file its name, and syncs the directory.
    ///
    /// # Errors
    /// If there is none for this name, or the kernel refuses: the file is still there to be committed or
    /// discarded then, but for [`CreateError::NotSynced`].
    pub fn commit(&mut self, name: &str) -> Result<(), CreateError> {
        let at = self.position(name)?;
        if let Some(creation) = self.0.get_mut(at) {
            creation.take_name()?;
        }
        let creation = self.0.swap_remove(at);
        match fsync(&creation.directory) {
            // Not every file system has something to sync there.
            Ok(()) | Err(Errno::EINVAL) => Ok(()),
            Err(source) => Err(CreateError::NotSynced {
                name: name.to_owned(),
                source,
            }),
        }
    }

    /// Gives a file up.
    ///
    /// # Errors
    /// If there is none for this name.
    pub fn discard(&mut self, name: &str) -> Result<(), CreateError> {
        let at = self.position(name)?;
        drop(self.0.swap_remove(at));
        Ok(())
    }

    fn position(&self, name: &str) -> Result<usize, CreateError> {
        let mut all = self.0.iter();
        all.position(|creation| creation.name == name)
            .ok_or_else(|| CreateError::NotMade(name.to_owned()))
    }
}

impl Creation {
    /// Tries `first`, and else gives the file a hidden name.
    fn new(policy: &BrokerPolicy, name: &str, first: First) -> Result<Self, CreateError> {
        let place = place(policy, name)?;
        let file_name = place.file_name()?;
        let directory = place.directory()?;
        refuse_to_replace(directory.as_fd(), &file_name, name)?;
        let made = match first(directory.as_fd()) {
            Ok(Some(file)) => Ok((file, None)),
            Ok(None) => make_hidden(directory.as_fd(), &file_name),
            Err(source) => Err(source),
        };
        let (file, hidden) = made.map_err(refused("make", name))?;
        Ok(Self {
            name: name.to_owned(),
            directory,
            file_name,
            file: Arc::new(file),
            hidden,
        })
    }

    fn take_name(&mut self) -> Result<(), CreateError> {
        let failed = || refused("give its name to", &self.name);
        refuse_to_replace(self.directory.as_fd(), &self.file_name, &self.name)?;
        let hidden = match self.hidden.take() {
            Some(hidden) => hidden,
            None => match self.link(&self.file_name) {
                Ok(()) => return Ok(()),
                Err(Errno::EEXIST) => self.link_hidden().map_err(failed())?,
                Err(source) => return Err(failed()(source)),
            },
        };
        let renamed = renameat(
            &self.directory,
            hidden.as_str(),
            &self.directory,
            self.file_name.as_str(),
        );
        renamed.map_err(|source| {
            self.hidden = Some(hidden);
            refused("give its name to", &self.name)(source)
        })
    }

    fn link(&self, name: &str) -> Result<(), Errno> {
        link(self.file.as_fd(), self.directory.as_fd(), name)
    }

    fn link_hidden(&self) -> Result<String, Errno> {
        under_hidden_name(&self.file_name, |hidden| self.link(hidden)).map(|(hidden, ())| hidden)
    }
}

impl Drop for Creation {
    fn drop(&mut self) {
        if let Some(hidden) = &self.hidden {
            // There is nobody to tell.
            let _ = unlinkat(&self.directory, hidden.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// Where a name leads.
struct Place<'a> {
    name: &'a str,
    /// What the path starts from.
    root: BorrowedFd<'a>,
    path: &'a Path,
    /// How directories on the way are opened.
    how: OpenHow,
}

/// What allows a name to be made: the list, then the operator's chroot, or whatever this user may.
fn place<'a>(policy: &'a BrokerPolicy, name: &'a str) -> Result<Place<'a>, CreateError> {
    if policy.passed.iter().any(|passed| passed.name == name) {
        return Err(CreateError::Passed(name.to_owned()));
    }
    let path = Path::new(name);
    let at = |root, path, how| Place {
        name,
        root,
        path,
        how,
    };
    let may_create = policy.allowed.iter().filter(|allowed| allowed.create);
    for allowed in may_create {
        if let Some(path) = allowed.beneath(path) {
            return Ok(at(allowed.directory.as_fd(), path, beneath(OFlag::empty())));
        }
    }
    if policy.unconfined {
        return Ok(at(AT_FDCWD, path, OpenHow::new()));
    }
    match &policy.chroot {
        Some(chroot) => {
            // Inside the chroot its root is `/`.
            let path = path.strip_prefix(Component::RootDir).unwrap_or(path);
            Ok(at(chroot.as_fd(), path, beneath(OFlag::empty())))
        }
        None => Err(CreateError::NotGranted(name.to_owned())),
    }
}

impl Place<'_> {
    fn file_name(&self) -> Result<String, CreateError> {
        // Paths make nothing of a `/` or a `.` at the end, which say that a directory is meant.
        let last = self.name.rsplit('/').next().unwrap_or_default();
        let file_name = self.path.file_name().and_then(|name| name.to_str());
        match file_name {
            Some(file_name) if !matches!(last, "" | ".") => Ok(file_name.to_owned()),
            _ => Err(CreateError::NotAName(self.name.to_owned())),
        }
    }

    /// Opens the directory, for reading: one that is only a path (`O_PATH`) cannot be synced.
    fn directory(&self) -> Result<OwnedFd, CreateError> {
        let parent = self.path.parent().unwrap_or(Path::new(""));
        let parent = match parent.as_os_str().is_empty() {
            true => Path::new("."),
            false => parent,
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        openat2(self.root, parent, self.how.flags(flags))
            .map_err(refused("open the directory of", self.name))
    }
}

/// What has the name now must be nothing, or a regular file.
fn refuse_to_replace(
    directory: BorrowedFd<'_>,
    file_name: &str,
    name: &str,
) -> Result<(), CreateError> {
    let failed = || refused("look at", name);
    let found = match openat2(
        directory,
        file_name,
        beneath(OFlag::O_PATH | OFlag::O_NOFOLLOW),
    ) {
        Err(Errno::ENOENT) => return Ok(()),
        other => other.map_err(failed())?,
    };
    let stat = fstat(&found).map_err(failed())?;
    let found = match SFlag::from_bits_retain(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFREG => return Ok(()),
        SFlag::S_IFDIR => "a directory",
        SFlag::S_IFLNK => "a symbolic link",
        SFlag::S_IFIFO => "a pipe",
        SFlag::S_IFSOCK => "a socket",
        _ => "a device",
    };
    Err(CreateError::NotReplaced {
        name: name.to_owned(),
        found,
    })
}

/// A file without a name that can be given one; none where that is not possible.
fn make_unnamed(directory: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    let how = beneath(OFlag::O_TMPFILE | OFlag::O_RDWR).mode(Mode::S_IRUSR | Mode::S_IWUSR);
    let file = match openat2(directory, ".", how) {
        // EISDIR, EINVAL: file systems that have never heard of it.
        Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL) => return Ok(None),
        other => other?,
    };
    // A name that is always taken: the kernel looks whether this file may be linked before it finds that.
    match link(file.as_fd(), directory, ".") {
        Err(Errno::EEXIST) => Ok(Some(file)),
        _ => Ok(None),
    }
}

/// A file with a hidden name.
fn make_hidden(
    directory: BorrowedFd<'_>,
    file_name: &str,
) -> Result<(OwnedFd, Option<String>), Errno> {
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_NOFOLLOW;
    let how = beneath(flags).mode(Mode::S_IRUSR | Mode::S_IWUSR);
    let (hidden, file) = under_hidden_name(file_name, |hidden| openat2(directory, hidden, how))?;
    Ok((file, Some(hidden)))
}

fn link(file: BorrowedFd<'_>, directory: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    linkat(file, "", directory, name, AtFlags::AT_EMPTY_PATH)
}

/// Tries hidden names until one is free.
fn under_hidden_name<T>(
    file_name: &str,
    mut attempt: impl FnMut(&str) -> Result<T, Errno>,
) -> Result<(String, T), Errno> {
    for _ in 0..ATTEMPTS {
        let hidden = hidden_name(file_name);
        match attempt(&hidden) {
            Err(Errno::EEXIST) => {}
            other => return other.map(|made| (hidden, made)),
        }
    }
    Err(Errno::EEXIST)
}

/// `.<file>.casemate-<random>`
fn hidden_name(file_name: &str) -> String {
    let end = (0..=REPEATED)
        .rev()
        .find(|at| file_name.is_char_boundary(*at));
    let start = file_name.get(..end.unwrap_or(0)).unwrap_or(file_name);
    // Each state is seeded by the kernel's random numbers, and different from the one before.
    let random = RandomState::new().build_hasher().finish();
    format!(".{start}.casemate-{random:016x}")
}

fn refused(action: &'static str, name: &str) -> impl FnOnce(Errno) -> CreateError + use<> {
    let name = name.to_owned();
    move |source| CreateError::Refused {
        action,
        name,
        source,
    }
}

/// What to do, where that is known.
fn hint(source: Errno) -> &'static str {
    match source {
        Errno::EACCES | Errno::EPERM => {
            "; the machine's user must be able to read and to write its directory"
        }
        Errno::ELOOP => "; a symbolic link leads there: give the path without it",
        _ => "",
    }
}

#[cfg(test)]
mod tests;

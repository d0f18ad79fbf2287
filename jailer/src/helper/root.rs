//! A helper's root: a read-only tmpfs with nothing but mounts of what it may see, each where it is on the host.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::stat::{SFlag, fstat};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::error::{Context, Result, refused};
use crate::grants::file_type;

/// What is not bound from the host's.
pub const PROC: &str = "/proc";
/// What there is of it: the process itself, and how many files the host can have open, which virtiofsd asks for.
pub const OWN_PROC: [&str; 2] = ["/proc/self", "/proc/sys/fs/file-max"];

/// What may be done with something that is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Read and executed: the program and its libraries.
    Execute,
    /// Read.
    Read,
    /// Read and written.
    Write,
    /// The same, of a device node.
    Device,
}

/// Something of the host's that the helper sees.
#[derive(Debug)]
pub struct Bind {
    /// Where, on the host and in the jail.
    pub path: PathBuf,
    /// What may be done with it.
    pub usage: Use,
    /// A copy of the mount at this path, which is in no mount namespace yet.
    tree: OwnedFd,
    directory: bool,
}

impl Bind {
    /// Takes hold of a file or directory that is open: what it is cannot change any more.
    ///
    /// # Errors
    /// What `open_tree(2)` says.
    pub fn new(path: &Path, file: impl AsFd, usage: Use) -> Result<Self> {
        let object = path.display().to_string();
        let stat = fstat(file.as_fd()).doing("look at", &object)?;
        // Without what is mounted beneath.
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = open_tree(file.as_fd(), "", flags);
        let tree = tree.map_err(std::io::Error::from);
        Ok(Self {
            path: path.to_owned(),
            usage,
            tree: tree.doing("bind", object)?,
            directory: file_type(&stat) == SFlag::S_IFDIR,
        })
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.directory
    }

    fn flags(&self) -> MsFlags {
        let more = match self.usage {
            Use::Execute => MsFlags::MS_NODEV | MsFlags::MS_RDONLY,
            Use::Read => MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY,
            Use::Write => MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            Use::Device => MsFlags::MS_NOEXEC,
        };
        MsFlags::MS_NOSUID | more
    }
}

/// Refuses binds of which one would lie in another: its mount point would have to be made on the host.
///
/// # Errors
/// With both paths.
pub fn check(binds: &[Bind]) -> Result<()> {
    let mut known: BTreeMap<&Path, ()> = BTreeMap::new();
    for bind in binds {
        if known.insert(&bind.path, ()).is_some() {
            return refused(bind.path.display().to_string(), "bound twice");
        }
    }
    for bind in binds {
        for above in bind.path.ancestors().skip(1) {
            if known.contains_key(above) {
                return refused(
                    bind.path.display().to_string(),
                    format!(
                        "it lies in {}, which is bound too: bind what lies beside it one by one",
                        above.display()
                    ),
                );
            }
        }
    }
    Ok(())
}

/// Makes a mount point for each bind beneath `root`, an empty tmpfs, and mounts it there.
///
/// # Errors
/// What the kernel says.
pub fn populate(root: &Path, binds: &[Bind], proc: bool) -> Result<()> {
    let [own, number] = OWN_PROC.map(Path::new);
    if proc {
        point(root, own, true)?;
        point(root, number, false)?;
    }
    for bind in binds {
        point(root, &bind.path, bind.directory)?;
    }
    // After the last mount point was made: none can be in a mount.
    for bind in binds {
        let point = beneath(root, &bind.path);
        let object = point.display().to_string();
        let moved = move_mount(
            &bind.tree,
            "",
            rustix::fs::CWD,
            &point,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        );
        moved
            .map_err(std::io::Error::from)
            .doing("mount", &object)?;
        let none: Option<&str> = None;
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | bind.flags();
        mount(none, &point, none, flags, none).doing("restrict", &object)?;
    }
    Ok(())
}

fn beneath(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn point(root: &Path, path: &Path, is_directory: bool) -> Result<()> {
    let point = beneath(root, path);
    if is_directory {
        return directory(&point);
    }
    directory(point.parent().unwrap_or(root))?;
    let new = File::options()
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(&point);
    new.map(drop).doing("make", point.display().to_string())
}

fn directory(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o555).create(path);
    made.doing("make", path.display().to_string())
}

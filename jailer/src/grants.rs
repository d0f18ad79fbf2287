//! What the operator grants, opened while the host's paths still exist.
//!
//! Symbolic links are refused in every component: whoever may write to a directory on the way
//! could otherwise choose which of root's files the machine gets. That also refuses harmless links
//! (`/var/run`, `/dev/disk/by-id`); the error then names the path without links.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, OFlag, OpenHow, ResolveFlag, fcntl, openat2};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, umask};
use nix::sys::statvfs::{FsFlags, fstatvfs};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchdir, fchownat, unlinkat};

use crate::arguments::Arguments;
use crate::error::{Context, Result, refused};

/// Connections that may wait for the VMM to accept them.
const BACKLOG: i32 = 64;

/// A granted listener, and what is left of it on the host.
#[derive(Debug)]
pub struct Listener {
    /// The listening socket, non-blocking.
    pub socket: OwnedFd,
    /// The directory that holds it (`O_PATH`).
    pub directory: OwnedFd,
    /// Its name there.
    pub base_name: String,
}

impl Listener {
    /// Takes the socket's name away.
    pub fn remove(&self) {
        // The jail has failed already: that is the error to report.
        let _ = unlinkat(
            &self.directory,
            self.base_name.as_str(),
            UnlinkatFlags::NoRemoveDir,
        );
    }
}

/// Opens a path without following any symbolic link.
pub(crate) fn open_strictly(path: &Path, flags: OFlag) -> Result<OwnedFd> {
    open_strictly_at(AT_FDCWD, path, flags)
}

fn open_strictly_at(directory: BorrowedFd<'_>, path: &Path, flags: OFlag) -> Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let object = path.display().to_string();
    match openat2(directory, path, how) {
        Err(Errno::ELOOP) => {
            let instead = match std::fs::canonicalize(path) {
                Ok(real) => format!(": if it is the right one, give {}", real.display()),
                Err(_) => String::new(),
            };
            refused(
                object,
                format!("a symbolic link leads there, and a jail takes none{instead}"),
            )
        }
        other => other.doing("open", object),
    }
}

pub(crate) fn file_type(stat: &FileStat) -> SFlag {
    SFlag::from_bits_retain(stat.st_mode & SFlag::S_IFMT.bits())
}

/// Opens the VMM's program, and looks whether it can run in an empty root.
///
/// # Errors
/// If it is no regular file, or needs a dynamic loader.
pub fn open_exec_file(path: &Path) -> Result<OwnedFd> {
    let file = File::from(open_strictly(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?);
    let object = path.display().to_string();
    let stat = fstat(&file).doing("look at", &object)?;
    if file_type(&stat) != SFlag::S_IFREG {
        return refused(object, "not a regular file");
    }
    let mut head = vec![0; 4096];
    let length = file.read_at(&mut head, 0).doing("read", &object)?;
    head.truncate(length);
    if needs_loader(&head) {
        return refused(
            object,
            "a script or dynamically linked, and the jail has no loader: link it statically",
        );
    }
    Ok(file.into())
}

/// Whether the kernel would look for an interpreter. Says no when in doubt: the kernel decides.
fn needs_loader(head: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let bytes = |at: usize, length: usize| head.get(at..at.checked_add(length)?);
    let u16_at = |at| Some(u16::from_le_bytes(bytes(at, 2)?.try_into().ok()?));
    let u32_at = |at| Some(u32::from_le_bytes(bytes(at, 4)?.try_into().ok()?));
    let u64_at = |at| Some(u64::from_le_bytes(bytes(at, 8)?.try_into().ok()?));
    if head.starts_with(b"#!") {
        return true;
    }
    // ELF64 header: e_phoff, e_phentsize and e_phnum (elf(5)).
    let headers = || {
        let start = usize::try_from(u64_at(32)?).ok()?;
        let (size, count) = (usize::from(u16_at(54)?), usize::from(u16_at(56)?));
        (0..count).find(|index| {
            let at = size
                .checked_mul(*index)
                .and_then(|offset| start.checked_add(offset));
            at.and_then(u32_at) == Some(PT_INTERP)
        })
    };
    head.starts_with(b"\x7fELF") && headers().is_some()
}

/// Opens a regular file or block device.
///
/// # Errors
/// If it is anything else, or cannot be opened.
pub fn open_file(path: &Path, write: bool) -> Result<OwnedFd> {
    let access = if write {
        OFlag::O_RDWR
    } else {
        OFlag::O_RDONLY
    };
    // O_NONBLOCK: a FIFO must be refused, not waited for.
    let opened = open_strictly(path, access | OFlag::O_NONBLOCK | OFlag::O_NOCTTY);
    let object = path.display().to_string();
    let file = match opened {
        // Opening a directory for writing fails before its kind can be looked at.
        Err(crate::error::Error::Call {
            source: Errno::EISDIR,
            ..
        }) => {
            return refused(
                object,
                "a directory: only a file or a block device can be granted",
            );
        }
        other => other?,
    };
    let stat = fstat(&file).doing("look at", &object)?;
    match file_type(&stat) {
        SFlag::S_IFREG | SFlag::S_IFBLK => {}
        SFlag::S_IFDIR => {
            return refused(
                object,
                "a directory: only a file or a block device can be granted",
            );
        }
        _ => return refused(object, "neither a regular file nor a block device"),
    }
    // io_uring treats a non-blocking file as one that must never wait for the disk.
    fcntl(&file, FcntlArg::F_SETFL(access)).doing("set flags of", &object)?;
    Ok(file)
}

/// Opens what a helper is to see: `O_PATH`, so that nothing happens to it yet. A block device counts as a file.
///
/// # Errors
/// If it is neither a file, a directory nor a block device, or is to be written to and on a read-only mount.
pub fn open_bind(path: &Path, write: bool) -> Result<OwnedFd> {
    let file = open_strictly(path, OFlag::O_PATH)?;
    let object = path.display().to_string();
    let stat = fstat(&file).doing("look at", &object)?;
    match file_type(&stat) {
        SFlag::S_IFREG | SFlag::S_IFDIR => {}
        SFlag::S_IFBLK if write => {}
        SFlag::S_IFBLK => {
            return refused(object, "a block device can only be bound for writing, too");
        }
        _ => return refused(object, "neither a file, a directory nor a block device"),
    }
    let flags = fstatvfs(&file)
        .doing("look at the mount of", &object)?
        .flags();
    if write && flags.contains(FsFlags::ST_RDONLY) {
        return refused(
            object,
            "it is on a read-only mount, and would be writable in the jail",
        );
    }
    Ok(file)
}

/// Opens a regular file to append to, which is made if there is none, or a named pipe to write to.
/// Writing to the pipe never waits.
///
/// # Errors
/// If it is anything else, or cannot be opened.
pub fn open_append(path: &Path) -> Result<OwnedFd> {
    let object = path.display().to_string();
    let (parent, name) = split(path)?;
    let directory = open_strictly(parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    // Looked at before it is opened: opening a device can do something, and a pipe wants a reader.
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    let kind = match open_strictly_at(directory.as_fd(), Path::new(name), flags) {
        Ok(there) => file_type(&fstat(&there).doing("look at", &object)?),
        Err(crate::error::Error::Call {
            source: Errno::ENOENT,
            ..
        }) => SFlag::S_IFREG,
        Err(error) => return Err(error),
    };
    let access = match kind {
        SFlag::S_IFREG => OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_CREAT,
        // Also for reading: else it could not be opened before its reader is there.
        SFlag::S_IFIFO => OFlag::O_RDWR,
        _ => return refused(object, "neither a regular file nor a named pipe"),
    };
    let how = OpenHow::new()
        .flags(access | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .mode(if access.contains(OFlag::O_CREAT) {
            Mode::S_IRUSR | Mode::S_IWUSR
        } else {
            Mode::empty()
        })
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = openat2(&directory, name, how).doing("open", &object)?;
    let stat = fstat(&file).doing("look at", &object)?;
    if file_type(&stat) != kind {
        return refused(object, "it has just been replaced");
    }
    Ok(file)
}

/// Connects to a Unix socket, which may not be behind a symbolic link either.
///
/// # Errors
/// If there is none, or nobody listens.
pub fn connect_to(path: &Path) -> Result<OwnedFd> {
    let place = open_strictly(path, OFlag::O_PATH)?;
    let object = path.display().to_string();
    let stat = fstat(&place).doing("look at", &object)?;
    if file_type(&stat) != SFlag::S_IFSOCK {
        return refused(object, "not a socket");
    }
    // The very socket that was looked at, whatever the path leads to by now.
    let address = UnixAddr::new(format!("/proc/self/fd/{}", place.as_raw_fd()).as_str());
    let address = address.doing("name", &object)?;
    let flags = SockFlag::SOCK_CLOEXEC;
    let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None);
    let stream = stream.doing("make a socket for", &object)?;
    connect(stream.as_raw_fd(), &address).doing("connect to", &object)?;
    Ok(stream)
}

/// Opens a device node.
///
/// # Errors
/// If that is not possible; `/dev/kvm` and `/dev/userfaultfd` with what to do.
pub fn open_device(path: &str) -> Result<OwnedFd> {
    match open_strictly(Path::new(path), OFlag::O_RDWR) {
        Err(crate::error::Error::Call {
            source: Errno::ENOENT,
            ..
        }) if path == "/dev/kvm" => refused(
            path,
            "this host has no KVM: load kvm_intel or kvm_amd, or see `casemate doctor`",
        ),
        Err(crate::error::Error::Call {
            source: Errno::ENOENT,
            ..
        }) if path == "/dev/userfaultfd" => refused(
            path,
            "this host has none (Linux 6.1 or later, with CONFIG_USERFAULTFD): leave `--grant-userfaultfd` out, and \
             load snapshots with `backend_type` File",
        ),
        Err(crate::error::Error::Call {
            source: Errno::EACCES | Errno::EPERM,
            ..
        }) => refused(
            path,
            "no permission to open it: run as root, or have the owner allow it",
        ),
        other => other,
    }
}

/// What is at `path` as seen in the operator's chroot, as the host sees it.
pub fn beneath_chroot(arguments: &Arguments, path: &Path) -> PathBuf {
    chroot(arguments).join(path.strip_prefix("/").unwrap_or(path))
}

fn chroot(arguments: &Arguments) -> PathBuf {
    [
        arguments.chroot_base_dir.as_path(),
        Path::new(&arguments.exec_name),
        Path::new(arguments.id.as_str()),
        Path::new("root"),
    ]
    .iter()
    .collect()
}

/// Opens the operator's chroot, if there is one.
///
/// # Errors
/// If something is there, but is no directory or behind a symbolic link.
pub fn open_chroot(arguments: &Arguments) -> Result<Option<OwnedFd>> {
    let path = chroot(arguments);
    match open_strictly(&path, OFlag::O_PATH | OFlag::O_DIRECTORY) {
        Err(crate::error::Error::Call {
            source: Errno::ENOENT,
            ..
        }) => Ok(None),
        other => other.map(Some),
    }
}

/// Opens an `--allow-open` or `--allow-create` path: a directory itself, or the one that holds the file,
/// which may not be there yet.
///
/// # Errors
/// If the directory cannot be opened.
pub fn open_allowed(path: &Path) -> Result<(OwnedFd, Option<PathBuf>)> {
    let directory = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let is_directory = path.as_os_str().as_bytes().ends_with(b"/");
    match open_strictly(path, directory) {
        Err(crate::error::Error::Call {
            source: Errno::ENOTDIR | Errno::ENOENT,
            ..
        }) if !is_directory => {
            let (parent, name) = split(path)?;
            Ok((open_strictly(parent, directory)?, Some(name.into())))
        }
        other => other.map(|opened| (opened, None)),
    }
}

/// The directory and the name in it.
fn split(path: &Path) -> Result<(&Path, &str)> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return refused(
            path.display().to_string(),
            "a path that ends in a name is needed",
        );
    };
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => Ok((parent, name)),
        _ => Ok((Path::new("."), name)),
    }
}

/// Makes a Unix stream listener that only that user (and root) may connect to.
///
/// # Errors
/// If something of that name is there already, whatever it is.
pub fn make_listener(path: &Path, uid: u32, gid: u32) -> Result<Listener> {
    let object = path.display().to_string();
    let (parent, base_name) = split(path)?;
    let directory = open_strictly(parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    let socket = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )
    .doing("make a socket for", &object)?;
    let address = UnixAddr::new(base_name).doing("listen on", &object)?;

    // Relative to the directory that was opened, which nobody can exchange for another one any
    // more, and whose path may be longer than an address. The socket is nobody else's from the start.
    let here = open_strictly(Path::new("."), OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    fchdir(&directory).doing("enter the directory of", &object)?;
    let mask = umask(Mode::from_bits_truncate(0o177));
    let bound = bind(socket.as_raw_fd(), &address);
    umask(mask);
    fchdir(&here).doing("return from the directory of", &object)?;
    match bound {
        Err(Errno::EADDRINUSE) => {
            return refused(
                object,
                "something of this name is there: remove it, if no machine uses it",
            );
        }
        other => other.doing("listen on", &object)?,
    }
    let listener = Listener {
        socket,
        directory,
        base_name: base_name.to_owned(),
    };
    let finished = give_to(&listener, uid, gid, &object).and_then(|()| {
        let backlog = Backlog::new(BACKLOG).doing("listen on", &object)?;
        listen(&listener.socket, backlog).doing("listen on", &object)
    });
    if finished.is_err() {
        listener.remove();
    }
    finished.map(|()| listener)
}

/// Gives the socket's name to the user: by descriptor, so that what was looked at is what changes
/// hands, and only if it is a socket without other names: never a file that somebody put there.
fn give_to(listener: &Listener, uid: u32, gid: u32, object: &str) -> Result<()> {
    let name = Path::new(&listener.base_name);
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    let file = open_strictly_at(listener.directory.as_fd(), name, flags)?;
    let stat = fstat(&file).doing("look at", object)?;
    if file_type(&stat) != SFlag::S_IFSOCK || stat.st_nlink != 1 {
        return refused(
            object,
            "somebody has replaced the socket that was just made",
        );
    }
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    fchownat(&file, "", uid, gid, AtFlags::AT_EMPTY_PATH).doing("give away", object)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(interp: bool) -> Vec<u8> {
        let mut head = vec![0; 256];
        head[..4].copy_from_slice(b"\x7fELF");
        head[32] = 64;
        head[54] = 56;
        head[56] = 2;
        head[64] = 1;
        head[64 + 56] = if interp { 3 } else { 1 };
        head
    }

    #[test]
    fn knows_programs_that_need_a_loader() {
        assert!(needs_loader(b"#!/bin/sh\n"));
        assert!(needs_loader(&elf(true)));
        assert!(!needs_loader(&elf(false)));
        let mut hostile = elf(true);
        hostile[32..40].fill(0xff);
        assert!(!needs_loader(&hostile));
        for length in 0..70 {
            needs_loader(&elf(true)[..length]);
        }
    }

    #[test]
    fn appends_to_files_and_pipes_and_nothing_else() {
        use std::io::Write;
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().canonicalize().unwrap();
        let file = base.join("f");
        for line in ["a", "b"] {
            let mut opened = File::from(open_append(&file).unwrap());
            opened.write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"ab");
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&file).unwrap());
        assert_eq!(mode & 0o777, 0o600);
        let pipe = base.join("p");
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        let mut opened = File::from(open_append(&pipe).unwrap());
        let full = loop {
            if let Err(error) = opened.write(&[0; 4096]) {
                break error;
            }
        };
        assert_eq!(full.kind(), std::io::ErrorKind::WouldBlock);
        let link = base.join("l");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&link, &base, Path::new("/dev/null")] {
            open_append(path).unwrap_err();
        }
    }

    #[test]
    fn files_are_granted_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().canonicalize().unwrap();
        let file = base.join("f");
        std::fs::write(&file, "x").unwrap();
        assert!(open_file(&file, true).is_ok());
        let link = base.join("l");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let through = base.join("d");
        std::os::unix::fs::symlink(&base, &through).unwrap();
        for path in [link, through.join("f")] {
            let error = open_file(&path, false).unwrap_err().to_string();
            assert!(error.contains("symbolic link"), "{error}");
            assert!(error.contains(&file.display().to_string()), "{error}");
        }
        let fifo = base.join("p");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        for path in [&base, &fifo, Path::new("/dev/null")] {
            for write in [false, true] {
                let error = open_file(path, write).unwrap_err().to_string();
                assert!(
                    error.contains("director") || error.contains("neither"),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn connects_to_a_socket_that_somebody_listens_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().canonicalize().unwrap().join(name);
        let why = |name: &str| connect_to(&path(name)).unwrap_err().to_string();
        let listener = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        connect_to(&path("socket")).unwrap();
        listener.accept().unwrap();
        std::os::unix::fs::symlink(path("socket"), path("link")).unwrap();
        assert!(why("link").contains("a symbolic link leads there"));
        std::fs::write(path("file"), "").unwrap();
        assert!(why("file").contains("not a socket"));
        assert!(
            why("nothing").contains("No such file"),
            "{}",
            why("nothing")
        );
        drop(listener);
        assert!(why("socket").contains("connect to"), "{}", why("socket"));
    }
}

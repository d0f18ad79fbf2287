//! What a broker may do for its VMM: fixed at start, checked before anything is opened.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, OpenHow, ResolveFlag, fcntl, openat2};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::stat::{SFlag, fstat};

use crate::creation::{CreateError, Creations};
use crate::protocol::{NameError, Operation, check_name};

/// The port that stands for "any" in `AF_VSOCK` (`VMADDR_PORT_ANY`): nobody can listen on it.
const ANY_PORT: u32 = u32::MAX;

/// Everything a broker may open or connect to. An empty policy allows nothing.
#[derive(Debug, Default)]
pub struct BrokerPolicy {
    /// Files that were handed to the VMM at start.
    pub passed: Vec<PassedFile>,
    /// Names given with `--allow-open` and `--allow-create`.
    pub allowed: Vec<AllowedName>,
    /// The operator's chroot: names are looked up, and files are made, beneath it.
    pub chroot: Option<OwnedFd>,
    /// Where vsock devices may connect to.
    pub connections: Vec<ConnectTarget>,
    /// Whether whatever this process's user may open, make and connect to is allowed besides: for a VMM without
    /// a jail, which could do so itself before it was sealed.
    pub unconfined: bool,
    /// How a queue of a tap is attached, by the interface's name and whether it is one of several; for a VMM without
    /// a jail.
    pub tap: Option<fn(&str, bool) -> io::Result<OwnedFd>>,
    /// How a listening socket is made at a path; for a VMM without a jail.
    pub listen: Option<fn(&str) -> io::Result<OwnedFd>>,
}

/// A file that was handed over at start, and can be had again.
#[derive(Debug)]
pub struct PassedFile {
    /// Its name in the machine config.
    pub name: String,
    /// The same open file: sent as it is, so that the broker needs no `dup`.
    pub file: Arc<OwnedFd>,
    /// Whether it is open for writing.
    pub writable: bool,
}

/// A name that may be opened later, or made as well: one file, or everything beneath a directory.
#[derive(Debug)]
pub struct AllowedName {
    /// The name as the operator wrote it.
    pub name: PathBuf,
    /// The directory itself, or the one that holds the file (`O_PATH`).
    pub directory: OwnedFd,
    /// The file in it; none if the whole directory is allowed.
    pub file: Option<PathBuf>,
    /// Whether it may also be made, and replaced.
    pub create: bool,
}

impl AllowedName {
    /// Where `path` leads beneath the directory, if this name allows it.
    pub(crate) fn beneath<'a>(&'a self, path: &'a Path) -> Option<&'a Path> {
        match &self.file {
            Some(file) => (self.name == path).then_some(file),
            None => path
                .strip_prefix(&self.name)
                .ok()
                .filter(|rest| !rest.as_os_str().is_empty()),
        }
    }
}

/// A vsock device's `uds_path`: connections go to `<uds_path>_<port>`.
#[derive(Debug)]
pub struct ConnectTarget {
    /// The device's `uds_path` as the machine config spells it.
    pub device: String,
    /// The directory that holds it (`O_PATH`).
    pub directory: OwnedFd,
    /// Its last component.
    pub base_name: String,
}

/// Why a request is refused. The text goes back to the VMM.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The name cannot be one.
    #[error("{0}")]
    Name(#[from] NameError),
    /// Nothing allows the name.
    #[error(
        "{0:?} is not granted: start the jailer with `--grant-ro`, `--grant-rw` or `--allow-open {0}`"
    )]
    NotGranted(String),
    /// Passed at start, but only for reading.
    #[error("{0:?} is granted for reading only: start the jailer with `--grant-rw {0}`")]
    ReadOnly(String),
    /// It is allowed, and opening it failed.
    #[error("cannot open {name:?}: {source}")]
    Open {
        /// The name asked for.
        name: String,
        /// Why.
        source: Errno,
    },
    /// Not a regular file or a block device.
    #[error("{0:?} is neither a regular file nor a block device")]
    NotAFile(String),
    /// A jail's taps come with it.
    #[error("tap {0:?} is not granted: start the jailer with `--grant-tap {0}`")]
    NoTap(String),
    /// The tap cannot be had.
    #[error("cannot use tap {name:?}: {source}")]
    Tap {
        /// The interface asked for.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// Nothing allows the socket.
    #[error("{0:?} is not granted: start the jailer with `--grant-listen {0}`")]
    NoListener(String),
    /// Nobody can listen there.
    #[error(
        "cannot listen on {path:?}: {source}; a socket that a program has left there is to be removed"
    )]
    Listen {
        /// The path asked for.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// No such vsock device.
    #[error("no vsock device {0:?}: start the jailer with `--grant-listen {0}`")]
    NoDevice(String),
    /// A port that nobody can listen on.
    #[error("port {0} cannot be connected to")]
    Port(u32),
    /// A file that is to be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// Nobody listens, or too many wait already.
    #[error("cannot connect to port {port}: {source}")]
    Connect {
        /// The port asked for.
        port: u32,
        /// Why.
        source: Errno,
    },
}

impl BrokerPolicy {
    /// Whether anything is allowed at all; if not, no broker is needed.
    pub fn is_empty(&self) -> bool {
        self.passed.is_empty()
            && self.allowed.is_empty()
            && self.chroot.is_none()
            && self.connections.is_empty()
            && !self.unconfined
    }

    /// Does one thing, in a conversation that is making these files. Waits for nobody; for a disk where a
    /// commit syncs a directory. Returns a descriptor where the operation
    /// [gives one](Operation::gives_descriptor).
    ///
    /// # Errors
    /// If nothing allows it, or the kernel refuses it.
    pub fn perform(
        &self,
        operation: &Operation,
        creations: &mut Creations,
    ) -> Result<Option<Arc<OwnedFd>>, PolicyError> {
        let file = match operation {
            Operation::Open { name, write } => self.open(name, *write)?,
            Operation::Tap { name, several } => self.tap(name, *several).map(Arc::new)?,
            Operation::Listen { path } => self.listen(path).map(Arc::new)?,
            Operation::Connect { device, port } => self.connect(device, *port).map(Arc::new)?,
            Operation::Create { name } => creations.create(self, name)?,
            Operation::Commit { name } => {
                creations.commit(name)?;
                return Ok(None);
            }
            Operation::Discard { name } => {
                creations.discard(name)?;
                return Ok(None);
            }
        };
        Ok(Some(file))
    }

    /// Passed at start, then the allow-list, then the operator's chroot.
    fn open(&self, name: &str, write: bool) -> Result<Arc<OwnedFd>, PolicyError> {
        check_name(name)?;
        if let Some(passed) = self.passed.iter().find(|passed| passed.name == name) {
            if write && !passed.writable {
                return Err(PolicyError::ReadOnly(name.to_owned()));
            }
            return Ok(Arc::clone(&passed.file));
        }
        let path = Path::new(name);
        for allowed in &self.allowed {
            if let Some(beneath) = allowed.beneath(path) {
                return open_beneath(allowed.directory.as_fd(), beneath, name, write);
            }
        }
        if self.unconfined {
            let here = nix::fcntl::AT_FDCWD;
            return open_with(here, path, name, write, OpenHow::new());
        }
        match &self.chroot {
            Some(chroot) => {
                // Inside the chroot its root is `/`.
                let beneath = path.strip_prefix(Component::RootDir).unwrap_or(path);
                match open_beneath(chroot.as_fd(), beneath, name, write) {
                    Err(PolicyError::Open {
                        source: Errno::ENOENT,
                        ..
                    }) => Err(PolicyError::NotGranted(name.to_owned())),
                    other => other,
                }
            }
            None => Err(PolicyError::NotGranted(name.to_owned())),
        }
    }

    fn tap(&self, name: &str, several: bool) -> Result<OwnedFd, PolicyError> {
        check_name(name)?;
        let attach = self
            .tap
            .ok_or_else(|| PolicyError::NoTap(name.to_owned()))?;
        attach(name, several).map_err(|source| PolicyError::Tap {
            name: name.to_owned(),
            source,
        })
    }

    fn listen(&self, path: &str) -> Result<OwnedFd, PolicyError> {
        check_name(path)?;
        let make = self
            .listen
            .ok_or_else(|| PolicyError::NoListener(path.to_owned()))?;
        make(path).map_err(|source| PolicyError::Listen {
            path: path.to_owned(),
            source,
        })
    }

    /// Connects to `<uds_path>_<port>`, which either works at once or is refused.
    fn connect(&self, device: &str, port: u32) -> Result<OwnedFd, PolicyError> {
        check_name(device)?;
        if port == ANY_PORT {
            return Err(PolicyError::Port(port));
        }
        let failed = |source| PolicyError::Connect { port, source };
        let mut targets = self.connections.iter();
        let target = match targets.find(|target| target.device == device) {
            Some(target) => target,
            None if self.unconfined => {
                let address = UnixAddr::new(format!("{device}_{port}").as_str());
                return connect_to(&address.map_err(failed)?).map_err(failed);
            }
            None => return Err(PolicyError::NoDevice(device.to_owned())),
        };
        // Relative to the directory: its path does not exist in the broker's empty root, and could
        // be longer than the 107 bytes that an address holds.
        nix::unistd::fchdir(&target.directory).map_err(failed)?;
        let name = format!("{}_{port}", target.base_name);
        refuse_if_no_socket(target.directory.as_fd(), &name).map_err(failed)?;
        let address = UnixAddr::new(name.as_str()).map_err(failed)?;
        connect_to(&address).map_err(failed)
    }
}

/// Connects, which works at once or not at all.
fn connect_to(address: &UnixAddr) -> Result<OwnedFd, Errno> {
    let stream = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    // A full backlog is EAGAIN on a non-blocking Unix socket: nothing is ever pending.
    connect(std::os::fd::AsRawFd::as_raw_fd(&stream), address)?;
    Ok(stream)
}

/// `connect` follows symbolic links, out of the directory too, and a socket elsewhere was not granted.
///
/// A link that is laid between this look and the connect is still followed; it takes somebody who may
/// write to the operator's directory, and leads to what the machine's user may connect to alone.
fn refuse_if_no_socket(directory: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    let found = openat2(directory, name, beneath(OFlag::O_PATH))?;
    match SFlag::from_bits_retain(fstat(&found)?.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFSOCK => Ok(()),
        _ => Err(Errno::ENOTSOCK),
    }
}

/// Opens beneath a directory, and through nothing that leads elsewhere.
pub(crate) fn beneath(flags: OFlag) -> OpenHow {
    let how = OpenHow::new().resolve(
        ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS,
    );
    how.flags(flags | OFlag::O_CLOEXEC)
}

fn open_beneath(
    directory: BorrowedFd<'_>,
    path: &Path,
    name: &str,
    write: bool,
) -> Result<Arc<OwnedFd>, PolicyError> {
    open_with(directory, path, name, write, beneath(OFlag::empty()))
}

/// Opens as `how` says where to, for reading or for reading and writing.
fn open_with(
    directory: BorrowedFd<'_>,
    path: &Path,
    name: &str,
    write: bool,
    how: OpenHow,
) -> Result<Arc<OwnedFd>, PolicyError> {
    let failed = |source| PolicyError::Open {
        name: name.to_owned(),
        source,
    };
    let access = if write {
        OFlag::O_RDWR
    } else {
        OFlag::O_RDONLY
    };
    // O_NONBLOCK: opening a FIFO or a device that someone put there must not wait.
    let how = how.flags(access | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC);
    let file = openat2(directory, path, how).map_err(failed)?;
    let stat = fstat(&file).map_err(failed)?;
    match SFlag::from_bits_retain(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFREG | SFlag::S_IFBLK => {}
        // A directory above all must never reach the VMM: `openat` walks out of it.
        _ => return Err(PolicyError::NotAFile(name.to_owned())),
    }
    // io_uring treats a non-blocking file as one that must never wait for the disk.
    fcntl(&file, FcntlArg::F_SETFL(access)).map_err(failed)?;
    Ok(Arc::new(file))
}

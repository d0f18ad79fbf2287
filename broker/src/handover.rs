//! The hand-over: which descriptor is what, from the jailer to the VMM across `execveat`.
//!
//! ```text
//! {"version":1,"id":"vm-1","jailed":true,
//!  "descriptors":[{"name":"kvm","fd":4,"kind":"kvm"},{"name":"/images/root.img","fd":5,"kind":"file-ro"}]}
//! ```
//!
//! The table lies in a memfd that is sealed against every change, and its number is the VMM's
//! `--handover-fd N`. A descriptor's name is the very string that the machine config uses for it
//! (`/images/root.img`, `tap0`); `kvm`, `userfaultfd`, `broker` and `log` are fixed.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, UnixAddr, getsockname, getsockopt, sockopt,
};
use nix::sys::stat::{SFlag, fstat, major, minor};
use serde::{Deserialize, Serialize};

use crate::MachineId;
use crate::fdpass::{AdoptError, adopt};

/// The version of the table that this crate writes and reads.
pub const VERSION: u32 = 1;

/// Largest table in bytes.
pub const MAX_TABLE: usize = 64 * 1024;

/// Name of `/dev/kvm`'s descriptor.
pub const KVM: &str = "kvm";
/// Name of the broker's socket, of the VMM's device thread.
pub const BROKER: &str = "broker";
/// Name of the broker's other socket, of the VMM's control thread.
pub const CONTROL_BROKER: &str = "broker-control";
/// Name of `/dev/userfaultfd`'s descriptor.
pub const USERFAULTFD: &str = "userfaultfd";
/// Name of the log's descriptor.
pub const LOG: &str = "log";

/// Character device numbers (Linux, Documentation/admin-guide/devices.txt).
const KVM_DEVICE: (u64, u64) = (10, 232);
const TUN_DEVICE: (u64, u64) = (10, 200);
/// The major number of `/dev/userfaultfd`, whose minor one is chosen by the kernel.
const MISC_DEVICES: u64 = 10;

/// What a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// `/dev/kvm`.
    Kvm,
    /// A regular file or block device, open for reading.
    FileRo,
    /// A regular file or block device, open for reading and writing.
    FileRw,
    /// A regular file to append to, or a named pipe; writing to it never waits for a reader.
    Append,
    /// A tap interface's queue (`/dev/net/tun` after `TUNSETIFF`).
    Tap,
    /// A listening Unix stream socket.
    Listener,
    /// A Unix stream socket, connected to the back-end of a vhost-user device.
    Stream,
    /// The VMM's end of the broker's socket pair.
    Broker,
    /// Where the log goes; open for writing.
    Log,
    /// `/dev/userfaultfd`.
    Userfaultfd,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Descriptor {
    /// The name in the machine config.
    pub name: String,
    /// The number in the VMM.
    pub fd: RawFd,
    /// What it is.
    pub kind: Kind,
}

/// The table as it is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoverTable {
    /// [`VERSION`].
    pub version: u32,
    /// The machine.
    pub id: MachineId,
    /// Whether a jail is around the VMM.
    pub jailed: bool,
    /// What was opened for it.
    pub descriptors: Vec<Descriptor>,
}

/// The table as the VMM has it: every descriptor checked and owned.
#[derive(Debug)]
pub struct Handover {
    id: MachineId,
    jailed: bool,
    descriptors: BTreeMap<String, (Kind, OwnedFd)>,
}

/// Why a hand-over was not written, or not believed.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// A call on the memfd failed.
    #[error("cannot {action} the hand-over table: {source}")]
    Memfd {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: Errno,
    },
    /// The descriptor is not a memfd with every seal.
    #[error("the hand-over table is not sealed: it must come from the jailer")]
    NotSealed,
    /// More than [`MAX_TABLE`] bytes.
    #[error("the hand-over table has {0} bytes: at most {MAX_TABLE} are allowed")]
    TooLong(u64),
    /// Not the JSON it should be.
    #[error("the hand-over table is malformed: {0}")]
    Malformed(#[source] serde_json::Error),
    /// Written by another version.
    #[error(
        "the hand-over table has version {0}, this program reads {VERSION}: install jailer and VMM of one release"
    )]
    Version(u32),
    /// A number that is not usable.
    #[error("hand-over of {name:?}: {source}")]
    Number {
        /// The descriptor's name.
        name: String,
        /// What is wrong with its number.
        source: AdoptError,
    },
    /// A number that is not usable, of the table itself.
    #[error("hand-over table: {0}")]
    TableNumber(#[source] AdoptError),
    /// Two descriptors of one name.
    #[error("the hand-over table names {0:?} twice")]
    NamedTwice(String),
    /// The descriptor is not of its kind.
    #[error("hand-over of {name:?}: descriptor {fd} is not a {kind:?} descriptor")]
    WrongKind {
        /// The descriptor's name.
        name: String,
        /// Its number.
        fd: RawFd,
        /// What it should be.
        kind: Kind,
    },
    /// There is no room for another descriptor.
    #[error("hand-over of {name:?}: cannot copy the {kind:?} descriptor: {source}")]
    Copy {
        /// The descriptor's name.
        name: String,
        /// What it is.
        kind: Kind,
        /// What the host said.
        source: std::io::Error,
    },
    /// The config names something that was not handed over.
    #[error("{0:?} was not handed over by the jailer: grant it ({1})")]
    Missing(String, &'static str),
    /// It was handed over as something else.
    #[error("{name:?} was handed over as {found:?}, but {wanted:?} is needed: {hint}")]
    NotAllowed {
        /// The descriptor's name.
        name: String,
        /// What it is.
        found: Kind,
        /// What would do.
        wanted: Vec<Kind>,
        /// The jailer flag for it.
        hint: &'static str,
    },
}

impl Kind {
    /// The jailer flag that grants a descriptor of this kind.
    pub const fn flag(self) -> &'static str {
        match self {
            Self::Kvm => "always granted",
            Self::FileRo => "--grant-ro",
            Self::FileRw => "--grant-rw",
            Self::Append => "--grant-append",
            Self::Tap => "--grant-tap",
            Self::Listener => "--grant-listen or --grant-api",
            Self::Stream => "--grant-connect",
            Self::Broker => "--grant-listen or --allow-open",
            Self::Log => "--log-fd",
            Self::Userfaultfd => "--grant-userfaultfd",
        }
    }
}

impl Handover {
    /// Writes a table into a sealed memfd, which is *not* close-on-exec.
    ///
    /// # Errors
    /// If the table is too long or a call on the memfd fails.
    pub fn write_memfd(table: &HandoverTable) -> Result<OwnedFd, HandoverError> {
        let bytes = serde_json::to_vec(table).map_err(HandoverError::Malformed)?;
        if bytes.len() > MAX_TABLE {
            return Err(HandoverError::TooLong(bytes.len() as u64));
        }
        let failed = |action| move |source| HandoverError::Memfd { action, source };
        let memfd = memfd_create(c"casemate-handover", MFdFlags::MFD_ALLOW_SEALING)
            .map_err(failed("create"))?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let written = nix::unistd::write(&memfd, rest).map_err(failed("write"))?;
            rest = rest.get(written..).unwrap_or_default();
        }
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(all_seals())).map_err(failed("seal"))?;
        Ok(memfd)
    }

    /// Takes over the table at an inherited number, and every descriptor in it.
    ///
    /// Call it before the process opens anything (see [`adopt`]).
    ///
    /// # Errors
    /// If the table is not sealed, too long, malformed, of another version, or if any descriptor
    /// in it is not open, named twice, a standard stream, or not of its kind.
    pub fn from_inherited(number: RawFd) -> Result<Self, HandoverError> {
        Self::read(adopt(number).map_err(HandoverError::TableNumber)?)
    }

    /// As [`Handover::from_inherited`], of a table that is already owned.
    ///
    /// # Errors
    /// As there.
    pub fn read(memfd: OwnedFd) -> Result<Self, HandoverError> {
        let table = read_table(&memfd)?;
        let mut descriptors = BTreeMap::new();
        for Descriptor { name, fd, kind } in table.descriptors {
            if descriptors.contains_key(&name) {
                return Err(HandoverError::NamedTwice(name));
            }
            if std::os::fd::AsRawFd::as_raw_fd(&memfd) == fd {
                let source = AdoptError::Twice(fd);
                return Err(HandoverError::Number { name, source });
            }
            let owned = match adopt(fd) {
                Ok(owned) => owned,
                Err(source) => return Err(HandoverError::Number { name, source }),
            };
            if !is_kind(&owned, kind) {
                return Err(HandoverError::WrongKind { name, fd, kind });
            }
            descriptors.insert(name, (kind, owned));
        }
        Ok(Self {
            id: table.id,
            jailed: table.jailed,
            descriptors,
        })
    }

    /// The machine.
    pub fn id(&self) -> &MachineId {
        &self.id
    }

    /// Whether a jail is around this process.
    pub fn jailed(&self) -> bool {
        self.jailed
    }

    /// Names and kinds of what has not been taken.
    pub fn remaining(&self) -> impl Iterator<Item = (&str, Kind)> {
        self.descriptors
            .iter()
            .map(|(name, (kind, _))| (name.as_str(), *kind))
    }

    /// A copy of the descriptor of that name, if it is of one of these kinds; it stays in the table.
    ///
    /// # Errors
    /// If there is none, or it is of another kind, or no descriptor is free.
    pub fn share(&mut self, name: &str, kinds: &[Kind]) -> Result<OwnedFd, HandoverError> {
        let (kind, taken) = match self.descriptors.get(name) {
            Some((kind, fd)) if kinds.contains(kind) => (*kind, fd.try_clone()),
            // For its error.
            _ => return self.take(name, kinds),
        };
        taken.map_err(|source| HandoverError::Copy {
            name: name.to_owned(),
            kind,
            source,
        })
    }

    /// Takes the descriptor of that name out, if it is of one of these kinds.
    ///
    /// # Errors
    /// If there is none, or it is of another kind; it stays then.
    pub fn take(&mut self, name: &str, kinds: &[Kind]) -> Result<OwnedFd, HandoverError> {
        let hint = kinds.first().map_or("", |kind| kind.flag());
        match self.descriptors.remove(name) {
            None => Err(HandoverError::Missing(name.to_owned(), hint)),
            Some((kind, fd)) if kinds.contains(&kind) => Ok(fd),
            Some((found, fd)) => {
                self.descriptors.insert(name.to_owned(), (found, fd));
                Err(HandoverError::NotAllowed {
                    name: name.to_owned(),
                    found,
                    wanted: kinds.to_vec(),
                    hint,
                })
            }
        }
    }
}

fn all_seals() -> SealFlag {
    SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE
}

fn read_table(memfd: &OwnedFd) -> Result<HandoverTable, HandoverError> {
    // Only a memfd has seals; with all of them set, what is read here is what will ever be there.
    let seals = fcntl(memfd, FcntlArg::F_GET_SEALS).map_err(|_| HandoverError::NotSealed)?;
    if !SealFlag::from_bits_retain(seals).contains(all_seals()) {
        return Err(HandoverError::NotSealed);
    }
    let failed = |source| HandoverError::Memfd {
        action: "read",
        source,
    };
    let size = fstat(memfd).map_err(failed)?.st_size;
    let size = usize::try_from(size)
        .ok()
        .filter(|size| *size <= MAX_TABLE)
        .ok_or(HandoverError::TooLong(size.unsigned_abs()))?;
    let mut bytes = vec![0; size];
    let mut at = 0;
    // By position: the writer's file offset is shared with us and stands at the end.
    while let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) {
        let offset = i64::try_from(at).unwrap_or(i64::MAX);
        match nix::sys::uio::pread(memfd, rest, offset) {
            Ok(0) => break,
            Ok(read) => at = at.saturating_add(read),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    let table: HandoverTable = serde_json::from_slice(&bytes).map_err(HandoverError::Malformed)?;
    if table.version != VERSION {
        return Err(HandoverError::Version(table.version));
    }
    Ok(table)
}

/// Whether the kernel says of this descriptor what the table says of it.
fn is_kind(fd: &OwnedFd, kind: Kind) -> bool {
    let Ok(stat) = fstat(fd) else {
        return false;
    };
    let Ok(flags) = fcntl(fd, FcntlArg::F_GETFL) else {
        return false;
    };
    let flags = OFlag::from_bits_retain(flags);
    if flags.contains(OFlag::O_PATH) {
        return false;
    }
    let access = flags & OFlag::O_ACCMODE;
    let file_type = SFlag::from_bits_retain(stat.st_mode & SFlag::S_IFMT.bits());
    let is_device = |(ma, mi)| {
        file_type == SFlag::S_IFCHR && (major(stat.st_rdev), minor(stat.st_rdev)) == (ma, mi)
    };
    let is_file = file_type == SFlag::S_IFREG || file_type == SFlag::S_IFBLK;
    match kind {
        Kind::Kvm => is_device(KVM_DEVICE),
        Kind::Tap => is_device(TUN_DEVICE),
        Kind::Userfaultfd => {
            file_type == SFlag::S_IFCHR
                && major(stat.st_rdev) == MISC_DEVICES
                && !is_device(KVM_DEVICE)
                && !is_device(TUN_DEVICE)
        }
        Kind::FileRo => is_file && access == OFlag::O_RDONLY,
        Kind::FileRw => is_file && access == OFlag::O_RDWR,
        Kind::Append => match file_type {
            SFlag::S_IFREG => access == OFlag::O_WRONLY && flags.contains(OFlag::O_APPEND),
            SFlag::S_IFIFO => access != OFlag::O_RDONLY && flags.contains(OFlag::O_NONBLOCK),
            _ => false,
        },
        Kind::Log => access != OFlag::O_RDONLY,
        Kind::Listener => {
            is_unix(fd)
                && getsockopt(fd, sockopt::SockType) == Ok(SockType::Stream)
                && getsockopt(fd, sockopt::AcceptConn) == Ok(true)
        }
        Kind::Stream => {
            is_unix(fd)
                && getsockopt(fd, sockopt::SockType) == Ok(SockType::Stream)
                && getsockopt(fd, sockopt::AcceptConn) == Ok(false)
        }
        Kind::Broker => is_unix(fd) && getsockopt(fd, sockopt::SockType) == Ok(SockType::SeqPacket),
    }
}

fn is_unix(fd: &OwnedFd) -> bool {
    let number = std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd());
    getsockname::<UnixAddr>(number).is_ok_and(|name| name.family() == Some(AddressFamily::Unix))
}

#[cfg(test)]
mod tests;

//! What a process without a jail opens itself, before it is sealed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use casemate_broker::{BrokerPolicy, Client, ConnectTarget, spawn_unjailed};

use super::{Error, open, tap};
use crate::lockdown::{self, Role, Stage};

/// The queues of an existing tap.
pub(super) fn open_taps(name: &str, queues: u8) -> Result<Vec<File>, Error> {
    tap::open(name, queues).map_err(|source| Error::Open {
        what: "tap",
        name: name.to_owned(),
        hint: match source.kind() {
            io::ErrorKind::NotFound => "; make it (`ip tuntap add NAME mode tap`)",
            io::ErrorKind::InvalidInput => {
                "; for several queues make it with `ip tuntap add NAME mode tap multi_queue`"
            }
            _ => "; it must be a free tap that this user may use",
        },
        source,
    })
}

/// A listening socket, for what `what` says.
pub(super) fn open_listener(what: &'static str, path: &str) -> Result<UnixListener, Error> {
    listen(path).map_err(|source| Error::Open {
        what,
        name: path.to_owned(),
        hint: match source.kind() {
            io::ErrorKind::AddrInUse => "; another machine or program uses it",
            _ => "",
        },
        source,
    })
}

/// A device such as `/dev/kvm`.
pub(super) fn open_device(path: &str) -> Result<File, Error> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.map_err(|source| Error::Open {
        what: "KVM device",
        name: path.to_owned(),
        hint: match source.kind() {
            io::ErrorKind::PermissionDenied => {
                "; run as root or add this user to the device's group (often `kvm`)"
            }
            io::ErrorKind::NotFound => {
                "; load kvm_intel or kvm_amd, and enable virtualization in the firmware or outer hypervisor"
            }
            _ => "",
        },
        source,
    })
}

/// A file for reading, or for writing too; it may turn out to be none.
pub(super) fn open_file(what: &'static str, name: &str, write: bool) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(write)
        // A pipe or a terminal must neither hold us up nor become our terminal before it is refused.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(name)
        .map_err(|source| match source.kind() {
            io::ErrorKind::IsADirectory => Error::NotAFile {
                what,
                name: name.to_owned(),
                found: "a directory",
            },
            _ => open(what, name, source),
        })
}

/// Listens on `path`. A socket that a machine left there, and that nobody listens on, is replaced:
/// an unjailed VMM cannot remove its own when it ends, for it is sealed.
fn listen(path: &str) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            let refused = UnixStream::connect(path)
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
            if !(is_socket && refused) {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        result => result,
    }
}

/// A broker that connects to the sockets of the vsock device at `path`, and does nothing else.
pub(super) fn fork_broker(path: &str) -> Result<Client, Error> {
    let full = Path::new(path);
    let base_name = full.file_name().and_then(|name| name.to_str());
    let base_name = base_name.ok_or_else(|| {
        let source = io::ErrorKind::InvalidInput.into();
        open("vsock", path, source)
    })?;
    let directory = match full.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_PATH)
        .open(directory)
        .map_err(|source| open("directory of vsock", path, source))?;
    let policy = BrokerPolicy {
        connections: vec![ConnectTarget {
            device: path.to_owned(),
            directory: directory.into(),
            base_name: base_name.to_owned(),
        }],
        ..BrokerPolicy::default()
    };
    let seal = || lockdown::enter(Role::UnjailedBroker, Stage::Sealed);
    Ok(spawn_unjailed(policy, seal)?)
}

//! What a machine needs whose memory another process brings: a way to that process, and userfaultfds.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use casemate_broker::{Kind, handover};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Error, Source};
use crate::memory::userfault::DEVICE;

/// What it needs.
pub struct PageHandlerParts {
    /// Connected to the process that brings the pages.
    pub socket: UnixStream,
    /// `/dev/userfaultfd`.
    pub device: File,
}

impl Source {
    /// What the memory of a snapshot needs that is behind the socket `name`.
    ///
    /// # Errors
    /// When nobody listens there, or the host or the jailer gives no userfaultfd.
    pub fn page_handler(&mut self, name: &str) -> Result<PageHandlerParts, Error> {
        // First what is there or not, whoever listens.
        let device = match self {
            Self::Direct => open_device()?,
            Self::Jailed(jail) => {
                let name = handover::USERFAULTFD;
                jail.take(name, name, Kind::Userfaultfd)?.into()
            }
            Self::Served(served) => served.userfaultfd()?,
        };
        if let Self::Served(served) = self {
            served.forget_if(name, is_hung_up);
        }
        Ok(PageHandlerParts {
            device,
            socket: self.connection("page handler", name)?,
        })
    }
}

/// Whether whoever is at the other end has gone.
fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut watched = [PollFd::new(socket, PollFlags::empty())];
    poll(&mut watched, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

/// The device, of a process without a jail.
pub(super) fn open_device() -> Result<File, Error> {
    let file = OpenOptions::new().read(true).write(true).open(DEVICE);
    file.map_err(|source| Error::Open {
        what: "userfaultfd",
        name: DEVICE.to_owned(),
        hint: match source.kind() {
            io::ErrorKind::NotFound => {
                "; it takes Linux 6.1 with CONFIG_USERFAULTFD: use `backend_type` File"
            }
            _ => "; run as root, let this user open it, or use `backend_type` File",
        },
        source,
    })
}

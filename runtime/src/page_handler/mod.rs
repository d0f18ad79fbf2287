//! `casemate snapshot serve`: brings a restored machine's memory from a file, page by page as the guest touches it.
//!
//! A VMM connects to the socket and says where its memory is, in Firecracker's words ([`regions`]); with that comes a
//! userfaultfd, by which the kernel says which page somebody waits for ([`userfault`]). What the VMM says is a guest's that
//! has taken it over: before the first byte this process has given up all but the file and the listener.
//!
//! One process is one machine's, so that a machine whose VMM has taken its handler over, too, reaches no other's memory.

mod regions;
mod serve;
mod source;
mod userfault;

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use casemate_seccomp_filters::{Role, install_violation_reporter};
use clap::Args;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::stat::{Mode, SFlag, fstat, umask};
use nix::unistd::{Gid, Uid, fchownat, geteuid};

use crate::sandbox::{self, Walls};
use crate::say;
use source::Source;

/// User and group id of handlers. No account has it, nor any machine.
pub const PAGE_HANDLER_ID: u32 = 0x6361_0002;
/// Address space of a handler, in bytes: a bit for each page of the largest memory is 512 MiB.
const MAX_MEMORY: u64 = 1 << 30;

/// `casemate snapshot serve`.
#[derive(Debug, Args)]
#[command(
    after_help = "One process is one machine's: start another one for each. It takes one connection, of a VMM that is given \
                  `mem_backend` with `backend_type` Uffd and `backend_path` PATH (in a jail by --grant-userfaultfd and \
                  --grant-connect PATH), and ends when that ends. If it ends first, the machine does, too. Firecracker's \
                  memory files can be served as well. \
                  Exit code: 0 when the machine has ended, 125 when something failed."
)]
pub struct ServeArgs {
    /// The memory file of a snapshot, which must stay as it is meanwhile
    #[arg(value_name = "MEMORY_FILE")]
    pub memory: PathBuf,
    /// Where to listen. A socket that nobody listens on any more is replaced
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Who may connect, besides root [default: nobody]
    #[arg(long, value_name = "N")]
    pub uid: Option<u32>,
    /// Leave one of the walls out where this host lacks it
    #[arg(long, value_name = "WALL", value_parser = ["landlock"])]
    pub allow_missing: Option<String>,
}

/// Why no memory is served, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not have a user of its own.
    #[error("a page handler is root's to start: it changes to a user that has nothing")]
    NotRoot,
    /// The memory file.
    #[error("{}: {source}", path.display())]
    Open {
        /// Where it is.
        path: PathBuf,
        /// Why it cannot be read.
        source: io::Error,
    },
    /// It is not one that can be served.
    #[error("{}: {why}", path.display())]
    NotMemory {
        /// Where it is.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// The socket.
    #[error("listen on {}: {source}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: Errno,
    },
    /// A wall could not be built.
    #[error("page handler: {0}")]
    Sandbox(#[from] sandbox::Error),
    /// The handler that names a forbidden system call.
    #[error("page handler: {0}")]
    Reporter(io::Error),
    /// Something that should not fail.
    #[error("page handler: {action}: {source}")]
    Call {
        /// What was being done.
        action: &'static str,
        /// What the host said.
        source: Errno,
    },
    /// What the VMM says.
    #[error("the VMM's message is refused: {0}")]
    Message(#[from] regions::Error),
    /// What comes from the descriptor.
    #[error("the VMM's descriptor is refused: {0}")]
    Descriptor(&'static str),
    /// The file cannot be read any more.
    #[error("cannot read the memory file at byte {offset}: {source}")]
    Read {
        /// Where.
        offset: u64,
        /// What the host said.
        source: Errno,
    },
    /// The file has become shorter.
    #[error("the memory file was cut off to less than {0} bytes while a machine ran from it")]
    CutOff(u64),
}

fn call(action: &'static str) -> impl FnOnce(Errno) -> Error {
    move |source| Error::Call { action, source }
}

/// Serves one machine, to its end.
pub fn run(args: &ServeArgs) -> Result<(), Error> {
    if !geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    sandbox::close_others(&[]);
    let file = source::open(&args.memory)?;
    let listener = make_listener(&args.socket, args.uid).map_err(|source| Error::Listen {
        path: args.socket.clone(),
        source,
    })?;
    install_violation_reporter().map_err(Error::Reporter)?;
    sandbox::enter(&Walls {
        uid: PAGE_HANDLER_ID,
        role: Role::PageHandler,
        memory: MAX_MEMORY,
        allow_missing_landlock: args.allow_missing.is_some(),
    })?;
    // From here on there are bytes of others: the file's first.
    let source = Source::read(file).map_err(|error| error.of(&args.memory))?;
    say::line(format_args!("listening on {}", args.socket.display()));
    let machine = accept(&listener)?;
    // Nobody else is served.
    drop(listener);
    serve::serve(&machine, &source)
}

/// The first who connects.
fn accept(listener: &UnixListener) -> Result<UnixStream, Error> {
    loop {
        let mut watched = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut watched, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(source) => return Err(call("wait for a VMM")(source)),
        }
        match listener.accept() {
            Ok((stream, _)) => return Ok(stream),
            // Who wanted to connect has gone.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
                return Err(call("accept")(errno));
            }
        }
    }
}

/// A socket that only root, and that user, may connect to.
fn make_listener(path: &Path, uid: Option<u32>) -> Result<UnixListener, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let address = UnixAddr::new(path)?;
    let mask = umask(Mode::from_bits_truncate(0o177));
    let mut bound = bind(listener.as_raw_fd(), &address);
    if bound == Err(Errno::EADDRINUSE) && is_left_over(path) {
        bound = std::fs::remove_file(path)
            .map_err(|_| Errno::EADDRINUSE)
            .and_then(|()| bind(listener.as_raw_fd(), &address));
    }
    umask(mask);
    bound?;
    if let Some(uid) = uid {
        give_to(path, uid)?;
    }
    listen(&listener, Backlog::new(1)?)?;
    Ok(listener.into())
}

/// Whether a socket is there, and nobody listens on it.
fn is_left_over(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|it| it.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    is_socket && UnixStream::connect(path).is_err_and(refused)
}

/// By descriptor, so that what was looked at is what changes hands.
fn give_to(path: &Path, uid: u32) -> Result<(), Errno> {
    let file = openat(
        AT_FDCWD,
        path,
        OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let stat = fstat(&file)?;
    let kind = SFlag::from_bits_retain(stat.st_mode & SFlag::S_IFMT.bits());
    if kind != SFlag::S_IFSOCK || stat.st_nlink != 1 {
        return Err(Errno::ENOTSOCK);
    }
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)));
    fchownat(&file, "", uid, gid, AtFlags::AT_EMPTY_PATH)
}

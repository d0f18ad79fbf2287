//! What the caller passes on without naming it, or by number: standard streams, the log, and a
//! process's own settings that survive exec.

use std::os::fd::{AsFd, BorrowedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::personality::{self, Persona};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, UnixAddr, getpeername, getsockopt, sockopt,
};
use nix::sys::stat::{SFlag, fstat};

use crate::error::{Context, Result, refused};
use crate::sys;

/// Checks standard input, output and error, which the VMM keeps.
///
/// # Errors
/// If one of them is not a stream (see [`check_stream`]).
pub fn check_standard_streams() -> Result<()> {
    check_stream(std::io::stdin().as_fd(), "standard input")?;
    check_stream(std::io::stdout().as_fd(), "standard output")?;
    check_stream(std::io::stderr().as_fd(), "standard error")
}

/// Checks that bytes are all that goes through a descriptor: it is a file, a pipe, a character
/// device, or a connected Unix socket.
///
/// A directory's descriptor would be the VMM's way out of its root; a network socket belongs to the
/// host's network wherever it is used, and one that is not connected takes addresses.
///
/// # Errors
/// If it is anything else.
pub fn check_stream(stream: BorrowedFd<'_>, name: &str) -> Result<()> {
    let flags = fcntl(stream, FcntlArg::F_GETFL).doing("look at", name)?;
    let mode = fstat(stream).doing("look at", name)?.st_mode;
    let kind = SFlag::from_bits_retain(mode & SFlag::S_IFMT.bits());
    if OFlag::from_bits_retain(flags).contains(OFlag::O_PATH) {
        return refused(name, "a path and not open (O_PATH): redirect it");
    }
    match kind {
        SFlag::S_IFREG | SFlag::S_IFIFO | SFlag::S_IFCHR => Ok(()),
        SFlag::S_IFSOCK if is_connected_unix_stream(stream) => Ok(()),
        SFlag::S_IFSOCK => refused(
            name,
            "a socket, and not a connected Unix stream: redirect it to a file or a pipe",
        ),
        SFlag::S_IFDIR => refused(
            name,
            "a directory, which must not enter a jail: redirect it",
        ),
        _ => refused(
            name,
            "neither a file nor a pipe nor a terminal: redirect it",
        ),
    }
}

/// Has a log file grow at its end only: what is in it already, of other machines maybe, is not to be
/// overwritten by whoever takes the VMM over.
///
/// # Errors
/// What `fcntl(2)` says.
pub fn append_only(log: BorrowedFd<'_>) -> Result<()> {
    let flags = fcntl(log, FcntlArg::F_GETFL).doing("look at", "the log")?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_APPEND;
    fcntl(log, FcntlArg::F_SETFL(flags))
        .map(drop)
        .doing("append to", "the log")
}

fn is_connected_unix_stream(socket: BorrowedFd<'_>) -> bool {
    let number = std::os::fd::AsRawFd::as_raw_fd(&socket);
    let unix = getpeername::<UnixAddr>(number)
        .is_ok_and(|peer| peer.family() == Some(AddressFamily::Unix));
    let kind = getsockopt(&socket, sockopt::SockType);
    unix && matches!(kind, Ok(SockType::Stream | SockType::SeqPacket))
}

/// Undoes `setarch(8)`: a caller's personality could take the VMM's address space layout
/// randomisation away, or make its memory executable.
///
/// # Errors
/// What `personality(2)` says.
pub fn reset_personality() -> Result<()> {
    personality::set(Persona::empty())
        .map(drop)
        .doing("reset", "the personality")
}

/// Where a process's own protection from the OOM killer is set (proc(5)).
const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// Takes the advantages away that the caller may have over other processes. Disadvantages stay.
///
/// # Errors
/// What the kernel says. None of it needs a privilege.
pub fn ordinary_scheduling() -> Result<()> {
    sys::leave_real_time().doing("leave", "real-time scheduling")?;
    sys::raise_nice_to_zero().doing("raise", "the nice value")?;
    let score = std::fs::read_to_string(OOM_SCORE).doing("read", OOM_SCORE)?;
    if is_protected(&score) {
        std::fs::write(OOM_SCORE, "0").doing("write", OOM_SCORE)?;
    }
    Ok(())
}

fn is_protected(score: &str) -> bool {
    score.trim().parse::<i32>().is_ok_and(|score| score < 0)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use nix::fcntl::open;
    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn only_an_advantage_is_taken_away() {
        assert!(is_protected("-1000\n") && is_protected("-1"));
        assert!(!is_protected("0\n") && !is_protected("500\n"));
    }

    #[test]
    fn streams_are_streams_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let good: Vec<OwnedFd> = vec![
            File::open("/dev/null").unwrap().into(),
            tempfile::tempfile().unwrap().into(),
            nix::unistd::pipe().unwrap().0,
            UnixStream::pair().unwrap().0.into(),
        ];
        for stream in &good {
            check_stream(stream.as_fd(), "x").unwrap();
        }
        let path = open("/dev/null", OFlag::O_PATH, Mode::empty()).unwrap();
        let event = nix::sys::eventfd::EventFd::new().unwrap();
        let bad: Vec<(OwnedFd, &str)> = vec![
            (File::open("/").unwrap().into(), "directory"),
            (path, "O_PATH"),
            (event.into(), "neither"),
            (
                TcpStream::connect(tcp.local_addr().unwrap())
                    .unwrap()
                    .into(),
                "socket",
            ),
            (tcp.into(), "socket"),
            (UdpSocket::bind("127.0.0.1:0").unwrap().into(), "socket"),
            (UnixDatagram::pair().unwrap().0.into(), "socket"),
            (
                UnixListener::bind(directory.path().join("s"))
                    .unwrap()
                    .into(),
                "socket",
            ),
        ];
        for (stream, word) in &bad {
            let error = check_stream(stream.as_fd(), "x").unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
        }
    }
}

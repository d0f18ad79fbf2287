//! A listening socket that the broker makes.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};

/// Connections that may wait to be accepted, as the standard library has it.
const BACKLOG: i32 = 128;

/// Listens on `path`, non-blocking: for the broker, whose policy knows these calls and no others. A socket that somebody
/// has left there is in the way, for the broker removes nothing.
///
/// # Errors
/// What the host says.
pub fn make(path: &str) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn listens_and_takes_no_name_that_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v.sock");
        let path = path.to_str().unwrap();
        let listener = UnixListener::from(make(path).unwrap());
        let nobody = listener.accept().unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::WouldBlock);
        let _caller = UnixStream::connect(path).unwrap();
        listener.accept().unwrap();
        let taken = make(path).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        make(&"x".repeat(200)).unwrap_err();
    }
}

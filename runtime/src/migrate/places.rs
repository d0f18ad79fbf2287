//! Finds and opens what a machine's way consists of, while this process still may.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use super::Error;
use super::args::Tcp;
use super::ends::Socket;
use crate::places::Places;
use crate::run::API_SOCKET;
use crate::state;

/// How long a host may take to answer.
const CONNECT: Duration = Duration::from_secs(10);
/// Seconds without a word from the other host after which it is asked for one, and how often then.
const IDLE: u32 = 5;
const TIMES: u32 = 3;
/// Milliseconds that it may take to acknowledge what it was sent.
const UNHEARD: u32 = 20_000;

fn reach(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Reach {
        what: what.to_string(),
        source,
    }
}

/// The API socket of the machine that goes.
pub fn source(from: &str) -> Result<PathBuf, Error> {
    if from.contains('/') {
        return Ok(PathBuf::from(from));
    }
    let places = Places::from_env();
    let record = state::find(&places, from)?;
    let path = places.machine(record.id.as_str()).join(API_SOCKET);
    match path.exists() {
        true => Ok(path),
        false => Err(Error::NoApi(from.to_string())),
    }
}

/// A connection to a VMM's API.
pub fn api(path: &Path) -> Result<Socket, Error> {
    let stream = UnixStream::connect(path).map_err(reach(path.display()))?;
    Ok(Socket::new(stream))
}

/// A host that is gone without a word is found out; and what is small is sent at once.
fn prepare(socket: &impl AsFd) -> io::Result<()> {
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &IDLE)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &IDLE)?;
    setsockopt(socket, sockopt::TcpKeepCount, &TIMES)?;
    setsockopt(socket, sockopt::TcpUserTimeout, &UNHEARD)?;
    Ok(setsockopt(socket, sockopt::TcpNoDelay, &true)?)
}

fn addresses(tcp: &Tcp) -> io::Result<Vec<SocketAddr>> {
    Ok((tcp.host.as_str(), tcp.port).to_socket_addrs()?.collect())
}

/// A connection to another host.
pub fn connect(tcp: &Tcp) -> Result<Socket, Error> {
    let what = || format!("{}, port {}", tcp.host, tcp.port);
    let mut failed = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses(tcp).map_err(reach(what()))? {
        let stream = TcpStream::connect_timeout(&address, CONNECT);
        match stream.and_then(|stream| prepare(&stream).map(|()| stream)) {
            Ok(stream) => return Ok(Socket::new(stream)),
            Err(error) => failed = error,
        }
    }
    Err(reach(what())(failed))
}

/// Where another host may connect.
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// At this address. Port 0 is any that is free.
    pub fn bind(tcp: &Tcp) -> Result<Self, Error> {
        let what = || format!("{}, port {}", tcp.host, tcp.port);
        let bound = || {
            let listener = TcpListener::bind(addresses(tcp)?.as_slice())?;
            // Connections have what their listener has.
            prepare(&listener)?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok(Self { listener, address })
        };
        bound().map_err(reach(what()))
    }

    /// Where that is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Who has connected.
    pub fn accept(&self) -> io::Result<Socket> {
        let (stream, _) = self.listener.accept()?;
        Ok(Socket::new(stream))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

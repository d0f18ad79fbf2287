//! The connection to the host, and another one when this machine goes on from a snapshot.

use crate::Error;
use crate::protocol::{Decoder, Frame, Identity, Resumed, Sender, Spec, VERSION};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Bytes read at a time.
const CHUNK: usize = 32 * 1024;
/// How long the host may take the last frame and close.
const FAREWELL: Duration = Duration::from_secs(3);

/// What a machine does that goes on from a snapshot.
pub trait Again {
    /// Connects to the host that it has now.
    fn connect(&self) -> Result<OwnedFd, Error>;
    /// Becomes another machine.
    fn take(&self, identity: &Identity) -> Result<(), Error>;
}

/// The connection.
pub struct Link<'a> {
    /// Its socket.
    pub stream: OwnedFd,
    /// What has come over it.
    pub decoder: Decoder,
    again: &'a dyn Again,
}

/// What came of an attempt to read or write.
pub enum Moved {
    /// So many bytes.
    Bytes(usize),
    /// None now.
    Nothing,
    /// The host has closed it.
    Closed,
    /// It is gone without an end: the machine goes on from a snapshot.
    Lost,
}

impl Moved {
    fn from(result: Result<usize, Errno>) -> Self {
        match result {
            Ok(length) => Self::Bytes(length),
            Err(Errno::EAGAIN | Errno::EINTR) => Self::Nothing,
            // vsock(7) sockets whose transport was reset.
            Err(Errno::ENOTCONN | Errno::ECONNRESET) => Self::Lost,
            Err(_) => Self::Closed,
        }
    }
}

impl<'a> Link<'a> {
    /// Connects for the first time.
    pub fn new(again: &'a dyn Again) -> Result<Self, Error> {
        Ok(Self {
            stream: again.connect()?,
            decoder: Decoder::new(Sender::Host),
            again,
        })
    }

    /// Reads what is there into the decoder.
    pub fn read(&mut self, chunk: &mut [u8]) -> Moved {
        match Moved::from(nix::unistd::read(&self.stream, chunk)) {
            Moved::Bytes(0) => Moved::Closed,
            Moved::Bytes(length) => {
                self.decoder.feed(chunk.get(..length).unwrap_or_default());
                Moved::Bytes(length)
            }
            other => other,
        }
    }

    /// Writes what it takes.
    pub fn write(&self, bytes: &[u8]) -> Moved {
        Moved::from(nix::unistd::write(&self.stream, bytes))
    }

    /// What an error of its socket means.
    pub fn error(&self) -> Moved {
        match getsockopt(&self.stream, sockopt::SocketError) {
            Ok(error) if error != 0 => Moved::from(Err(Errno::from_raw(error))),
            _ => Moved::Closed,
        }
    }

    pub(crate) fn set_blocking(&self, blocking: bool) -> Result<(), Error> {
        let flag = if blocking {
            OFlag::empty()
        } else {
            OFlag::O_NONBLOCK
        };
        fcntl(&self.stream, FcntlArg::F_SETFL(flag))
            .map(drop)
            .map_err(|errno| {
                Error::other(format!("cannot change the connection to the host: {errno}"))
            })
    }

    /// Sends one frame, blocking, once more over another connection if this one is lost. Only before and after a session.
    pub fn send(&mut self, frame: &Frame, running: bool) -> Result<(), Error> {
        let bytes = frame
            .to_bytes()
            .map_err(|error| Error::other(error.to_string()))?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match self.write(rest) {
                Moved::Bytes(length) => rest = rest.get(length..).unwrap_or_default(),
                Moved::Nothing => {}
                Moved::Closed => {
                    return Err(Error::other("the connection to the host broke"));
                }
                Moved::Lost => {
                    self.rejoin(running)?;
                    rest = match frame {
                        // The host knows by now.
                        Frame::Ready(_) | Frame::Resumed(_) => &[],
                        _ => bytes.as_slice(),
                    };
                }
            }
        }
        Ok(())
    }

    /// Waits for a frame.
    fn receive(&mut self) -> Result<Option<Frame>, Error> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let frame = self.decoder.next_frame();
            if let Some(frame) =
                frame.map_err(|error| Error::other(format!("from the host: {error}")))?
            {
                return Ok(Some(frame));
            }
            match self.read(&mut buffer) {
                Moved::Bytes(_) | Moved::Nothing => {}
                Moved::Closed => return Err(Error::other("the host closed the connection")),
                Moved::Lost => return Ok(None),
            }
        }
    }

    /// Waits for what to run.
    pub fn receive_spec(&mut self) -> Result<Spec, Error> {
        loop {
            match self.receive()? {
                Some(Frame::Spec(spec)) => return Ok(spec),
                // Saved before it was ready: the host has seen nothing of it but that it is.
                Some(Frame::Identity(identity)) => self.again.take(&identity)?,
                Some(_) => {
                    return Err(Error::other(
                        "from the host: another frame where the command was expected",
                    ));
                }
                None => self.rejoin(false)?,
            }
        }
    }

    /// Connects again, and becomes another machine. The connection is blocking then.
    pub fn rejoin(&mut self, running: bool) -> Result<(), Error> {
        loop {
            self.stream = self.again.connect()?;
            self.decoder = Decoder::new(Sender::Host);
            let resumed = Frame::Resumed(Resumed {
                version: VERSION,
                running,
            });
            let bytes = resumed.to_bytes();
            let bytes = bytes.map_err(|error| Error::other(error.to_string()))?;
            match self.write(&bytes) {
                Moved::Bytes(_) | Moved::Nothing => {}
                Moved::Closed => return Err(Error::other("the connection to the host broke")),
                Moved::Lost => continue,
            }
            match self.receive()? {
                Some(Frame::Identity(identity)) => return self.again.take(&identity),
                Some(_) => {
                    return Err(Error::other(
                        "from the host: another frame where an identity was expected",
                    ));
                }
                // Saved once more meanwhile.
                None => {}
            }
        }
    }

    /// Sends the last frame and waits, bounded, until the host has closed: powering off at once could lose it.
    pub fn last_frame(&mut self, frame: &Frame) {
        if self.set_blocking(true).is_err()
            || self.send(frame, true).is_err()
            || shutdown(self.stream.as_raw_fd(), Shutdown::Write).is_err()
        {
            return;
        }
        let deadline = Instant::now() + FAREWELL;
        let mut buffer = [0; 4096];
        loop {
            let mut descriptors = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            match poll(&mut descriptors, crate::session::timeout(Some(deadline))) {
                Ok(0) => return,
                Ok(_) if !matches!(nix::unistd::read(&self.stream, &mut buffer), Ok(1..)) => return,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
            if Instant::now() >= deadline {
                return;
            }
        }
    }
}

//! The vhost-user protocol's messages, front-end's side, over one socket.
//!
//! Our own, as it is short and must be just so: no call waits longer than the back-end's patience, a reply is
//! believed only if it is exactly what was asked for, and a sealed device thread makes no system call for it
//! that the vsock device does not make already.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};
use thiserror::Error;

/// Requests of the front-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    GetConfig = 24,
}

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;
/// Longest message: a configuration space of 256 bytes behind three words.
const MAX_PAYLOAD: usize = 268;

/// What went wrong with a back-end.
#[derive(Debug, Error)]
pub enum Error {
    /// It closed the socket.
    #[error("it has gone away")]
    Gone,
    /// It did not answer in time.
    #[error("it does not answer {0:?}")]
    Silent(Request),
    /// It said something that is no answer to what was asked.
    #[error("its answer to {0:?} is none")]
    Nonsense(Request),
    /// It said something without being asked.
    #[error("it speaks without being asked")]
    Unasked,
    /// It refused a request.
    #[error("it refuses {0:?}")]
    Refused(Request),
    /// The socket failed.
    #[error("its socket: {0}")]
    Socket(#[from] io::Error),
}

/// The front-end's end of the socket.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    patience: Duration,
    /// Whether the back-end acknowledges what it was told.
    pub acknowledges: bool,
}

impl Connection {
    /// Speaks on `socket`, and waits for no answer longer than `patience`.
    pub fn new(socket: UnixStream, patience: Duration) -> Self {
        Self {
            socket,
            patience,
            acknowledges: false,
        }
    }

    /// Readable when the back-end says something, or is gone.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Tells the back-end something.
    ///
    /// # Errors
    /// See [`Error`]; the connection is of no use then.
    pub fn tell(&self, request: Request, payload: &[u8], fds: &[RawFd]) -> Result<(), Error> {
        let need_reply = if self.acknowledges { NEED_REPLY } else { 0 };
        let end = self.send(request, need_reply, payload, fds)?;
        if !self.acknowledges {
            return Ok(());
        }
        let mut status = [0; 8];
        match self.reply(request, &mut status, end)? {
            8 if status == [0; 8] => Ok(()),
            8 => Err(Error::Refused(request)),
            _ => Err(Error::Nonsense(request)),
        }
    }

    /// Asks the back-end something; its answer fills `answer`.
    ///
    /// # Errors
    /// As for [`Connection::tell`], and when the answer has another length.
    pub fn ask(&self, request: Request, payload: &[u8], answer: &mut [u8]) -> Result<(), Error> {
        let end = self.send(request, 0, payload, &[])?;
        let expected = answer.len();
        match self.reply(request, answer, end)? {
            len if len == expected => Ok(()),
            _ => Err(Error::Nonsense(request)),
        }
    }

    /// Asks for a number.
    ///
    /// # Errors
    /// As for [`Connection::ask`].
    pub fn ask_u64(&self, request: Request) -> Result<u64, Error> {
        let mut answer = [0; 8];
        self.ask(request, &[], &mut answer)?;
        Ok(u64::from_le_bytes(answer))
    }

    /// What it means that the socket is readable although nothing was asked.
    pub fn unasked(&self) -> Result<(), Error> {
        let mut byte = [0];
        match self.receive(&mut byte) {
            Ok(0) => Err(Error::Gone),
            Ok(_) => Err(Error::Unasked),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(Errno::ECONNRESET) => Err(Error::Gone),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// Sends a message; until when its answer may come.
    fn send(
        &self,
        request: Request,
        flags: u32,
        payload: &[u8],
        fds: &[RawFd],
    ) -> Result<Instant, Error> {
        let end = Instant::now() + self.patience;
        let len = payload.len() as u32;
        let words = [request as u32, VERSION | flags, len];
        let message = [words.map(u32::to_le_bytes).as_flattened(), payload].concat();
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            let slice = [IoSlice::new(&message)];
            match sendmsg::<()>(self.socket.as_raw_fd(), &slice, control, flags, None) {
                Ok(count) if count == message.len() => return Ok(end),
                // A socket that takes half of so little has nobody who reads.
                Ok(_) => return Err(Error::Silent(request)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, end, request)?,
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(Error::Gone),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
    }

    /// Receives the answer to `request`, no longer than `answer`; its length.
    fn reply(&self, request: Request, answer: &mut [u8], end: Instant) -> Result<usize, Error> {
        let mut header = [0; HEADER];
        self.fill(&mut header, end, request)?;
        let [kind, flags, len] = [0, 4, 8].map(|at| {
            let word = header.get(at..).and_then(<[u8]>::first_chunk);
            word.map_or(0, |word| u32::from_le_bytes(*word))
        });
        let len = len as usize;
        let right = kind == request as u32
            && flags & 3 == VERSION
            && flags & REPLY != 0
            && len <= MAX_PAYLOAD;
        let Some(place) = answer.get_mut(..len).filter(|_| right) else {
            return Err(Error::Nonsense(request));
        };
        self.fill(place, end, request)?;
        Ok(len)
    }

    fn fill(&self, mut place: &mut [u8], end: Instant, request: Request) -> Result<(), Error> {
        while !place.is_empty() {
            match self.receive(place) {
                Ok(0) | Err(Errno::ECONNRESET) => return Err(Error::Gone),
                Ok(count) => place = place.get_mut(count..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLIN, end, request)?,
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(())
    }

    /// Without room for control data, so that descriptors nobody asked for never arrive.
    fn receive(&self, place: &mut [u8]) -> Result<usize, Errno> {
        let mut slice = [IoSliceMut::new(place)];
        let fd = self.socket.as_raw_fd();
        Ok(recvmsg::<()>(fd, &mut slice, None, MsgFlags::MSG_DONTWAIT)?.bytes)
    }

    fn wait(&self, what: PollFlags, end: Instant, request: Request) -> Result<(), Error> {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Silent(request));
        }
        let milliseconds = left.as_millis().saturating_add(1).try_into();
        let timeout = milliseconds.unwrap_or(PollTimeout::MAX);
        let fd: BorrowedFd<'_> = self.socket.as_fd();
        match poll(&mut [PollFd::new(fd, what)], timeout) {
            // Who waits looks at the socket again, and at the time.
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }
}

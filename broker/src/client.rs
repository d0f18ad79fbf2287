//! The VMM's side of the broker's socket.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::fdpass;
use crate::protocol::{
    MAX_IN_FLIGHT, MAX_MESSAGE, Operation, ProtocolError, Reply, Request, decode, encode,
};

/// Asks a broker, without waiting ([`Client::submit`], [`Client::receive`]: `sendmsg`, `recvmsg`)
/// or waiting for the answer during setup ([`Client::call`]: `poll` besides).
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    next_id: u64,
    in_flight: Vec<u64>,
}

/// The broker's answer to an earlier request.
#[derive(Debug)]
pub struct Answer {
    /// The id that [`Client::submit`] returned.
    pub id: u64,
    /// The descriptor (close-on-exec; a connection is non-blocking too), or why there is none.
    pub result: Result<OwnedFd, String>,
}

/// Why the broker could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// [`MAX_IN_FLIGHT`] requests wait already, or the socket is full: ask again after an answer.
    #[error("too many requests to the broker wait for their answer")]
    Busy,
    /// The broker has ended.
    #[error("the broker has ended")]
    Gone,
    /// The broker refused it; the text says why.
    #[error("the broker refused: {0}")]
    Refused(String),
    /// No answer in time.
    #[error("the broker did not answer within {0:?}")]
    Timeout(Duration),
    /// The request does not fit a message, or the answer is none.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The answer does not belong to a request, or lacks what it promises.
    #[error("the broker's answer makes no sense: {0}")]
    Unexpected(&'static str),
    /// A call on the socket failed.
    #[error("the broker's socket: cannot {action}: {source}")]
    Socket {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: Errno,
    },
}

impl Client {
    /// A client on the VMM's end of the pair (hand-over kind `broker`).
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            next_id: 1,
            in_flight: Vec::with_capacity(MAX_IN_FLIGHT),
        }
    }

    /// Requests that wait for their answer.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Sends a request and returns its id. Never waits.
    ///
    /// # Errors
    /// [`ClientError::Busy`] at [`MAX_IN_FLIGHT`] or when the socket is full; nothing was sent then.
    pub fn submit(&mut self, op: Operation) -> Result<u64, ClientError> {
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            return Err(ClientError::Busy);
        }
        let id = self.next_id;
        let bytes = encode(&Request { id, op })?;
        match fdpass::send(self.socket.as_fd(), &bytes, None) {
            Ok(()) => {}
            Err(Errno::EAGAIN) => return Err(ClientError::Busy),
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(ClientError::Gone),
            Err(source) => {
                return Err(ClientError::Socket {
                    action: "send",
                    source,
                });
            }
        }
        self.next_id = self.next_id.wrapping_add(1);
        self.in_flight.push(id);
        Ok(id)
    }

    /// The next answer, or none if there is none yet. Never waits.
    ///
    /// # Errors
    /// [`ClientError::Gone`] once the broker has ended; every request in flight has failed then.
    pub fn receive(&mut self) -> Result<Option<Answer>, ClientError> {
        let mut buffer = [0; MAX_MESSAGE];
        let received = match fdpass::receive(self.socket.as_fd(), &mut buffer) {
            Ok(received) => received,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(Errno::ECONNRESET) => return Err(ClientError::Gone),
            Err(source) => {
                return Err(ClientError::Socket {
                    action: "receive",
                    source,
                });
            }
        };
        if received.truncated {
            return Err(ProtocolError::TooLong(received.length).into());
        }
        if received.length == 0 {
            return Err(ClientError::Gone);
        }
        let reply: Reply = decode(buffer.get(..received.length).unwrap_or_default())?;
        let at = self
            .in_flight
            .iter()
            .position(|id| *id == reply.id)
            .ok_or(ClientError::Unexpected("nobody asked for it"))?;
        self.in_flight.swap_remove(at);
        let result = match (reply.ok, reply.error, received.descriptor) {
            (true, None, Some(descriptor)) => Ok(descriptor),
            (false, Some(text), None) => Err(text),
            // That request has failed; the next may find room again.
            (true, None, None) if received.descriptor_lost => {
                Err("there is no room for another descriptor (RLIMIT_NOFILE)".into())
            }
            _ => return Err(ClientError::Unexpected("success and descriptor disagree")),
        };
        Ok(Some(Answer {
            id: reply.id,
            result,
        }))
    }

    /// Asks and waits for the answer: for setup, when nothing else is in flight.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the broker's reason, [`ClientError::Timeout`], and those of
    /// [`Client::submit`] and [`Client::receive`].
    pub fn call(&mut self, op: Operation, timeout: Duration) -> Result<OwnedFd, ClientError> {
        let id = self.submit(op)?;
        let started = Instant::now();
        loop {
            if let Some(answer) = self.receive()? {
                if answer.id != id {
                    return Err(ClientError::Unexpected("it answers an earlier request"));
                }
                return answer.result.map_err(ClientError::Refused);
            }
            let left = timeout.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(ClientError::Timeout(timeout));
            }
            let mut wait = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut wait, left) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(source) => {
                    return Err(ClientError::Socket {
                        action: "poll",
                        source,
                    });
                }
            }
        }
    }
}

impl AsFd for Client {
    /// To watch with epoll: readable when [`Client::receive`] has something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

//! The VMM's side of the broker's socket.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::fdpass;
use crate::protocol::{
    MAX_IN_FLIGHT, MAX_MESSAGE, Operation, ProtocolError, Reply, Request, decode, encode,
};

/// Why a descriptor that was sent is not there.
const NO_ROOM: &str = "there is no room for another descriptor (RLIMIT_NOFILE)";

/// Asks a broker, without waiting ([`Client::submit`], [`Client::receive`]: `sendmsg`, `recvmsg`)
/// or waiting for the answer ([`Client::call`], [`Client::order`]: `poll` besides).
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    next_id: u64,
    in_flight: Vec<InFlight>,
}

/// A request that waits for its answer.
#[derive(Debug)]
struct InFlight {
    id: u64,
    /// Whether a descriptor comes with the answer.
    gives_descriptor: bool,
    /// Nobody waits for it any more: what comes is dropped.
    abandoned: bool,
}

/// What an answer says.
#[derive(Debug)]
enum Outcome {
    Descriptor(OwnedFd),
    Done,
    /// It succeeded, and this process had no room for its descriptor.
    Lost,
    Refused(String),
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
    /// Only for what gives a descriptor, or only for what gives none.
    #[error(
        "a request of this kind is not made like that: `call` and `submit` are for descriptors, `order` for the rest"
    )]
    Misused,
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

    /// Sends a request for a descriptor and returns its id. Never waits.
    ///
    /// # Errors
    /// [`ClientError::Busy`] at [`MAX_IN_FLIGHT`] or when the socket is full; nothing was sent then.
    pub fn submit(&mut self, op: Operation) -> Result<u64, ClientError> {
        if op.gives_descriptor() {
            self.send(op)
        } else {
            Err(ClientError::Misused)
        }
    }

    /// The next answer, or none if there is none yet. Never waits.
    ///
    /// # Errors
    /// [`ClientError::Gone`] once the broker has ended; every request in flight has failed then.
    pub fn receive(&mut self) -> Result<Option<Answer>, ClientError> {
        let Some((id, outcome)) = self.next()? else {
            return Ok(None);
        };
        let result = match outcome {
            Outcome::Descriptor(descriptor) => Ok(descriptor),
            // That request has failed; the next may find room again.
            Outcome::Lost => Err(NO_ROOM.to_owned()),
            Outcome::Refused(text) => Err(text),
            Outcome::Done => return Err(ClientError::Misused),
        };
        Ok(Some(Answer { id, result }))
    }

    /// Asks for a descriptor and waits for it: when nothing else is in flight.
    ///
    /// A file that is made but does not arrive is discarded.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the broker's reason, [`ClientError::Timeout`], and those of
    /// [`Client::submit`] and [`Client::receive`].
    pub fn call(&mut self, op: Operation, timeout: Duration) -> Result<OwnedFd, ClientError> {
        let created = match &op {
            Operation::Create { name } => Some(name.clone()),
            _ => None,
        };
        let id = self.submit(op)?;
        let result = match self.wait(id, timeout) {
            Ok(Outcome::Descriptor(descriptor)) => return Ok(descriptor),
            Ok(Outcome::Refused(text)) => return Err(ClientError::Refused(text)),
            Ok(_) => Err(ClientError::Refused(NO_ROOM.to_owned())),
            Err(error) => Err(error),
        };
        if let Some(name) = created
            // Requests are answered in their order, so this comes after the file was made.
            && let Ok(id) = self.send(Operation::Discard { name })
        {
            self.abandon(id);
        }
        result
    }

    /// Asks for something that gives no descriptor, and waits until it is done: when nothing else is in flight.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn order(&mut self, op: Operation, timeout: Duration) -> Result<(), ClientError> {
        if op.gives_descriptor() {
            return Err(ClientError::Misused);
        }
        let id = self.send(op)?;
        match self.wait(id, timeout)? {
            Outcome::Refused(text) => Err(ClientError::Refused(text)),
            _ => Ok(()),
        }
    }

    fn send(&mut self, op: Operation) -> Result<u64, ClientError> {
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            return Err(ClientError::Busy);
        }
        let id = self.next_id;
        let gives_descriptor = op.gives_descriptor();
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
        self.in_flight.push(InFlight {
            id,
            gives_descriptor,
            abandoned: false,
        });
        Ok(id)
    }

    /// The next answer that somebody waits for.
    fn next(&mut self) -> Result<Option<(u64, Outcome)>, ClientError> {
        loop {
            match self.next_of_any()? {
                Some((
                    InFlight {
                        abandoned: true, ..
                    },
                    _,
                )) => {}
                Some((request, outcome)) => return Ok(Some((request.id, outcome))),
                None => return Ok(None),
            }
        }
    }

    fn next_of_any(&mut self) -> Result<Option<(InFlight, Outcome)>, ClientError> {
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
            .position(|request| request.id == reply.id)
            .ok_or(ClientError::Unexpected("nobody asked for it"))?;
        let request = self.in_flight.swap_remove(at);
        let lost = received.descriptor_lost;
        let outcome = match (reply.ok, reply.error, received.descriptor) {
            (true, None, Some(descriptor)) if request.gives_descriptor => {
                Outcome::Descriptor(descriptor)
            }
            (true, None, None) if request.gives_descriptor && lost => Outcome::Lost,
            (true, None, None) if !request.gives_descriptor && !lost => Outcome::Done,
            (false, Some(text), None) => Outcome::Refused(text),
            _ => return Err(ClientError::Unexpected("success and descriptor disagree")),
        };
        Ok(Some((request, outcome)))
    }

    /// Waits for the answer to one request, which is abandoned when it does not come in time.
    fn wait(&mut self, id: u64, timeout: Duration) -> Result<Outcome, ClientError> {
        let started = Instant::now();
        loop {
            if let Some((answered, outcome)) = self.next()? {
                if answered != id {
                    return Err(ClientError::Unexpected("it answers an earlier request"));
                }
                return Ok(outcome);
            }
            let left = timeout.saturating_sub(started.elapsed());
            if left.is_zero() {
                self.abandon(id);
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

    fn abandon(&mut self, id: u64) {
        let mut requests = self.in_flight.iter_mut();
        if let Some(request) = requests.find(|request| request.id == id) {
            request.abandoned = true;
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

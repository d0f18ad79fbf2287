//! The broker's loop: one request, one answer, never waiting for anybody but the next request's sender.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::creation::Creations;
use crate::fdpass;
use crate::policy::BrokerPolicy;
use crate::protocol::{MAX_MESSAGE, Operation, ProtocolError, Reply, Request, decode, encode};

/// A broker's ends of its socket pairs, and what it may do.
#[derive(Debug)]
pub struct Server {
    conversations: Vec<Conversation>,
    policy: BrokerPolicy,
}

/// What is said with one thread of the VMM.
#[derive(Debug)]
struct Conversation {
    socket: OwnedFd,
    /// The answer that found the socket full. While there is one, no request is read, so a VMM
    /// that does not read its answers stops itself, and costs one answer's memory here.
    waiting: Option<Outgoing>,
    /// What it is making. Dropped with the conversation, however that ends.
    creations: Creations,
}

#[derive(Debug)]
struct Outgoing {
    id: u64,
    bytes: Vec<u8>,
    descriptor: Option<Arc<OwnedFd>>,
    /// The name of the file that the descriptor is of, if it is being made.
    created: Option<String>,
}

/// Why [`Server::serve`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerEvent {
    /// The watched descriptor is readable.
    Watched,
    /// The VMM has closed its end.
    Closed,
}

/// Why a broker stopped serving.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The VMM sent what its client never sends: it is not to be answered any more.
    #[error("the VMM broke the broker's protocol: {0}")]
    Protocol(#[from] ProtocolError),
    /// A call failed that cannot fail.
    #[error("the broker's socket: cannot {action}: {source}")]
    Socket {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: Errno,
    },
}

impl Server {
    /// A server on one end of a `SOCK_SEQPACKET` pair.
    pub fn new(socket: OwnedFd, policy: BrokerPolicy) -> Self {
        Self::with_sockets(vec![socket], policy)
    }

    /// A server on one end of each of several pairs: one for each thread of the VMM that asks.
    pub fn with_sockets(sockets: Vec<OwnedFd>, policy: BrokerPolicy) -> Self {
        let conversation = |socket| Conversation {
            socket,
            waiting: None,
            creations: Creations::default(),
        };
        Self {
            conversations: sockets.into_iter().map(conversation).collect(),
            policy,
        }
    }

    /// Serves until the VMM has closed its ends, or `watched` is readable (which is not read here).
    ///
    /// # Errors
    /// If the VMM breaks the protocol. Drop the server then: it closes the sockets, and gives up files that
    /// were being made.
    pub fn serve(&mut self, watched: Option<BorrowedFd<'_>>) -> Result<ServerEvent, ServerError> {
        while !self.conversations.is_empty() {
            let own = self.conversations.iter().map(Conversation::wanted);
            let other = watched.map(|other| PollFd::new(other, PollFlags::POLLIN));
            let mut all: Vec<PollFd<'_>> = other.into_iter().chain(own).collect();
            match poll(&mut all, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(source) => {
                    return Err(ServerError::Socket {
                        action: "poll",
                        source,
                    });
                }
            }
            let mut ready = all.iter().map(|slot| slot.any().unwrap_or(false));
            if watched.is_some() && ready.next() == Some(true) {
                return Ok(ServerEvent::Watched);
            }
            let ready: Vec<bool> = ready.collect();
            let mut closed = Vec::new();
            for (at, ready) in ready.into_iter().enumerate() {
                if let Some(conversation) = self.conversations.get_mut(at).filter(|_| ready)
                    && !conversation.step(&self.policy)?
                {
                    closed.push(at);
                }
            }
            // The last first, so that the others keep their places.
            for at in closed.into_iter().rev() {
                self.conversations.remove(at);
            }
        }
        Ok(ServerEvent::Closed)
    }
}

impl Conversation {
    /// What its socket is waited for.
    fn wanted(&self) -> PollFd<'_> {
        let interest = match self.waiting {
            Some(_) => PollFlags::POLLOUT,
            None => PollFlags::POLLIN,
        };
        PollFd::new(self.socket.as_fd(), interest)
    }

    /// Sends the waiting answer, or reads and answers one request. False when the VMM is gone.
    fn step(&mut self, policy: &BrokerPolicy) -> Result<bool, ServerError> {
        if let Some(outgoing) = self.waiting.take() {
            return self.send(outgoing);
        }
        let mut buffer = [0; MAX_MESSAGE];
        let received = match fdpass::receive(self.socket.as_fd(), &mut buffer) {
            Ok(received) => received,
            Err(Errno::EAGAIN) => return Ok(true),
            Err(Errno::ECONNRESET) => return Ok(false),
            Err(source) => {
                return Err(ServerError::Socket {
                    action: "receive",
                    source,
                });
            }
        };
        // No request brings a descriptor; one that does is closed here with `received`.
        if received.truncated || received.descriptor_lost || received.descriptor.is_some() {
            return Err(ProtocolError::TooLong(received.length).into());
        }
        if received.length == 0 {
            return Ok(false);
        }
        let request: Request = decode(buffer.get(..received.length).unwrap_or_default())?;
        let performed = policy.perform(&request.op, &mut self.creations);
        let (reply, descriptor) = match performed {
            Ok(descriptor) => (Reply::ok(request.id), descriptor),
            Err(error) => (Reply::error(request.id, error.to_string()), None),
        };
        let created = match request.op {
            Operation::Create { name } if descriptor.is_some() => Some(name),
            _ => None,
        };
        self.send(Outgoing {
            id: request.id,
            bytes: encode(&reply)?,
            descriptor,
            created,
        })
    }

    fn send(&mut self, outgoing: Outgoing) -> Result<bool, ServerError> {
        let descriptor = outgoing.descriptor.as_deref().map(AsFd::as_fd);
        match fdpass::send(self.socket.as_fd(), &outgoing.bytes, descriptor) {
            Ok(()) => Ok(true),
            Err(Errno::EAGAIN) => {
                self.waiting = Some(outgoing);
                Ok(true)
            }
            // Too many descriptors of this user are under way: say so instead.
            Err(Errno::ETOOMANYREFS) if outgoing.descriptor.is_some() => {
                if let Some(name) = &outgoing.created {
                    // It is there: it was made for this answer.
                    let _ = self.creations.discard(name);
                }
                let reply = Reply::error(outgoing.id, "too many descriptors are under way");
                self.send(Outgoing {
                    id: outgoing.id,
                    bytes: encode(&reply)?,
                    descriptor: None,
                    created: None,
                })
            }
            Err(Errno::EPIPE | Errno::ECONNRESET) => Ok(false),
            Err(source) => Err(ServerError::Socket {
                action: "send",
                source,
            }),
        }
    }
}

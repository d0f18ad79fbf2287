//! One TCP connection of a client: requests in, answers out, one after the other.

use std::time::{Duration, Instant};

use smoltcp::socket::tcp::{Socket, State};

use super::http::{self, MAX_REQUEST, Response};
use super::service::Service;

/// How long a client may do nothing.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a client has to move for its connection to stay: all of it in one number for each kind.
type Trace = (State, usize, usize, usize, usize);

/// A connection; while there is no client, what the next one starts with.
#[derive(Default)]
pub struct Connection {
    /// Bytes of requests not answered yet, [`MAX_REQUEST`] at most.
    request: Vec<u8>,
    /// The answer being sent, and how much of it is.
    response: Vec<u8>,
    sent: usize,
    /// Whether that is the last one.
    is_last: bool,
    /// When the client last did something, and what there was to see of it.
    seen: Option<(Instant, Trace)>,
}

impl Connection {
    /// Reads, answers and sends what can be without waiting, and ends a client that does nothing.
    ///
    /// Bounded: an answer that does not fit in the socket's buffer ends the turn.
    pub fn drive(&mut self, socket: &mut Socket<'_>, service: &Service, now: Instant) {
        if !socket.is_active() {
            // Also when the client took its first word back, and the socket waits for another.
            self.reset();
            return;
        }
        self.talk(socket, service, now);
        let trace = (
            socket.state(),
            socket.send_queue(),
            socket.recv_queue(),
            self.request.len(),
            self.sent,
        );
        match self.seen {
            Some((since, seen)) if seen == trace => {
                if now.saturating_duration_since(since) >= PATIENCE {
                    socket.abort();
                }
            }
            _ => self.seen = Some((now, trace)),
        }
    }

    /// When an idle client is ended.
    pub fn deadline(&self) -> Option<Instant> {
        self.seen.and_then(|(since, _)| since.checked_add(PATIENCE))
    }

    /// Forgets the client.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    fn talk(&mut self, socket: &mut Socket<'_>, service: &Service, now: Instant) {
        loop {
            if !self.send(socket) || self.is_last {
                return;
            }
            let came = self.read(socket);
            match http::parse(&self.request) {
                Ok(Some((request, len))) => {
                    self.is_last = !request.keep_alive;
                    self.response = service.answer(&request, now).encode(request.keep_alive);
                    self.request.drain(..len);
                }
                Ok(None) if came => {}
                Ok(None) => {
                    // In the middle of a request or between two, the client has said its last word.
                    if !socket.may_recv() && socket.state() == State::CloseWait {
                        socket.close();
                    }
                    return;
                }
                Err(refusal) => {
                    self.is_last = true;
                    self.response = Response::from(refusal).encode(false);
                    self.request.clear();
                }
            }
        }
    }

    /// Sends of the answer what goes; whether all of it is gone.
    fn send(&mut self, socket: &mut Socket<'_>) -> bool {
        let rest = self.response.get(self.sent..).unwrap_or_default();
        if rest.is_empty() {
            return true;
        }
        // A client that went away reads nothing more: the state of its socket ends it.
        let Ok(count) = socket.send_slice(rest) else {
            return false;
        };
        self.sent = self.sent.saturating_add(count);
        if self.sent < self.response.len() {
            return false;
        }
        self.response = Vec::new();
        self.sent = 0;
        if self.is_last {
            socket.close();
        }
        true
    }

    /// Takes what came, as much as a request may have; whether anything did.
    fn read(&mut self, socket: &mut Socket<'_>) -> bool {
        let room = MAX_REQUEST.saturating_sub(self.request.len());
        if room == 0 || !socket.can_recv() {
            return false;
        }
        let request = &mut self.request;
        let count = socket.recv(|bytes| {
            let part = bytes.get(..room).unwrap_or(bytes);
            request.extend_from_slice(part);
            (part.len(), part.len())
        });
        count.is_ok_and(|count| count > 0)
    }
}

//! One client's connection: what has arrived of requests, and what is still to be sent of answers.
//!
//! A client has one request's worth of memory here and one answer's, and a time in which each must pass.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::http::{self, Head, MAX_HEAD, Parsed, Response};
use crate::virtio::vsock::socket;

/// How long a request may take to arrive, and an answer to be taken.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long a client that was refused may go on sending, so that it reads why.
const LINGER: Duration = Duration::from_secs(2);
/// Most bytes read at once.
const CHUNK: usize = 16 << 10;
/// Most bytes read and thrown away of a client that was refused.
const MAX_DISCARD: usize = 1 << 20;

/// A request that has arrived.
#[derive(Debug)]
pub struct Request {
    /// Its line and fields.
    pub head: Head,
    /// Its body.
    pub body: Vec<u8>,
}

/// What a connection does.
#[derive(Debug, PartialEq, Eq)]
enum State {
    /// Takes requests.
    Open,
    /// Sends what is left, then ends.
    Closing,
    /// Reads and throws away, so many bytes more, so that the client reads why it was refused.
    Discarding(usize),
    /// Is over.
    Closed,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// How much of `output` has been sent.
    sent: usize,
    state: State,
    /// Whether leave to send the body was given for the request that is arriving.
    continued: bool,
    /// When what is under way must have passed.
    deadline: Option<Instant>,
    /// When it last did anything.
    last_used: Instant,
}

impl Connection {
    /// A client that has just connected.
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            state: State::Open,
            continued: false,
            deadline: None,
            last_used: Instant::now(),
        }
    }

    /// Whether its socket can be let go.
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// Whether nothing is under way: it may be closed for another client's sake.
    pub fn is_idle(&self) -> bool {
        self.state == State::Open && self.deadline.is_none()
    }

    /// When it last did anything.
    pub fn last_used(&self) -> Instant {
        self.last_used
    }

    /// When [`Connection::expire`] wants to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether an answer waits to be taken: then it is to be watched for that alone.
    pub fn is_sending(&self) -> bool {
        !self.output.is_empty()
    }

    /// Ends it if its time is up.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.state = State::Closed;
        }
    }

    /// Reads once. `max_body` bounds what is kept.
    pub fn receive(&mut self, max_body: usize) {
        self.last_used = Instant::now();
        let mut chunk = [0; CHUNK];
        let room = match self.state {
            State::Open => MAX_HEAD
                .saturating_add(max_body)
                .saturating_sub(self.input.len()),
            State::Discarding(left) => left,
            State::Closing | State::Closed => 0,
        };
        let Some(space) = chunk.get_mut(..room.min(CHUNK)).filter(|s| !s.is_empty()) else {
            return;
        };
        let count = match socket::receive(&self.socket, space) {
            Err(Errno::EAGAIN) => return,
            Err(_) | Ok(0) => {
                self.state = State::Closed;
                return;
            }
            Ok(count) => count,
        };
        if let State::Discarding(left) = &mut self.state {
            *left = left.saturating_sub(count);
            if *left == 0 {
                self.state = State::Closed;
            }
            return;
        }
        if self.deadline.is_none() {
            self.deadline = self.last_used.checked_add(PATIENCE);
        }
        self.input
            .extend_from_slice(chunk.get(..count).unwrap_or_default());
    }

    /// The next request that has arrived whole. None while an answer waits to be taken: a client that
    /// does not read gets no more work done.
    pub fn next(&mut self, max_body: usize) -> Option<Request> {
        if self.state != State::Open || self.is_sending() || self.input.is_empty() {
            return None;
        }
        let (head, length) = match http::parse(&self.input, max_body) {
            Ok(Parsed::Partial) => return None,
            Ok(Parsed::Head(head, length)) => (head, length),
            Err(refusal) => {
                self.refuse(&refusal);
                return None;
            }
        };
        let end = length.saturating_add(head.body);
        if self.input.len() < end {
            if head.expects && !self.continued {
                self.continued = true;
                self.output.extend_from_slice(http::CONTINUE);
                self.send();
            }
            return None;
        }
        let rest = self.input.split_off(end);
        let body = std::mem::replace(&mut self.input, rest).split_off(length);
        self.continued = false;
        self.deadline = None;
        Some(Request { head, body })
    }

    /// Answers the request that [`Connection::next`] gave; `close` ends the connection after it.
    pub fn answer(&mut self, response: &Response, close: bool) {
        response.write(close, &mut self.output);
        if close {
            self.state = State::Closing;
        }
        self.deadline = Instant::now().checked_add(PATIENCE);
        self.send();
    }

    /// Answers something that is no request, and ends the connection.
    pub fn refuse(&mut self, response: &Response) {
        response.write(true, &mut self.output);
        self.input = Vec::new();
        self.state = State::Discarding(MAX_DISCARD);
        self.deadline = Instant::now().checked_add(LINGER);
        self.send();
    }

    /// Its socket, and what has come since the last request; none if an answer still waits to be taken.
    pub fn into_parts(self) -> Option<(UnixStream, Vec<u8>)> {
        let usable = self.state == State::Open && !self.is_sending();
        usable.then_some((self.socket, self.input))
    }

    /// Sends what the client takes.
    pub fn send(&mut self) {
        self.last_used = Instant::now();
        while let Some(rest) = self.output.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match socket::send(&self.socket, [rest, &[]]) {
                Err(Errno::EAGAIN) => return,
                Err(_) => {
                    self.state = State::Closed;
                    return;
                }
                Ok(count) => self.sent = self.sent.saturating_add(count),
            }
        }
        // A large answer's memory goes with it.
        self.output = Vec::new();
        self.sent = 0;
        match self.state {
            State::Closing => self.state = State::Closed,
            State::Open => {
                let arriving = !self.input.is_empty();
                self.deadline = arriving
                    .then(|| Instant::now().checked_add(PATIENCE))
                    .flatten();
            }
            State::Discarding(_) | State::Closed => {}
        }
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;

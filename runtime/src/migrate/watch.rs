//! Asks the VMM that a machine leaves how far it is, over a connection that was there before.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use serde_json::Value;

use super::ends::{End as _, Socket};
use crate::api::{self, Answer, MAX_ANSWER};

/// How often.
const PAUSE: Duration = Duration::from_millis(100);

/// What was said last.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// How far it is.
    pub phase: String,
    /// Rounds so far.
    pub round: u64,
    /// Pages that are left.
    pub left_pages: u64,
    /// Bytes a second.
    pub bytes_per_second: u64,
    /// How long the guest stood still.
    pub downtime_us: u64,
    /// What went wrong.
    pub error: String,
}

impl Progress {
    /// From JSON. What is missing is nothing.
    pub fn of(value: &Value) -> Self {
        let text = |name| api::plain(value.get(name).and_then(Value::as_str).unwrap_or_default());
        let number = |name| value.get(name).and_then(Value::as_u64).unwrap_or(0);
        Self {
            phase: text("phase"),
            round: number("round"),
            left_pages: number("left_pages"),
            bytes_per_second: number("bytes_per_second"),
            downtime_us: number("downtime_us"),
            error: text("error"),
        }
    }

    /// Whether it is decided where the machine is.
    pub fn is_final(&self) -> bool {
        ["moved", "failed", "unknown"].contains(&self.phase.as_str())
    }
}

/// Who asks.
pub struct Watch {
    socket: Socket,
    inbox: Vec<u8>,
    /// Whether an answer is due, and to what: a GET tells something.
    asked: Option<bool>,
    next: Instant,
    cancel: bool,
    ended: bool,
    /// The last answer.
    pub progress: Progress,
}

impl Watch {
    /// Over this connection.
    pub fn new(socket: Socket) -> Self {
        Self {
            socket,
            inbox: Vec::new(),
            asked: None,
            next: Instant::now(),
            cancel: false,
            ended: false,
            progress: Progress::default(),
        }
    }

    /// Has it cancelled.
    pub fn cancel(&mut self) {
        self.cancel = true;
    }

    /// Whether the VMM has closed the connection, or said nonsense.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// What to wait for.
    pub fn watched(&self) -> Option<PollFd<'_>> {
        (!self.ended).then(|| PollFd::new(self.socket.as_fd(), PollFlags::POLLIN))
    }

    /// Takes an answer, and asks again when it is time.
    pub fn turn(&mut self) {
        if !self.ended && self.try_turn().is_err() {
            self.ended = true;
        }
    }

    fn try_turn(&mut self) -> io::Result<()> {
        let mut chunk = [0; 4096];
        match self.socket.receive(&mut chunk) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => self
                .inbox
                .extend_from_slice(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if self.inbox.len() > MAX_ANSWER {
            return Err(api::malformed());
        }
        if let Some((answer, size)) = Answer::parse(&self.inbox)? {
            let tells = self.asked.take().ok_or_else(api::malformed)?;
            self.inbox.drain(..size.min(self.inbox.len()));
            if tells && answer.status == 200 {
                self.progress = Progress::of(&answer.body);
            }
            // A cancellation is refused when there is nothing to cancel: the next answer says what is.
            self.next = Instant::now() + PAUSE;
        }
        if self.asked.is_some() {
            return Ok(());
        }
        let (request, tells) = match std::mem::take(&mut self.cancel) {
            true => (api::request("PUT", "/migration/cancel", "{}"), false),
            false if Instant::now() >= self.next => (api::request("GET", "/migration", ""), true),
            false => return Ok(()),
        };
        // Nothing else is on its way: that little has room, or somebody plays with us.
        if self.socket.send(request.as_bytes())? != request.len() {
            return Err(ErrorKind::WriteZero.into());
        }
        self.asked = Some(tells);
        Ok(())
    }
}

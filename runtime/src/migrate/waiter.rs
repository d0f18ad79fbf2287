//! Waits for what others do, and for a signal that ends it.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::Value;

use super::ends::{End, Socket};
use super::{Error, call};
use crate::api::{self, Answer, MAX_ANSWER};

/// How long an end may take to answer before the machine is on its way.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How often is looked at the clock, in milliseconds.
pub const LOOK: u16 = 50;

/// Who waits: for what was promised, and for a signal that ends it.
pub struct Waiter {
    signals: SignalFd,
}

impl Waiter {
    /// SIGINT and SIGTERM are held from here on.
    pub fn new() -> Result<Self, Error> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        signals.thread_block().map_err(call("hold signals"))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&signals, flags).map_err(call("hold signals"))?;
        Ok(Self { signals })
    }

    /// Waits for a while, and says whether it is to end.
    pub fn wait(&self, watched: Vec<PollFd<'_>>, timeout: u16) -> Result<bool, Error> {
        let mut all = watched;
        all.push(PollFd::new(self.signals.as_fd(), PollFlags::POLLIN));
        match poll(&mut all, PollTimeout::from(timeout)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(call("wait")(error)),
        }
        Ok(matches!(self.signals.read_signal(), Ok(Some(_))))
    }

    /// Waits until `step` has a result. `who` has to do something for that, in time.
    pub fn until<E: End, T>(
        &self,
        end: &mut E,
        (who, patience): (&str, Duration),
        mut step: impl FnMut(&mut E) -> io::Result<Option<T>>,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + patience;
        let not_asked = |why: String| Error::NotAsked {
            who: who.to_string(),
            why,
        };
        loop {
            match step(end) {
                Ok(Some(result)) => return Ok(result),
                Ok(None) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    return Err(not_asked("it has closed the connection".to_string()));
                }
                Err(error) => return Err(not_asked(api::plain(&error.to_string()))),
            }
            if Instant::now() > deadline {
                let seconds = patience.as_secs();
                return Err(not_asked(format!("it has been silent for {seconds} s")));
            }
            let watched = vec![PollFd::new(end.as_fd(), PollFlags::POLLIN)];
            if self.wait(watched, LOOK)? {
                return Err(Error::NotBegun);
            }
        }
    }

    /// Has a VMM make a connection the way of a machine, and says what of it has come already.
    pub fn upgrade(
        &self,
        socket: &mut Socket,
        who: &str,
        path: &str,
        body: &Value,
    ) -> Result<Vec<u8>, Error> {
        let request = api::request("PUT", path, &body.to_string());
        let mut request = request.as_bytes();
        let mut inbox = Vec::new();
        let (answer, size) = self.until(socket, (who, PATIENCE), |socket| {
            while !request.is_empty() {
                let count = socket.send(request)?;
                request = request.get(count..).unwrap_or_default();
            }
            let mut chunk = [0; 4096];
            match socket.receive(&mut chunk)? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                count => inbox.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            }
            match Answer::parse(&inbox)? {
                None if inbox.len() > MAX_ANSWER => Err(api::malformed()),
                answer => Ok(answer),
            }
        })?;
        match answer.status {
            101 => Ok(inbox.split_off(size.min(inbox.len()))),
            _ => Err(Error::Refused(who.to_string(), answer.words())),
        }
    }
}

//! The monitor's event loop, sealed: guest bytes in, guest bytes out.

mod guest;

use std::fs::File;
use std::io::{IsTerminal, Read, Stderr, Stdin, Stdout};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use casemate_init::protocol::{Decoder, Frame, MAX_PAYLOAD, STDIN_WINDOW, Sender, Spec};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::console::{Tail, neutralise};
use super::sink::{Flushed, Sink};
use super::wire::{self, ConsoleMode, Event, Order, Received, Setup};
use super::{Error, Streams};

/// Bytes read at a time.
const CHUNK: usize = 32 * 1024;
/// After the VMM's end, how long its streams may take to end too.
const DRAIN_BOUND: Duration = Duration::from_secs(2);

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The VMM ended, and everything was passed on.
    Finished,
    /// `run` is gone.
    Orphaned,
}

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Control,
    Listener,
    Guest,
    Console,
    ConsoleInput,
    Log,
    Stdin,
    Stdout,
    Stderr,
}

/// Where the conversation with init stands.
#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// Init has not said that it is ready.
    Booting,
    /// It is, and `run` has not said go.
    Waiting,
    /// The command runs.
    Running,
    /// It ended, or never ran, or the guest broke the protocol; or there is none, and a bare kernel runs.
    Over,
}

/// The VMM ended.
#[derive(Debug, Clone, Copy)]
struct Finish {
    show_log: bool,
    show_console: bool,
    /// When to stop waiting for the end of its streams.
    deadline: Instant,
}

/// Everything that the loop works with.
pub struct Session {
    streams: Streams,
    console_open: bool,
    log_open: bool,
    connection: Option<UnixStream>,
    decoder: Decoder,
    to_guest: Vec<u8>,
    phase: Phase,
    spec: Vec<u8>,
    /// Who a guest is from now on that goes on from a snapshot.
    identity: Vec<u8>,
    mode: ConsoleMode,
    neutral_stdout: bool,
    tail: Tail,
    log: Tail,
    stdin: Stdin,
    stdin_open: bool,
    /// Bytes of standard input that may be sent before the guest has taken some.
    window: usize,
    stdout: Sink<Stdout>,
    stderr: Sink<Stderr>,
    console_input: Option<Sink<File>>,
    finish: Option<Finish>,
}

impl Session {
    /// Prepares; the command is encoded here, before the seal, so that one that is too long is a plain error.
    pub fn new(mut streams: Streams, setup: &Setup) -> Result<Self, Error> {
        let spec = setup
            .spec
            .clone()
            .map(|spec: Spec| Frame::Spec(spec).to_bytes())
            .transpose()?;
        let identity = setup.identity.clone();
        let identity = identity.map(|identity| Frame::Identity(identity).to_bytes());
        let identity = identity.transpose()?;
        let prefix = setup.prefix.as_deref();
        let console_input = streams.console_input.take().map(Sink::new);
        Ok(Self {
            streams,
            console_open: true,
            log_open: true,
            connection: None,
            decoder: Decoder::new(Sender::Guest),
            to_guest: Vec::new(),
            phase: Phase::Booting,
            spec: spec.unwrap_or_default(),
            identity: identity.unwrap_or_default(),
            mode: setup.console,
            neutral_stdout: std::io::stdout().is_terminal(),
            tail: Tail::default(),
            log: Tail::default(),
            stdin: std::io::stdin(),
            stdin_open: true,
            window: STDIN_WINDOW,
            stdout: Sink::new(std::io::stdout()).with_prefix(prefix),
            stderr: Sink::new(std::io::stderr()).with_prefix(prefix),
            console_input,
            finish: None,
        })
    }

    /// The socket to `run`.
    pub fn control(&self) -> BorrowedFd<'_> {
        self.streams.control.as_fd()
    }

    /// Runs to the end.
    pub fn run(mut self) -> Result<End, Error> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let ready = self.wait()?;
            for token in ready {
                match token {
                    Token::Control => {
                        if !self.take_orders() {
                            return Ok(End::Orphaned);
                        }
                    }
                    Token::Listener => self.accept(),
                    Token::Guest => self.read_guest(&mut buffer),
                    Token::Console => self.read_console(&mut buffer),
                    Token::Log => self.read_log(&mut buffer),
                    Token::Stdin => self.read_stdin(&mut buffer),
                    Token::Stdout => {
                        if self.stdout.flush() == Flushed::Broke {
                            // As the kernel would do to a command on the host.
                            self.signal(Signal::SIGPIPE as u32);
                        }
                    }
                    Token::Stderr => drop(self.stderr.flush()),
                    Token::ConsoleInput => {
                        if let Some(input) = &mut self.console_input {
                            input.flush();
                        }
                    }
                }
            }
            self.write_guest();
            if self.is_finished() {
                return Ok(End::Finished);
            }
        }
    }

    /// Waits until something can be done, and says what.
    fn wait(&self) -> Result<Vec<Token>, Error> {
        let (input, output) = (PollFlags::POLLIN, PollFlags::POLLOUT);
        let mut wanted: Vec<(Token, BorrowedFd<'_>, PollFlags)> =
            vec![(Token::Control, self.control(), input)];
        let drained = self
            .finish
            .is_some_and(|finish| Instant::now() >= finish.deadline);
        if !drained {
            self.wait_for_inputs(&mut wanted);
        }
        if self.stdout.is_waiting() {
            wanted.push((Token::Stdout, self.stdout.fd(), output));
        }
        if self.stderr.is_waiting() {
            wanted.push((Token::Stderr, self.stderr.fd(), output));
        }
        let mut polled: Vec<PollFd<'_>> = wanted
            .iter()
            .map(|(_, fd, flags)| PollFd::new(*fd, *flags))
            .collect();
        let timeout = match self.finish {
            Some(finish) if !drained => {
                let left = finish.deadline.saturating_duration_since(Instant::now());
                PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO)
            }
            _ => PollTimeout::NONE,
        };
        match poll(&mut polled, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Vec::new()),
            Err(errno) => return Err(Error::Poll(errno)),
        }
        Ok(wanted
            .iter()
            .zip(&polled)
            .filter(|(_, polled)| polled.any().unwrap_or(false))
            .map(|((token, _, _), _)| *token)
            .collect())
    }

    fn wait_for_inputs<'a>(&'a self, wanted: &mut Vec<(Token, BorrowedFd<'a>, PollFlags)>) {
        let input = PollFlags::POLLIN;
        if let (Some(listener), None) = (&self.streams.listener, &self.finish) {
            wanted.push((Token::Listener, listener.as_fd(), input));
        }
        // Output waits in the guest, not here, while its reader is slow.
        let full = self.is_full();
        if let Some(connection) = &self.connection {
            let mut flags = PollFlags::empty();
            flags.set(input, !full);
            flags.set(PollFlags::POLLOUT, !self.to_guest.is_empty());
            if !flags.is_empty() {
                wanted.push((Token::Guest, connection.as_fd(), flags));
            }
        }
        // The console is always read but when it is the guest's output: a guest that prints must not wait for a terminal.
        if self.console_open && (self.mode != ConsoleMode::Stdio || !full) {
            wanted.push((Token::Console, self.streams.console.as_fd(), input));
        }
        if self.log_open {
            wanted.push((Token::Log, self.streams.log.as_fd(), input));
        }
        if let Some(console_input) = self.console_input.as_ref().filter(|sink| sink.is_waiting()) {
            wanted.push((Token::ConsoleInput, console_input.fd(), PollFlags::POLLOUT));
        }
        if self.stdin_open && self.finish.is_none() && self.wants_stdin() {
            wanted.push((Token::Stdin, self.stdin.as_fd(), input));
        }
    }

    /// True while output has to wait for its reader.
    fn is_full(&self) -> bool {
        self.stdout.is_full() || self.stderr.is_full()
    }

    fn wants_stdin(&self) -> bool {
        match &self.console_input {
            Some(console) => !console.is_full(),
            None => {
                self.phase == Phase::Running && self.window > 0 && self.to_guest.len() < MAX_PAYLOAD
            }
        }
    }

    /// False when `run` is gone.
    fn take_orders(&mut self) -> bool {
        loop {
            match wire::next_order(self.control()) {
                Received::Nothing => return true,
                Received::Closed => return false,
                Received::Packet(Order::Go) => {
                    if self.phase == Phase::Waiting {
                        self.phase = Phase::Running;
                        let spec = std::mem::take(&mut self.spec);
                        self.to_guest.extend_from_slice(&spec);
                    }
                }
                Received::Packet(Order::Signal(number)) => self.signal(number),
                Received::Packet(Order::Resize { rows, cols }) => {
                    if self.phase == Phase::Running {
                        self.send(&Frame::Resize { rows, cols });
                    }
                }
                Received::Packet(Order::Finish {
                    show_log,
                    show_console,
                }) => {
                    self.finish = Some(Finish {
                        show_log,
                        show_console,
                        deadline: Instant::now() + DRAIN_BOUND,
                    });
                }
            }
        }
    }

    fn signal(&mut self, number: u32) {
        if self.phase == Phase::Running {
            self.send(&Frame::Signal(number));
        }
    }

    fn send(&mut self, frame: &Frame) {
        // Only a command's description can be too long, and that was encoded at the start.
        let _ = frame.encode(&mut self.to_guest);
    }

    fn read_console(&mut self, buffer: &mut [u8]) {
        let length = match self.streams.console.read(buffer) {
            Ok(length) if length > 0 => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => return,
            _ => {
                self.console_open = false;
                return;
            }
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        self.tail.push(bytes);
        if self.mode == ConsoleMode::Stdio && self.phase == Phase::Booting {
            self.phase = Phase::Over;
            self.report(Event::Output);
        }
        match self.mode {
            ConsoleMode::Tail => {}
            ConsoleMode::Stderr => {
                if !self.stderr.is_full() {
                    let mut neutral = Vec::with_capacity(length);
                    neutralise(bytes, &mut neutral);
                    self.stderr.push(&neutral);
                }
            }
            ConsoleMode::Stdio if self.neutral_stdout => {
                let mut neutral = Vec::with_capacity(length);
                neutralise(bytes, &mut neutral);
                self.stdout.push(&neutral);
            }
            ConsoleMode::Stdio => self.stdout.push(bytes),
        }
    }

    fn read_log(&mut self, buffer: &mut [u8]) {
        match self.streams.log.read(buffer) {
            // Kept for when something fails: a command's standard error is to hold what the command wrote.
            Ok(length) if length > 0 && self.mode == ConsoleMode::Tail => {
                self.log.push(buffer.get(..length).unwrap_or_default());
            }
            Ok(length) if length > 0 => {
                if !self.stderr.is_full() {
                    let mut neutral = Vec::with_capacity(length);
                    neutralise(buffer.get(..length).unwrap_or_default(), &mut neutral);
                    self.stderr.push(&neutral);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            _ => self.log_open = false,
        }
    }

    fn read_stdin(&mut self, buffer: &mut [u8]) {
        let limit = if self.console_input.is_some() {
            CHUNK
        } else {
            self.window
        };
        let length = limit.min(buffer.len());
        let Some(buffer) = buffer.get_mut(..length) else {
            return;
        };
        match nix::unistd::read(&self.stdin, buffer) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Ok(0) | Err(_) => {
                self.stdin_open = false;
                if self.console_input.is_none() {
                    self.send(&Frame::StdinClose);
                }
            }
            Ok(length) => {
                let bytes = buffer.get(..length).unwrap_or_default();
                if let Some(console) = &mut self.console_input {
                    console.push(bytes);
                } else {
                    self.window = self.window.saturating_sub(length);
                    let frame = Frame::Stdin(bytes.to_vec());
                    self.send(&frame);
                }
            }
        }
    }

    /// After the VMM's end: true once all it left was passed on.
    fn is_finished(&mut self) -> bool {
        let Some(finish) = self.finish else {
            return false;
        };
        if self.is_full() {
            // A slow reader loses nothing: the time counts from when the rest can be taken in.
            let deadline = Instant::now() + DRAIN_BOUND;
            self.finish = Some(Finish { deadline, ..finish });
            return false;
        }
        let open = self.console_open || self.log_open || self.connection.is_some();
        if open && Instant::now() < finish.deadline {
            return false;
        }
        // Once; where they are shown as they come, nothing is left to show.
        self.finish = Some(Finish {
            show_log: false,
            show_console: false,
            ..finish
        });
        if self.mode == ConsoleMode::Tail {
            if finish.show_log {
                self.stderr.push(&self.log.lines());
            }
            let lines = self.tail.lines();
            if finish.show_console && !lines.is_empty() {
                self.stderr.push(b"--- end of the guest's console ---\n");
                self.stderr.push(&lines);
                self.stderr.push(b"---\n");
            }
        }
        self.stdout.end_line();
        self.stderr.end_line();
        !self.stdout.is_waiting() && !self.stderr.is_waiting()
    }
}

//! The command's streams, from its start to its last byte of output.
//!
//! One thread and one poll loop. Nothing in it blocks, so a signal from the host gets through while the command reads
//! no input, or the host takes no output; buffers are bounded, and what does not fit waits at its source.

use crate::command::{self, Child};
use crate::freezer::Freezer;
use crate::hardware::Hardware;
use crate::link::{Link, Moved};
use crate::protocol::{Exited, Frame, STDIN_WINDOW};
use crate::{Ended, Error, say};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// No more output is taken from the command while that much waits for the host, in bytes.
const OUTPUT_LIMIT: usize = 256 * 1024;
/// Bytes moved at a time; fits into a frame.
const CHUNK: usize = 32 * 1024;
/// How long a command has between an orderly power-off's SIGTERM and its SIGKILL.
const GRACE: Duration = Duration::from_secs(5);
/// How long output is still awaited when the command and everything else are dead: a process in an uninterruptible
/// sleep may hold a pipe open.
const DRAIN: Duration = Duration::from_secs(2);

/// The signals of PID 1, as a descriptor.
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks them in this thread and collects them from now on. Children start with nothing blocked.
    pub fn block() -> Result<Self, Error> {
        let set = SigSet::from_iter([Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM]);
        let signals = set.thread_block().and_then(|()| {
            SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        });
        signals
            .map(Self)
            .map_err(|errno| Error::other(format!("cannot collect signals: {errno}")))
    }
}

/// Until when to poll.
pub(crate) fn timeout(deadline: Option<Instant>) -> PollTimeout {
    let Some(deadline) = deadline else {
        return PollTimeout::NONE;
    };
    // Rounded up: a poll that ends a moment early would spin.
    let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
}

/// Serves the command until it has ended and all its output is on its way to the host.
///
/// `end_all` kills everything else in the guest once the command itself is gone, as when a container's first process ends.
/// Returns how it ended, or `None` when the host went away.
pub fn run(
    link: &mut Link<'_>,
    child: Child,
    signals: &Signals,
    hardware: &Hardware,
    freezer: Freezer,
    end_all: &dyn Fn(),
) -> Result<Ended, Error> {
    link.set_blocking(false)?;
    let pid = child.pid;
    let mut session = Session {
        link,
        freezer,
        child,
        output: Output::default(),
        input: VecDeque::new(),
        taken: 0,
        input_ends: false,
        ended: None,
        kill_at: None,
        drain_until: None,
        chunk: vec![0; CHUNK],
    };
    // What came together with the Spec.
    session.take_frames()?;
    let result = session.serve(signals, hardware, end_all);
    if !matches!(result, Ok(Some(_))) {
        let _ = signal_group(pid, Signal::SIGKILL as i32);
    }
    result
}

/// kill(2) for a process group with any signal number, real-time ones included.
#[allow(unsafe_code)] // nix only knows the classic signals.
fn signal_group(pid: Pid, number: i32) -> Result<(), Errno> {
    // SAFETY: kill takes two integers and touches no memory.
    Errno::result(unsafe { libc::kill(-pid.as_raw(), number) }).map(drop)
}

/// Takes one dead child, if there is one.
#[allow(unsafe_code)] // nix refuses the status of a process killed by a real-time signal, and it would be lost.
fn reap() -> Option<(Pid, Exited)> {
    let mut status = 0;
    // SAFETY: the status is a valid integer to write to, borrowed for the call.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    if pid <= 0 {
        return None;
    }
    let exited = if libc::WIFSIGNALED(status) {
        Exited::Signal(u8::try_from(libc::WTERMSIG(status)).unwrap_or(u8::MAX))
    } else {
        Exited::Code(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(u8::MAX))
    };
    Some((Pid::from_raw(pid), exited))
}

/// Encoded frames that the host has not taken.
#[derive(Default)]
struct Output {
    frames: VecDeque<Vec<u8>>,
    /// Bytes of the first that it has.
    sent: usize,
    /// Bytes of all.
    size: usize,
}

impl Output {
    fn push(&mut self, frame: Vec<u8>) {
        self.size = self.size.saturating_add(frame.len());
        self.frames.push_back(frame);
    }

    fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// What is to be sent next.
    fn front(&self) -> &[u8] {
        let first = self.frames.front().map(Vec::as_slice).unwrap_or_default();
        first.get(self.sent..).unwrap_or_default()
    }

    /// The host has taken so much of it.
    fn advance(&mut self, length: usize) {
        self.sent = self.sent.saturating_add(length);
        if self.front().is_empty() {
            self.drop_first();
        }
    }

    fn drop_first(&mut self) {
        let first = self.frames.pop_front().unwrap_or_default();
        self.size = self.size.saturating_sub(first.len());
        self.sent = 0;
    }

    /// Another host is there. A frame that was begun is the first one's, which has all of it.
    fn restart(&mut self) {
        if self.sent > 0 {
            self.drop_first();
        }
    }
}

struct Session<'a, 'b> {
    link: &'a mut Link<'b>,
    freezer: Freezer,
    child: Child,
    output: Output,
    /// Input that the command has not taken.
    input: VecDeque<u8>,
    /// Bytes of input taken and not yet reported.
    taken: usize,
    /// The host sent the end of the input.
    input_ends: bool,
    ended: Option<Exited>,
    kill_at: Option<Instant>,
    drain_until: Option<Instant>,
    chunk: Vec<u8>,
}

/// What a descriptor of the poll set is.
#[derive(Clone, Copy)]
enum Source {
    Host,
    Signals,
    Input,
    Output,
    ErrorOutput,
    Hardware(usize),
    Freezer,
}

impl Session<'_, '_> {
    fn serve(
        &mut self,
        signals: &Signals,
        hardware: &Hardware,
        end_all: &dyn Fn(),
    ) -> Result<Ended, Error> {
        loop {
            if let Some(exited) = self.ended {
                let drained = self.child.stdout.is_none() && self.child.stderr.is_none();
                let late = self
                    .drain_until
                    .is_some_and(|until| Instant::now() >= until);
                if (drained || late) && self.output.is_empty() {
                    return Ok(Some(exited));
                }
            }
            self.report_taken();
            if self.kill_at.is_some_and(|at| Instant::now() >= at) {
                self.kill_at = None;
                let _ = signal_group(self.child.pid, Signal::SIGKILL as i32);
            }
            for (source, events) in self.wait(signals, hardware)? {
                match source {
                    Source::Host => {
                        if !self.exchange(events)? {
                            return Ok(None);
                        }
                    }
                    Source::Signals => self.take_signals(signals, end_all),
                    Source::Input => self.pass_input(),
                    Source::Output => self.pass_output(false)?,
                    Source::ErrorOutput => self.pass_output(true)?,
                    Source::Freezer => self.freezer.take(),
                    Source::Hardware(index) => {
                        if hardware.take(index) {
                            self.power_off("power button");
                        }
                    }
                }
            }
        }
    }

    /// Waits for something to do.
    fn wait(
        &self,
        signals: &Signals,
        hardware: &Hardware,
    ) -> Result<Vec<(Source, PollFlags)>, Error> {
        let mut sources = Vec::with_capacity(8);
        let mut descriptors: Vec<PollFd> = Vec::with_capacity(8);
        let mut add = |source, descriptor, events| {
            sources.push(source);
            descriptors.push(PollFd::new(descriptor, events));
        };
        let mut host = PollFlags::empty();
        if self.input.len() <= STDIN_WINDOW {
            host |= PollFlags::POLLIN;
        }
        if !self.output.is_empty() {
            host |= PollFlags::POLLOUT;
        }
        add(Source::Host, self.link.stream.as_fd(), host);
        add(Source::Signals, signals.0.as_fd(), PollFlags::POLLIN);
        if let (Some(stdin), false) = (&self.child.stdin, self.input.is_empty() && !self.input_ends)
        {
            add(Source::Input, stdin.as_fd(), PollFlags::POLLOUT);
        }
        if self.output.size < OUTPUT_LIMIT {
            if let Some(stdout) = &self.child.stdout {
                add(Source::Output, stdout.as_fd(), PollFlags::POLLIN);
            }
            if let Some(stderr) = &self.child.stderr {
                add(Source::ErrorOutput, stderr.as_fd(), PollFlags::POLLIN);
            }
        }
        for (index, descriptor) in hardware.descriptors().enumerate() {
            add(Source::Hardware(index), descriptor, PollFlags::POLLIN);
        }
        if let Some(descriptor) = self.freezer.descriptor() {
            add(Source::Freezer, descriptor, PollFlags::POLLIN);
        }
        // While the host has something to take, it decides how long that lasts.
        let drain_until = self.drain_until.filter(|_| self.output.is_empty());
        let deadline = [self.kill_at, drain_until].into_iter().flatten().min();
        match poll(&mut descriptors, timeout(deadline)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                return Err(Error::other(format!(
                    "cannot wait for the command: {errno}"
                )));
            }
        }
        let events = descriptors
            .iter()
            .map(|descriptor| descriptor.revents().unwrap_or(PollFlags::empty()));
        Ok(sources
            .into_iter()
            .zip(events)
            .filter(|(_, events)| !events.is_empty())
            .collect())
    }

    /// Takes from the host and gives to it. False when it went away.
    fn exchange(&mut self, events: PollFlags) -> Result<bool, Error> {
        let mut moved = Moved::Nothing;
        if events.contains(PollFlags::POLLOUT) {
            moved = self.link.write(self.output.front());
            if let Moved::Bytes(length) = moved {
                self.output.advance(length);
                self.progress();
            }
        }
        if !matches!(moved, Moved::Bytes(_) | Moved::Nothing) {
            return self.rejoin(&moved);
        }
        if events.contains(PollFlags::POLLIN) {
            moved = self.link.read(&mut self.chunk);
            self.take_frames()?;
        } else if events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
            moved = self.link.error();
        }
        match moved {
            Moved::Bytes(_) | Moved::Nothing => Ok(true),
            other => self.rejoin(&other),
        }
    }

    /// The connection is no more. If this machine goes on from a snapshot, it becomes another one, before anything else of
    /// the command's goes on: what was held for the snapshot is so until then. False when the host went away.
    fn rejoin(&mut self, how: &Moved) -> Result<bool, Error> {
        if !matches!(how, Moved::Lost) {
            return Ok(false);
        }
        let rejoined = self.link.rejoin(true);
        if let Err(error) = rejoined {
            say(&error.message);
            return Ok(false);
        }
        self.link.set_blocking(false)?;
        self.freezer.let_go();
        self.output.restart();
        self.taken = 0;
        // What came together with the identity.
        self.take_frames()?;
        Ok(true)
    }

    fn take_frames(&mut self) -> Result<(), Error> {
        while let Some(frame) = self
            .link
            .decoder
            .next_frame()
            .map_err(|error| Error::other(format!("from the host: {error}")))?
        {
            match frame {
                Frame::Stdin(data) => self.input.extend(data),
                Frame::StdinClose => self.input_ends = true,
                Frame::Resize { rows, cols } => {
                    if let (true, Some(terminal)) = (self.child.tty, &self.child.stdout) {
                        command::resize(terminal, rows, cols);
                    }
                }
                Frame::Signal(number) => self.signal(number),
                _ => return Err(Error::other("from the host: a second command")),
            }
        }
        if self.child.stdin.is_none() {
            self.discard_input();
        }
        Ok(())
    }

    fn signal(&mut self, number: u32) {
        // Once the command is reaped its number may be another's.
        if self.ended.is_some() {
            return;
        }
        if let Err(errno) = i32::try_from(number)
            .map_err(|_| Errno::EINVAL)
            .and_then(|number| signal_group(self.child.pid, number))
        {
            say(&format!(
                "cannot send signal {number} to the command: {errno}"
            ));
        }
    }

    /// Ends the command in an orderly way, then firmly.
    fn power_off(&mut self, why: &str) {
        if self.kill_at.is_none() && self.ended.is_none() {
            say(&format!("{why}: ending the command"));
            self.signal(Signal::SIGTERM as u32);
            self.kill_at = Some(Instant::now() + GRACE);
        }
    }

    fn take_signals(&mut self, signals: &Signals, end_all: &dyn Fn()) {
        while let Ok(Some(info)) = signals.0.read_signal() {
            match Signal::try_from(info.ssi_signo.cast_signed()) {
                Ok(Signal::SIGINT) => self.power_off("Ctrl-Alt-Delete"),
                Ok(Signal::SIGTERM) => self.power_off("SIGTERM"),
                _ => {}
            }
        }
        // PID 1 reaps every orphan; one SIGCHLD may stand for many.
        while let Some((pid, exited)) = reap() {
            if pid == self.child.pid && self.ended.is_none() {
                self.ended = Some(exited);
                self.kill_at = None;
                self.drain_until = Some(Instant::now() + DRAIN);
                end_all();
            }
        }
    }

    /// Input to the command.
    fn pass_input(&mut self) {
        let Some(stdin) = &self.child.stdin else {
            return;
        };
        let (front, _) = self.input.as_slices();
        let taken = if front.is_empty() {
            Ok(0)
        } else {
            nix::unistd::write(stdin, front)
        };
        match taken {
            Ok(length) => {
                self.input.drain(..length);
                self.taken = self.taken.saturating_add(length);
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Err(_) => {
                self.child.stdin = None;
                self.discard_input();
                return;
            }
        }
        if self.input.is_empty() && self.input_ends {
            if self.child.tty {
                // The terminal stays; its reader sees the end of its input (VEOF, termios(3)).
                let _ = nix::unistd::write(stdin, &[4]);
            }
            self.child.stdin = None;
        }
    }

    /// Input for a command that takes none any more.
    fn discard_input(&mut self) {
        self.taken = self.taken.saturating_add(self.input.len());
        self.input.clear();
    }

    /// One report for all that was taken since the last, so that reports never pile up.
    fn report_taken(&mut self) {
        if self.taken > 0 && self.output.size < OUTPUT_LIMIT {
            let frame = Frame::StdinTaken(u32::try_from(self.taken).unwrap_or(u32::MAX));
            self.taken = 0;
            self.queue(&frame);
        }
    }

    /// Output still moves: what is left of it gets its time again.
    fn progress(&mut self) {
        if self.drain_until.is_some() {
            self.drain_until = Some(Instant::now() + DRAIN);
        }
    }

    /// Output of the command, one chunk at a time so that both streams get their turn.
    fn pass_output(&mut self, error_output: bool) -> Result<(), Error> {
        let stream = if error_output {
            &mut self.child.stderr
        } else {
            &mut self.child.stdout
        };
        let Some(descriptor) = stream else {
            return Ok(());
        };
        match nix::unistd::read(&*descriptor, &mut self.chunk) {
            Ok(length @ 1..) => {
                let data = self.chunk.get(..length).unwrap_or_default().to_vec();
                self.queue(&if error_output {
                    Frame::Stderr(data)
                } else {
                    Frame::Stdout(data)
                });
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // The end; a terminal's is EIO, once nobody has its other side open.
            Ok(_) | Err(_) => *stream = None,
        }
        Ok(())
    }

    fn queue(&mut self, frame: &Frame) {
        match frame.to_bytes() {
            Ok(bytes) => self.output.push(bytes),
            Err(error) => say(&error.to_string()),
        }
    }
}

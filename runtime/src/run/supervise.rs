//! Watching a run: signals, times, the monitor's events, and the ends of both processes.

mod conclude;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use casemate_broker::exit;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::Error;
use super::children::Children;
use super::plan::Plan;
use super::terminal::{self, RawMode};
use crate::inspect;
use crate::monitor::wire::{self, Event, Order, Received};
use crate::say::warn as say;
use crate::state::Machine;
use crate::state::process::signal_pid;

/// Exit code when casemate itself failed.
pub const FAILED: u8 = 125;
/// Exit code after `--timeout`.
pub const TIMED_OUT: u8 = 124;
/// After the VMM was asked to end at once, how long until it is killed.
const FIRM_BOUND: Duration = Duration::from_secs(3);
/// Events of the monitor that are taken before anything else is looked at. In a whole run there are but a few.
const EVENTS_A_TURN: u32 = 16;
/// Signals that are read from a descriptor.
const HELD: [Signal; 6] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGWINCH,
    Signal::SIGCHLD,
];

/// Blocks the signals that are handled here, and opens the descriptor that they come from.
pub fn hold_signals() -> Result<SignalFd, Error> {
    let mut set = SigSet::empty();
    for signal in HELD {
        set.add(signal);
    }
    set.thread_block().map_err(Error::errno("hold signals"))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(Error::errno("open a signal descriptor"))
}

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// `--timeout`.
    pub timeout: Option<Duration>,
    /// `--stop-grace`.
    pub stop_grace: Duration,
    /// `--boot-timeout`; none for a bare kernel.
    pub boot_timeout: Option<Duration>,
}

/// How far the machine's end has been driven. Each step is firmer than the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stop {
    /// Not at all.
    No,
    /// The command got the signal, or has ended and the guest is to power off.
    Asked,
    /// The guest's power button was pressed.
    Button,
    /// The VMM was told to end at once.
    Firm,
    /// Everything was killed.
    Killed,
}

/// Why the end was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    Signal(Signal),
    Timeout,
    BootTimeout,
    Broken,
    MonitorLost,
}

/// What came of a run.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// The exit code.
    pub code: u8,
    /// Every process of the machine is known to have ended.
    pub all_ended: bool,
}

/// The state of a run.
pub struct Supervisor {
    children: Children,
    signals: SignalFd,
    limits: Limits,
    started: Instant,
    bare: bool,
    tty: bool,
    report: Option<PathBuf>,
    report_error: Option<inspect::Error>,
    id: String,
    uid: u32,
    raw: Option<RawMode>,
    ready: bool,
    result: Option<Event>,
    stop: Stop,
    reason: Option<Reason>,
    stop_deadline: Option<Instant>,
    jailer_status: Option<ExitStatus>,
    jailer_ended: Option<Instant>,
    drained: bool,
    monitor_status: Option<ExitStatus>,
    control_open: bool,
}

impl Supervisor {
    /// Takes over both processes.
    pub fn new(
        children: Children,
        signals: SignalFd,
        limits: Limits,
        plan: &Plan,
        report: Option<PathBuf>,
        machine: &Machine,
    ) -> Self {
        Self {
            children,
            signals,
            limits,
            started: Instant::now(),
            bare: plan.spec.is_none(),
            tty: plan.spec.as_ref().is_some_and(|spec| spec.tty),
            report,
            report_error: None,
            id: machine.id().to_string(),
            uid: machine.uid(),
            raw: None,
            ready: false,
            result: None,
            stop: Stop::No,
            reason: None,
            stop_deadline: None,
            jailer_status: None,
            jailer_ended: None,
            drained: false,
            monitor_status: None,
            control_open: true,
        }
    }

    /// Watches until both processes have ended.
    pub fn run(mut self) -> Result<Outcome, Error> {
        while self.jailer_status.is_none() || self.monitor_status.is_none() {
            self.wait()?;
            self.take_signals();
            self.take_events();
            self.reap()?;
            self.check_times();
        }
        self.take_events();
        self.children.set_ended();
        // Before our own last words, which should stand in a terminal as it was.
        self.raw = None;
        if let Some(error) = self.report_error.take() {
            say(format!("--confinement-report: {error}"));
        }
        Ok(Outcome {
            code: self.conclude(),
            all_ended: self.stop < Stop::Killed && conclude::all_ended(self.jailer_status),
        })
    }

    fn wait(&self) -> Result<(), Error> {
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        if self.control_open {
            fds.push(PollFd::new(
                self.children.control.as_fd(),
                PollFlags::POLLIN,
            ));
        }
        let timeout = match self.next_deadline() {
            None => PollTimeout::NONE,
            Some(deadline) => {
                // Rounded up, or the loop would spin for the last fraction of a millisecond.
                let left =
                    deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(Error::errno("wait for events")(errno)),
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let timeout = self
            .limits
            .timeout
            .filter(|_| self.may_time_out())
            .map(|limit| self.started + limit);
        let boot = self
            .limits
            .boot_timeout
            .filter(|_| self.is_booting())
            .map(|limit| self.started + limit);
        [timeout, boot, self.drain_deadline(), self.stop_deadline]
            .into_iter()
            .flatten()
            .min()
    }

    /// The command runs, and nothing has been done about it.
    fn may_time_out(&self) -> bool {
        self.reason.is_none() && self.result.is_none() && self.jailer_status.is_none()
    }

    /// Until when the monitor may wait for a reader of the last output: with --timeout not for ever.
    fn drain_deadline(&self) -> Option<Instant> {
        let (timeout, ended) = (self.limits.timeout?, self.jailer_ended?);
        (!self.drained).then(|| (self.started + timeout).max(ended + FIRM_BOUND))
    }

    fn is_booting(&self) -> bool {
        !self.ready
            && self.result.is_none()
            && self.reason.is_none()
            && self.jailer_status.is_none()
    }

    fn take_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            match Signal::try_from(number) {
                Ok(Signal::SIGCHLD) | Err(_) => {}
                Ok(Signal::SIGWINCH) => {
                    if self.tty {
                        let (rows, cols) = terminal::size();
                        self.order(Order::Resize { rows, cols });
                    }
                }
                Ok(signal) => self.stop_for(Reason::Signal(signal)),
            }
        }
    }

    /// Begins to end the machine, or goes on to the firm end when that has begun already.
    fn stop_for(&mut self, reason: Reason) {
        if self.jailer_status.is_some() {
            // Only the monitor is left, waiting for a reader of the command's output: whoever asks twice means it.
            if self.reason.replace(reason).is_some() {
                signal_pid(self.children.monitor.id(), Signal::SIGKILL);
            }
            return;
        }
        if self.reason.is_some() {
            self.advance(Stop::Firm);
            return;
        }
        self.reason = Some(reason);
        let signal = match reason {
            Reason::Signal(signal) => signal,
            Reason::Timeout => Signal::SIGTERM,
            Reason::BootTimeout | Reason::MonitorLost => return self.advance(Stop::Firm),
            Reason::Broken => return self.advance(Stop::Button),
        };
        if self.ready && self.result.is_none() {
            self.order(Order::Signal(signal as u32));
            self.advance(Stop::Asked);
        } else {
            self.advance(Stop::Button);
        }
    }

    /// Drives the end as far as `to`, if it is not there already.
    fn advance(&mut self, to: Stop) {
        if to <= self.stop || self.jailer_status.is_some() {
            return;
        }
        let jailer = self.children.jailer.id();
        let bound = match to {
            Stop::No => return,
            Stop::Asked => self.limits.stop_grace,
            Stop::Button => {
                signal_pid(jailer, Signal::SIGTERM);
                self.limits.stop_grace.min(FIRM_BOUND)
            }
            Stop::Firm => {
                // The first presses the power button, the second ends the VMM at once.
                if self.stop < Stop::Button {
                    signal_pid(jailer, Signal::SIGTERM);
                }
                signal_pid(jailer, Signal::SIGINT);
                FIRM_BOUND
            }
            Stop::Killed => {
                signal_pid(jailer, Signal::SIGKILL);
                FIRM_BOUND
            }
        };
        self.stop = to;
        self.stop_deadline = Some(Instant::now() + bound);
    }

    fn check_times(&mut self) {
        let now = Instant::now();
        let passed = |limit: Option<Duration>, since: Instant| {
            limit.is_some_and(|limit| now >= since + limit)
        };
        if self.may_time_out() && passed(self.limits.timeout, self.started) {
            self.stop_for(Reason::Timeout);
        }
        if self
            .drain_deadline()
            .is_some_and(|deadline| now >= deadline)
        {
            self.drained = true;
            self.reason.get_or_insert(Reason::Timeout);
            if self.monitor_status.is_none() {
                signal_pid(self.children.monitor.id(), Signal::SIGKILL);
            }
        }
        if self.is_booting() && passed(self.limits.boot_timeout, self.started) {
            self.stop_for(Reason::BootTimeout);
        }
        if self.stop_deadline.is_some_and(|deadline| now >= deadline) {
            self.stop_deadline = None;
            match self.stop {
                Stop::No | Stop::Killed => {}
                Stop::Asked => self.advance(Stop::Button),
                Stop::Button => self.advance(Stop::Firm),
                Stop::Firm => self.advance(Stop::Killed),
            }
        }
    }

    fn take_events(&mut self) {
        // Not more at once: signals and times must have their turn, whatever a monitor that was taken over sends.
        for _ in 0..EVENTS_A_TURN {
            if !self.control_open {
                return;
            }
            match wire::next_event(self.children.control.as_fd()) {
                Received::Nothing => return,
                Received::Closed => self.control_open = false,
                Received::Packet(Event::Sealed) => {}
                Received::Packet(Event::Output) => self.write_report(),
                Received::Packet(Event::Ready) => self.on_ready(),
                Received::Packet(result) => {
                    // One result; whatever the monitor says later changes nothing.
                    if self.result.is_none() {
                        self.result = Some(result);
                        if result == Event::Broken {
                            self.stop_for(Reason::Broken);
                        } else {
                            self.advance(Stop::Asked);
                        }
                    }
                }
            }
        }
    }

    fn on_ready(&mut self) {
        if self.ready {
            return;
        }
        self.ready = true;
        self.write_report();
        if self.tty {
            self.raw = RawMode::enter();
        }
        self.order(Order::Go);
        if self.tty {
            // Of one that goes on from a snapshot: it has the size that another terminal had.
            let (rows, cols) = terminal::size();
            self.order(Order::Resize { rows, cols });
        }
    }

    /// The machine is sealed and the command waits, so this is what confines the command.
    fn write_report(&mut self) {
        let Some(path) = self.report.take() else {
            return;
        };
        let write = || -> Result<(), inspect::Error> {
            let report = inspect::Report::collect(&self.id, self.uid, self.children.jailer.id())?;
            let text = report.to_string();
            let failed = |source| inspect::Error::Write {
                path: path.clone(),
                source,
            };
            if path == Path::new("-") {
                std::io::stderr().write_all(text.as_bytes()).map_err(failed)
            } else {
                File::create(&path)
                    .and_then(|mut file| file.write_all(text.as_bytes()))
                    .map_err(failed)
            }
        };
        self.report_error = write().err();
    }

    fn order(&self, order: Order) {
        if self.control_open {
            wire::order(self.children.control.as_fd(), order);
        }
    }

    fn reap(&mut self) -> Result<(), Error> {
        if self.jailer_status.is_none()
            && let Some(status) = self
                .children
                .jailer
                .try_wait()
                .map_err(Error::system("wait for the jailer"))?
        {
            self.jailer_status = Some(status);
            self.jailer_ended = Some(Instant::now());
            self.stop_deadline = None;
            // Results that were reported before must count before the tail is asked for.
            self.take_events();
            let show_log = self.result.is_none_or(|result| result == Event::Broken);
            let show_console = show_log && !self.was_refused();
            self.order(Order::Finish {
                show_log,
                show_console,
            });
        }
        if self.monitor_status.is_none()
            && let Some(status) = self
                .children
                .monitor
                .try_wait()
                .map_err(Error::system("wait for the monitor"))?
        {
            self.monitor_status = Some(status);
            if self.jailer_status.is_none() {
                self.stop_for(Reason::MonitorLost);
            }
        }
        Ok(())
    }

    /// The jailer or the VMM refused its input: its message says all.
    fn was_refused(&self) -> bool {
        let code = self.jailer_status.and_then(|status| status.code());
        code == Some(exit::BAD_INPUT.into()) || code == Some(exit::JAIL_FAILED.into())
    }
}

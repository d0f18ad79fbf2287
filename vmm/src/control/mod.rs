//! The control thread: the process's main thread. It builds the machine, then waits for its end,
//! for signals, for input to the console, and for clients of the API.

pub mod api;
mod console;
pub mod observe;

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use log::info;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::ending::End;
use crate::machine::{Machine, Panel, RunningMachine};
use crate::metrics::Reporter;
use crate::resources::Source;
use api::Api;
use console::Input;

/// How long a guest may take to shut down after its power button was pressed.
pub const GRACE: Duration = Duration::from_secs(5);
/// How soon input is offered again to a port that a vCPU was using.
const RETRY: Duration = Duration::from_millis(10);

/// Why the control thread cannot control.
#[derive(Debug, Error)]
#[error("control thread: cannot {action}: {source}")]
pub struct Error {
    action: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error {
        action,
        source: error.into(),
    }
}

/// What woke the control thread.
#[derive(Clone, Copy)]
enum Token {
    End,
    Signal,
    Room,
    Stdin,
    Ejected,
    DeviceEjected,
    ConsoleRoom,
    Moving,
}

impl Token {
    const ALL: [Self; 8] = [
        Self::End,
        Self::Signal,
        Self::Room,
        Self::Stdin,
        Self::Ejected,
        Self::DeviceEjected,
        Self::ConsoleRoom,
        Self::Moving,
    ];
}

/// The control thread's loop, made while descriptors may still be made.
pub struct Control {
    epoll: Epoll,
    signals: SignalFd,
    input: Input,
    /// When the machine is ended by force.
    deadline: Option<Instant>,
    /// Whether the first signal presses the power button. Clients that start a machine by a request have one for
    /// that (`SendCtrlAltDel`), and expect a signal to end the VMM.
    button_first: bool,
    metrics: Reporter,
}

impl Control {
    /// Prepares the loop: SIGTERM, SIGINT and SIGWINCH become readable, in this thread and all that it starts, and
    /// a terminal on standard input becomes raw, but for its interrupt key.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new(metrics: Reporter) -> Result<Self, Error> {
        let mut awaited = SigSet::empty();
        awaited.add(Signal::SIGTERM);
        awaited.add(Signal::SIGINT);
        awaited.add(Signal::SIGWINCH);
        let mut blocked = awaited;
        // What grows a file past RLIMIT_FSIZE gets EFBIG: a guest that writes to its disk or its console
        // does not thereby end the process.
        blocked.add(Signal::SIGXFSZ);
        // A job in the background fails to use its terminal instead of being stopped by it.
        blocked.add(Signal::SIGTTIN);
        blocked.add(Signal::SIGTTOU);
        blocked.thread_block().map_err(failed("block signals"))?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&awaited, flags);
        Ok(Self {
            epoll: Epoll::new().map_err(failed("make an event loop"))?,
            signals: signals.map_err(failed("make a signalfd"))?,
            input: Input::new(),
            deadline: None,
            button_first: true,
            metrics,
        })
    }

    /// Starts `machine` and returns how it ended.
    ///
    /// # Errors
    /// When the machine cannot be started; nothing of the guest has run then.
    pub fn run(mut self, machine: Machine) -> Result<End, crate::Error> {
        let machine = machine.start()?;
        self.watch(&self.signals, Token::Signal)?;
        self.run_started(machine, None)
    }

    /// Serves the API: a machine is configured and started by its clients, or started at once from
    /// `options.config`, and then changed by them. Returns how it ended.
    ///
    /// # Errors
    /// When the API cannot be served, or the machine not be started and not be mended.
    pub fn serve(
        mut self,
        options: api::Options,
        source: Source,
        start_now: bool,
    ) -> Result<End, crate::Error> {
        let api = Api::new(options, source, &self.epoll);
        let mut api = api.map_err(failed("serve the API"))?;
        self.watch(&self.signals, Token::Signal)?;
        let machine = if start_now {
            api.start()?
        } else {
            self.button_first = false;
            match self.configure(&mut api)? {
                Some(machine) => machine,
                None => return Ok(End::ByHost),
            }
        };
        self.run_started(machine, Some(api))
    }

    /// Serves the API until a client has started the machine. None if a signal comes before.
    fn configure(&mut self, api: &mut Api) -> Result<Option<RunningMachine>, crate::Error> {
        let mut events = [EpollEvent::default(); 8];
        loop {
            let timeout = milliseconds(earliest([api.due(), self.metrics.due()]));
            let count = self.wait(timeout, &mut events)?;
            for event in events.iter().take(count) {
                let (token, events) = (event.data(), event.event_set());
                if !api.on_event(token, events, &self.epoll)
                    && token == Token::Signal as u64
                    && self.is_told_to_end()?
                {
                    return Ok(None);
                }
            }
            self.metrics.tick(Instant::now());
            if let Some(machine) = api.turn_before(&mut self.metrics, &self.epoll)? {
                return Ok(Some(machine));
            }
        }
    }

    fn run_started(
        &mut self,
        mut machine: RunningMachine,
        api: Option<Api>,
    ) -> Result<End, crate::Error> {
        let panel = &machine.panel;
        self.metrics.add(panel.metrics.iter().cloned());
        self.watch(panel.ends.event(), Token::End)?;
        self.watch(panel.serial.room(), Token::Room)?;
        if let Some(vcpus) = &panel.vcpus {
            self.watch(vcpus.ejected(), Token::Ejected)?;
        }
        if let Some(hotplug) = &machine.hotplug {
            self.watch(hotplug.registers().ejected(), Token::DeviceEjected)?;
        }
        if let Some(way) = machine.way() {
            self.watch(way.news(), Token::Moving)?;
        }
        if let Some(console) = &panel.console {
            self.watch(console.port.room(), Token::ConsoleRoom)?;
            console.port.resize(console::terminal_size());
        }
        if api.as_ref().is_none_or(Api::starts_running) {
            machine.resume();
        }
        let end = match self.wait_for_end(&mut machine, api) {
            Ok(end) => end,
            Err(error) => End::Failed(error.to_string()),
        };
        if let Some(console) = &machine.panel.console {
            console.output.finish();
        }
        // The last line says what happened since the one before. The end does not wait for its reader.
        let _ = self.metrics.flush();
        // Dropping the machine would wait for its threads: the caller exits instead.
        std::mem::forget(machine);
        Ok(end)
    }

    fn wait(&self, timeout: i32, events: &mut [EpollEvent]) -> Result<usize, Error> {
        match self.epoll.wait(timeout, events) {
            Ok(count) => Ok(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(error) => Err(failed("wait for events")(error)),
        }
    }

    fn watch(&self, fd: &impl AsRawFd, token: Token) -> Result<(), Error> {
        let event = EpollEvent::new(EventSet::IN, token as u64);
        self.epoll
            .ctl(ControlOperation::Add, fd.as_raw_fd(), event)
            .map_err(failed("watch a descriptor"))
    }

    fn wait_for_end(
        &mut self,
        machine: &mut RunningMachine,
        mut api: Option<Api>,
    ) -> Result<End, Error> {
        let mut events = [EpollEvent::default(); 8];
        loop {
            let panel = &machine.panel;
            let offer = |input: &[u8]| match &panel.console {
                Some(console) if console.port.is_running() => console.port.offer(input),
                _ => panel.serial.offer(input),
            };
            let busy = self.input.pump(offer, &self.epoll, Token::Stdin as u64);
            let timeout = self.timeout(busy, api.as_ref());
            let count = self.wait(timeout, &mut events)?;
            let (mut ejected, mut device_ejected) = (false, false);
            for event in events.iter().take(count) {
                if let Some(api) = &mut api
                    && api.on_event(event.data(), event.event_set(), &self.epoll)
                {
                    continue;
                }
                let token = Token::ALL
                    .iter()
                    .find(|token| **token as u64 == event.data());
                match token {
                    Some(Token::Signal) => self.on_signal(panel)?,
                    Some(Token::Room) => {
                        // Only a wake-up; what it is for is done at the top.
                        let _ = panel.serial.room().read();
                    }
                    Some(Token::ConsoleRoom) => {
                        if let Some(console) = &panel.console {
                            let _ = console.port.room().read();
                        }
                    }
                    Some(Token::Stdin) => self.input.read(&self.epoll),
                    Some(Token::Ejected) => ejected = true,
                    Some(Token::DeviceEjected) => device_ejected = true,
                    // What it is for is done at the end of the turn.
                    Some(Token::End | Token::Moving) | None => {}
                }
            }
            self.metrics.tick(Instant::now());
            // A guest that ended by itself has the last word.
            if let Some(end) = panel.ends.announced() {
                let end = panel.explain(end);
                if let (Some(api), true) = (&mut api, end.is_by_guest()) {
                    api.at_end(machine);
                }
                return Ok(end);
            }
            if self.deadline.is_some_and(|at| at <= Instant::now()) {
                return Ok(End::ByHost);
            }
            if ejected {
                machine.park_ejected_vcpus();
            }
            if device_ejected {
                for name in machine.take_ejected_devices() {
                    info!("the guest has let go of {name}: it is gone");
                    if let Some((group, id)) = name.counted_as() {
                        self.metrics.retire(group, id);
                    }
                    if let Some(api) = &mut api {
                        api.forget(&name);
                    }
                }
            }
            if let Some(api) = &mut api {
                api.turn(machine, &mut self.metrics, &self.epoll);
            }
        }
    }

    fn timeout(&self, busy: bool, api: Option<&Api>) -> i32 {
        let retry = busy.then(|| Instant::now().checked_add(RETRY)).flatten();
        let api = api.and_then(Api::due);
        milliseconds(earliest([self.deadline, self.metrics.due(), retry, api]))
    }

    /// Before the start every signal ends the VMM, but for a terminal's new size.
    fn is_told_to_end(&mut self) -> Result<bool, Error> {
        let next = self.signals.read_signal();
        let next = next.map_err(failed("read a signal"))?;
        Ok(next
            .is_some_and(|signal| i32::try_from(signal.ssi_signo) != Ok(Signal::SIGWINCH as i32)))
    }

    /// The first signal presses the power button, the second ends the machine; the first does where the machine
    /// was started by a request. A terminal of another size is no reason for either.
    fn on_signal(&mut self, panel: &Panel) -> Result<(), Error> {
        while let Some(signal) = self
            .signals
            .read_signal()
            .map_err(failed("read a signal"))?
        {
            if i32::try_from(signal.ssi_signo) == Ok(Signal::SIGWINCH as i32) {
                if let Some(console) = &panel.console {
                    console.port.resize(console::terminal_size());
                }
                continue;
            }
            let now = Instant::now();
            // Act first: a log that nobody reads must not keep the machine from its end.
            if self.deadline.is_none() && self.button_first {
                panel.acpi.press_power_button();
                self.deadline = Some(now.checked_add(GRACE).unwrap_or(now));
                info!(
                    "signal {}: pressed the power button, ending the guest in {GRACE:?} or at the next signal",
                    signal.ssi_signo
                );
            } else {
                self.deadline = Some(now);
                info!("signal {}: ending the guest", signal.ssi_signo);
            }
        }
        Ok(())
    }

    /// Puts back what [`Control::new`] and the console changed of the terminal.
    pub fn restore_terminal() {
        console::restore_terminal();
    }
}

fn earliest<const COUNT: usize>(times: [Option<Instant>; COUNT]) -> Option<Instant> {
    times.into_iter().flatten().min()
}

/// Until then, for epoll: milliseconds, or -1 for ever.
fn milliseconds(until: Option<Instant>) -> i32 {
    until.map_or(-1, |until| {
        let left = until.saturating_duration_since(Instant::now());
        // Rounded up, so that the time has come when it wakes.
        let left = left.as_micros().div_ceil(1000);
        i32::try_from(left).unwrap_or(i32::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::resource::{Resource, setrlimit};
    use std::os::unix::fs::FileExt as _;

    #[test]
    fn a_file_that_may_not_grow_does_not_end_the_process() {
        if !crate::testing::alone(
            "control::tests::a_file_that_may_not_grow_does_not_end_the_process",
        ) {
            return;
        }
        let _control = Control::new(Reporter::new(crate::logging::metrics())).unwrap();
        setrlimit(Resource::RLIMIT_FSIZE, 4096, 4096).unwrap();
        let disk = tempfile::tempfile().unwrap();
        let write = move || disk.write_at(&[1; 512], 8192).unwrap_err().raw_os_error();
        let device_thread = std::thread::spawn(write);
        assert_eq!(device_thread.join().unwrap(), Some(libc::EFBIG));
    }
}

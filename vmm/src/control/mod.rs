//! The control thread: the process's main thread. It builds the machine, then waits for its end,
//! for signals, and for input to the console.

mod console;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::info;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::ending::End;
use crate::machine::{Machine, Panel, RunningMachine, explain};
use crate::metrics::Reporter;
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
}

impl Token {
    const ALL: [Self; 7] = [
        Self::End,
        Self::Signal,
        Self::Room,
        Self::Stdin,
        Self::Ejected,
        Self::DeviceEjected,
        Self::ConsoleRoom,
    ];
}

/// The control thread's loop, made while descriptors may still be made.
pub struct Control {
    epoll: Epoll,
    signals: SignalFd,
    input: Input,
    /// When the machine is ended by force.
    deadline: Option<Instant>,
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
            metrics,
        })
    }

    /// Starts `machine` and returns how it ended.
    ///
    /// # Errors
    /// When the machine cannot be started; nothing of the guest has run then.
    pub fn run(mut self, machine: Machine) -> Result<End, crate::Error> {
        let mut machine = machine.start()?;
        let panel = &machine.panel;
        self.metrics.add(panel.metrics.iter().cloned());
        self.watch(panel.ends.event(), Token::End)?;
        self.watch(&self.signals, Token::Signal)?;
        self.watch(panel.serial.room(), Token::Room)?;
        if let Some(vcpus) = &panel.vcpus {
            self.watch(vcpus.ejected(), Token::Ejected)?;
        }
        if let Some(hotplug) = &machine.hotplug {
            self.watch(hotplug.registers().ejected(), Token::DeviceEjected)?;
        }
        if let Some(console) = &panel.console {
            self.watch(console.port.room(), Token::ConsoleRoom)?;
            console.port.resize(console::terminal_size());
        }
        machine.resume();
        let end = match self.wait_for_end(&mut machine) {
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

    fn watch(&self, fd: &impl AsRawFd, token: Token) -> Result<(), Error> {
        let event = EpollEvent::new(EventSet::IN, token as u64);
        self.epoll
            .ctl(ControlOperation::Add, fd.as_raw_fd(), event)
            .map_err(failed("watch a descriptor"))
    }

    fn wait_for_end(&mut self, machine: &mut RunningMachine) -> Result<End, Error> {
        let mut events = [EpollEvent::default(); 4];
        loop {
            let panel = &machine.panel;
            let offer = |input: &[u8]| match &panel.console {
                Some(console) if console.port.is_running() => console.port.offer(input),
                _ => panel.serial.offer(input),
            };
            let busy = self.input.pump(offer, &self.epoll, Token::Stdin as u64);
            let count = match self.epoll.wait(self.timeout(busy), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(failed("wait for events")(error)),
            };
            let (mut ejected, mut device_ejected) = (false, false);
            for event in events.iter().take(count) {
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
                    Some(Token::End) | None => {}
                }
            }
            self.metrics.tick(Instant::now());
            // A guest that ended by itself has the last word.
            if let Some(end) = panel.ends.announced() {
                return Ok(explain(end, panel.pmem.iter().map(Arc::as_ref)));
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
                }
            }
        }
    }

    /// For epoll: milliseconds, or -1 for ever.
    fn timeout(&self, busy: bool) -> i32 {
        let first = [self.deadline, self.metrics.due()]
            .into_iter()
            .flatten()
            .min();
        let left = first.map(|at| {
            // Rounded up, so that the deadline has passed when it wakes.
            at.saturating_duration_since(Instant::now())
                .saturating_add(Duration::from_millis(1))
        });
        let left = if busy {
            Some(left.map_or(RETRY, |left| left.min(RETRY)))
        } else {
            left
        };
        left.map_or(-1, |left| {
            i32::try_from(left.as_millis()).unwrap_or(i32::MAX)
        })
    }

    /// The first signal presses the power button, the second ends the machine. A terminal of another size
    /// is no reason for either.
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
            if self.deadline.is_none() {
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

//! The thread that runs one vCPU: paused, running, exited.

use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;
use std::time::Instant;

use thiserror::Error;
use vmm_sys_util::signal::Killable;

use crate::bus::Bus;
use crate::ending::{End, EndSignal};
use crate::kvm::{Access, Exit, Vcpu, kick_signal};
use crate::metrics::fields::VcpuMetrics;

/// Why a vCPU thread could not be started.
#[derive(Debug, Error)]
#[error("cannot start the thread of vCPU {id}: {source}")]
pub struct Error {
    id: u8,
    source: std::io::Error,
}

/// What a guest's accesses reach.
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Guest-physical addresses without memory.
    pub mmio: Bus,
    /// Counts them.
    pub metrics: Arc<VcpuMetrics>,
}

impl Access for Buses {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        let start = Instant::now();
        self.ports.read(u64::from(port), data);
        self.metrics.exit_io_in.inc();
        self.metrics.exit_io_in_agg.record(start);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        let start = Instant::now();
        self.ports.write(u64::from(port), data);
        self.metrics.exit_io_out.inc();
        self.metrics.exit_io_out_agg.record(start);
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        let start = Instant::now();
        self.mmio.read(address, data);
        self.metrics.exit_mmio_read.inc();
        self.metrics.exit_mmio_read_agg.record(start);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        let start = Instant::now();
        self.mmio.write(address, data);
        self.metrics.exit_mmio_write.inc();
        self.metrics.exit_mmio_write_agg.record(start);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Run,
    Pause,
    #[cfg(feature = "gdb")]
    Debug(debug::Command),
}

/// What a thread has been told so far.
#[derive(Default)]
struct Orders {
    run: bool,
    /// The debugger holds it: it runs nothing, whatever it is told.
    #[cfg(feature = "gdb")]
    held: bool,
}

impl Orders {
    fn obey(&mut self, command: Command) {
        match command {
            Command::Run => self.run = true,
            Command::Pause => self.run = false,
            #[cfg(feature = "gdb")]
            Command::Debug(command) => self.held = command == debug::Command::Hold,
        }
    }

    fn state(&self) -> State {
        #[cfg(feature = "gdb")]
        let run = self.run && !self.held;
        #[cfg(not(feature = "gdb"))]
        let run = self.run;
        if run { State::Running } else { State::Paused }
    }
}

/// What a vCPU thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Waits for a command. The state at the start.
    Paused,
    /// Runs the guest until it is kicked.
    Running,
    /// The guest is through, or nobody commands any more.
    Exited,
}

/// What a thread is doing, for its commander to wait for.
struct Status {
    state: Mutex<State>,
    changed: Condvar,
    #[cfg(feature = "gdb")]
    stop: debug::StopSlot,
}

impl Status {
    fn set(&self, state: State) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.changed.notify_all();
    }
}

/// A vCPU thread, as its commander has it. When dropped, the thread exits.
pub struct VcpuThread {
    commands: Option<Sender<Command>>,
    status: Arc<Status>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the thread of `vcpu`, paused. It calls `seal` first of all and runs nothing if that fails.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub fn start(
        vcpu: Vcpu,
        buses: Arc<Buses>,
        ends: Arc<EndSignal>,
        seal: impl FnOnce() -> Result<(), ()> + Send + 'static,
    ) -> Result<Self, Error> {
        let id = vcpu.id();
        let (commands, receiver) = channel();
        let status = Arc::new(Status {
            state: Mutex::new(State::Paused),
            changed: Condvar::new(),
            #[cfg(feature = "gdb")]
            stop: debug::StopSlot::default(),
        });
        let reported = Arc::clone(&status);
        let thread = Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                if seal().is_ok() {
                    run(vcpu, &receiver, &buses, &ends, &reported);
                }
                reported.set(State::Exited);
            })
            .map_err(|source| Error { id, source })?;
        Ok(Self {
            commands: Some(commands),
            status,
            thread: Some(thread),
        })
    }

    /// Lets the guest run.
    pub fn resume(&self) {
        self.command(Command::Run);
    }

    /// Waits until the guest has stopped after [`VcpuThread::pause`]. False if it has not by then: its
    /// thread is held up by the reader of a console, say.
    pub fn wait_until_paused(&self, patience: Duration) -> bool {
        // Before a command to run has arrived it is paused, and the command to pause comes right after.
        let state = self.status.state.lock();
        let state = state.unwrap_or_else(PoisonError::into_inner);
        let running = |state: &mut State| *state == State::Running;
        let waited = self
            .status
            .changed
            .wait_timeout_while(state, patience, running);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Stops the guest at its next instruction.
    pub fn pause(&self) {
        self.command(Command::Pause);
        self.kick();
    }

    fn command(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // A thread that has exited obeys no more, which is what exiting means.
            let _ = commands.send(command);
        }
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // It fails only for a thread that has ended.
            let _ = thread.kill(kick_signal());
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.commands = None;
        self.kick();
        if let Some(thread) = self.thread.take() {
            // A panic is reported where it happens.
            let _ = thread.join();
        }
    }
}

fn run(
    mut vcpu: Vcpu,
    commands: &Receiver<Command>,
    buses: &Buses,
    ends: &EndSignal,
    status: &Status,
) {
    vcpu.attach();
    let mut orders = Orders::default();
    let mut state = State::Paused;
    while state != State::Exited {
        let command = match state {
            State::Running => commands.try_recv(),
            _ => commands
                .recv()
                .map_err(|RecvError| TryRecvError::Disconnected),
        };
        // A kick comes after its command, and is forgotten before the commands are looked at: so one that comes
        // after this look ends the run.
        let next = match command {
            Ok(command) => {
                orders.obey(command);
                orders.state()
            }
            Err(TryRecvError::Disconnected) => State::Exited,
            Err(TryRecvError::Empty) => match run_guest(&mut vcpu, buses, ends) {
                Exit::Kicked => State::Running,
                #[cfg(feature = "gdb")]
                Exit::Debug(dr6) => {
                    orders.held = true;
                    status.set(orders.state());
                    status.stop.report(dr6);
                    orders.state()
                }
                _ => State::Exited,
            },
        };
        if next != state {
            status.set(next);
        }
        state = next;
    }
}

/// Runs the guest until there is something else to do, or to announce.
fn run_guest(vcpu: &mut Vcpu, buses: &Buses, ends: &EndSignal) -> Exit {
    loop {
        let exit = vcpu.run(buses);
        match &exit {
            // KVM waits for interrupts itself; a kernel that does not is asked again.
            Exit::Served | Exit::Halted => continue,
            Exit::Kicked => {}
            #[cfg(feature = "gdb")]
            Exit::Debug(_) => {}
            Exit::Shutdown => ends.announce(End::PoweredOff),
            Exit::Reset => ends.announce(End::Reset),
            Exit::Crashed(why) => {
                buses.metrics.failures.inc();
                // Whoever ends the process logs it: a line of this thread's might not get out before.
                ends.announce(End::Crashed(why.clone()));
            }
        }
        return exit;
    }
}

#[cfg(feature = "gdb")]
pub mod debug;
#[cfg(test)]
#[path = "vcpu_tests.rs"]
mod tests;

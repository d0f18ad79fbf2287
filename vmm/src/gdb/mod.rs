//! A stub for gdb: whoever debugs a guest's kernel connects to `machine-config.gdb_socket_path`.
//!
//! One thread, sealed like the others, with a second handle of each vCPU. The vCPUs' threads are as without it, but
//! that it may hold them: a vCPU that KVM brings back for the debugger holds itself and says why. The guest does not
//! run before a debugger has connected and lets it, and goes on when that one leaves.

mod breakpoints;
mod client;
mod registers;
mod target;

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::Builder;

use gdbstub::common::Signal;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError};
use log::{info, warn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use thiserror::Error;

use crate::ending::{End, EndSignal};
use crate::kvm::debug::DebugVcpu;
use crate::memory::GuestMemory;
use crate::vcpu::VcpuThread;
use client::Client;
use target::{Machine, StopReason};

/// The longest packet; gdb asks for more memory in several.
const PACKET: usize = 4096;

/// Why a debugger's session ended other than by its leave.
#[derive(Debug, Error)]
enum Error {
    #[error("its connection: {0}")]
    Connection(#[from] io::Error),
    #[error(transparent)]
    Machine(#[from] target::Error),
    #[error("{0}")]
    Protocol(String),
}

impl From<GdbStubError<target::Error, io::Error>> for Error {
    fn from(error: GdbStubError<target::Error, io::Error>) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// The stub, before it has vCPU threads.
pub struct Stub {
    listener: Arc<UnixListener>,
    vcpus: Vec<DebugVcpu>,
    memory: GuestMemory,
}

impl Stub {
    /// A stub for these vCPUs, to which gdb connects at `listener`.
    pub fn new(listener: Arc<UnixListener>, vcpus: Vec<DebugVcpu>, memory: GuestMemory) -> Self {
        Self {
            listener,
            vcpus,
            memory,
        }
    }

    /// Holds the vCPUs of `threads`, which are paused yet and the same in the same order, and starts the stub's own
    /// thread. That one calls `seal` first of all, and does nothing if that fails.
    ///
    /// # Errors
    /// When the kernel gives no eventfd or no thread.
    pub fn start(
        self,
        threads: &[Arc<VcpuThread>],
        ends: Arc<EndSignal>,
        seal: impl FnOnce() -> Result<(), ()> + Send + 'static,
    ) -> io::Result<()> {
        // What a jailer or a broker made does not block.
        self.listener.set_nonblocking(false)?;
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let stopped = Arc::new(EventFd::from_value_and_flags(0, flags)?);
        for thread in threads {
            thread.hold();
            thread.report_stops(Arc::clone(&stopped));
        }
        let mut running = Running {
            listener: self.listener,
            stopped,
            machine: Machine::new(threads.to_vec(), self.vcpus, self.memory),
            ends,
        };
        let run = move || {
            if seal().is_ok() {
                let error = running.run();
                let error = End::Failed(format!("the debugger's stub: {error}"));
                running.ends.announce(error);
            }
        };
        Builder::new().name("gdb".to_owned()).spawn(run).map(drop)
    }
}

/// The stub, on its thread.
struct Running {
    listener: Arc<UnixListener>,
    /// A vCPU has stopped by itself.
    stopped: Arc<EventFd>,
    machine: Machine,
    ends: Arc<EndSignal>,
}

impl Running {
    /// One debugger after the other, until something fails that is not one's own.
    fn run(&mut self) -> Error {
        info!("gdb: the guest waits for a debugger");
        loop {
            let client = match self.listener.accept() {
                Ok((socket, _)) => Client::new(socket),
                Err(error) => return error.into(),
            };
            info!("gdb: a debugger has connected");
            match self.serve(client) {
                Ok(DisconnectReason::Kill) => {
                    info!("gdb: the debugger ends the machine");
                    self.ends.announce(End::ByHost);
                    continue;
                }
                Ok(_) => info!("gdb: the debugger has left, the guest goes on"),
                Err(error) => warn!("gdb: the debugger has left, the guest goes on: {error}"),
            }
            if let Err(error) = self.machine.let_go() {
                return error.into();
            }
        }
    }

    fn serve(&mut self, client: Client) -> Result<DisconnectReason, Error> {
        self.machine.stop()?;
        // One debugger's stops are not the next one's.
        while self.machine.take_stop()?.is_some() {}
        let stub = GdbStub::builder(client)
            .packet_buffer_size(PACKET)
            .build()
            .map_err(|error| Error::Protocol(error.to_string()))?;
        let mut state = stub.run_state_machine(&mut self.machine)?;
        loop {
            state = match state {
                GdbStubStateMachine::Idle(mut stub) => {
                    let byte = stub.borrow_conn().next()?;
                    stub.incoming_data(&mut self.machine, byte)?
                }
                GdbStubStateMachine::Running(mut stub) => {
                    match self.wait_while_running(stub.borrow_conn())? {
                        Some(stop) => stub.report_stop(&mut self.machine, stop)?,
                        None => {
                            let byte = stub.borrow_conn().next()?;
                            stub.incoming_data(&mut self.machine, byte)?
                        }
                    }
                }
                GdbStubStateMachine::CtrlCInterrupt(stub) => {
                    self.machine.stop()?;
                    let stop = self.machine.take_stop()?;
                    let stop = stop.unwrap_or(StopReason::Signal(Signal::SIGINT));
                    stub.interrupt_handled(&mut self.machine, Some(stop))?
                }
                GdbStubStateMachine::Disconnected(stub) => return Ok(stub.get_reason()),
            };
        }
    }

    /// Waits until the machine has stopped by itself, and says why, or the debugger has said something.
    fn wait_while_running(&mut self, client: &Client) -> Result<Option<StopReason>, Error> {
        loop {
            let stop = self.machine.untold();
            if stop.is_some() || client.has_input() {
                return Ok(stop);
            }
            let mut waiting =
                [self.stopped.as_fd(), client.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut waiting, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
            let [stopped, said] = waiting.map(|fd| fd.any().unwrap_or(true));
            if stopped {
                // First forgotten, then looked at: what comes later wakes us again.
                let _ = self.stopped.read();
                let stop = self.machine.take_stop()?;
                if stop.is_some() {
                    return Ok(stop);
                }
            }
            if said {
                return Ok(None);
            }
        }
    }
}

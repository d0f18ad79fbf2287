//! The machine, as gdb's stub drives it: its vCPUs are threads with numbers from 1.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
    SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use log::{debug, warn};
use thiserror::Error;
use vm_memory::{Bytes as _, GuestAddress};

use super::breakpoints::{DebugRegisters, Kind, Place};
use super::registers;
use crate::kvm;
use crate::kvm::debug::{DebugVcpu, Watched};
use crate::memory::GuestMemory;
use crate::vcpu::VcpuThread;

/// How long a vCPU may take to stop; see `PATCH /vm`.
const PAUSE: Duration = Duration::from_secs(2);
/// DR6: a single step.
const DR6_STEP: u64 = 1 << 14;
/// A page, beyond which another translation holds.
const PAGE: u64 = 4096;

pub type StopReason = MultiThreadStopReason<u64>;

/// Why debugging cannot go on.
#[derive(Debug, Error)]
pub enum Error {
    /// KVM refused something that it should not.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// A vCPU's thread is held up.
    #[error("vCPU {0} does not stop: it is busy with a console that nobody reads")]
    Busy(usize),
    /// gdb names a thread that it was not told of.
    #[error("there is no vCPU with gdb's number {0}")]
    NoVcpu(usize),
}

/// What a vCPU does when the machine goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Continue,
    Step,
    Stay,
}

/// The machine.
pub struct Machine {
    threads: Vec<Arc<VcpuThread>>,
    vcpus: Vec<DebugVcpu>,
    memory: GuestMemory,
    debug_registers: DebugRegisters,
    /// For the next time that the machine goes on; what is not mentioned continues.
    actions: Vec<Option<Action>>,
    /// What is not mentioned stays as it is.
    locked: bool,
    /// Which vCPUs make a single step.
    stepping: Vec<bool>,
    /// Whether vCPUs may run.
    goes_on: bool,
    /// Stops that happened beside the one that was told.
    untold: VecDeque<StopReason>,
}

impl Machine {
    /// Of vCPU threads and the handles of the same vCPUs, in the same order.
    pub fn new(threads: Vec<Arc<VcpuThread>>, vcpus: Vec<DebugVcpu>, memory: GuestMemory) -> Self {
        let count = threads.len();
        Self {
            threads,
            vcpus,
            memory,
            debug_registers: DebugRegisters::default(),
            actions: vec![None; count],
            locked: false,
            stepping: vec![false; count],
            goes_on: false,
            untold: VecDeque::new(),
        }
    }

    /// Stops all vCPUs.
    ///
    /// # Errors
    /// When one does not stop in time.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.goes_on = false;
        for thread in &self.threads {
            thread.hold();
        }
        for (id, thread) in self.threads.iter().enumerate() {
            if !thread.wait_until_paused(PAUSE) {
                return Err(Error::Busy(id));
            }
        }
        Ok(())
    }

    /// After a vCPU stopped by itself: what gdb is to be told, all of the machine having stopped; None if that was the
    /// guest's own affair, and it has gone on.
    ///
    /// # Errors
    /// When a vCPU does not stop, or KVM refuses.
    pub fn take_stop(&mut self) -> Result<Option<StopReason>, Error> {
        let mut told = None;
        for id in 0..self.threads.len() {
            let Some(dr6) = self.threads.get(id).and_then(|thread| thread.take_stop()) else {
                continue;
            };
            match self.explain(id, dr6) {
                Some(reason) if told.is_none() => told = Some(reason),
                Some(reason) => self.untold.push_back(reason),
                None => {
                    debug!("gdb: vCPU {id} gets a debug exception of its own, DR6 {dr6:#x}");
                    let watched = Watched {
                        inject: true,
                        ..self.watched(id)
                    };
                    self.vcpu(id)?.watch(watched)?;
                    if let Some(thread) = self.threads.get(id).filter(|_| self.goes_on) {
                        thread.release();
                    }
                }
            }
        }
        if told.is_some() {
            self.stop()?;
        }
        Ok(told)
    }

    /// What stopped before and was not told.
    pub fn untold(&mut self) -> Option<StopReason> {
        self.untold.pop_front()
    }

    /// The machine goes on without a debugger, and without what one left behind.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn let_go(&mut self) -> Result<(), Error> {
        self.debug_registers = DebugRegisters::default();
        self.untold.clear();
        self.goes_on = true;
        for (vcpu, thread) in self.vcpus.iter().zip(&self.threads) {
            let _ = thread.take_stop();
            vcpu.watch(Watched::default())?;
            thread.release();
        }
        Ok(())
    }

    /// A vCPU's stop in gdb's words; None if nobody asked for it.
    fn explain(&self, id: usize, dr6: u64) -> Option<StopReason> {
        let tid = tid(id);
        let Some(place) = self.debug_registers.hit(dr6) else {
            let stepped = self.stepping.get(id) == Some(&true) && dr6 & DR6_STEP != 0;
            let signal = Signal::SIGTRAP;
            return stepped.then_some(StopReason::SignalWithThread { tid, signal });
        };
        let addr = place.address;
        Some(match place.kind {
            Kind::Breakpoint => StopReason::SwBreak(tid),
            Kind::HardwareBreakpoint => StopReason::HwBreak(tid),
            Kind::Write => StopReason::Watch {
                tid,
                kind: WatchKind::Write,
                addr,
            },
            Kind::Access => StopReason::Watch {
                tid,
                kind: WatchKind::ReadWrite,
                addr,
            },
        })
    }

    fn watched(&self, id: usize) -> Watched {
        Watched {
            step: self.stepping.get(id) == Some(&true),
            registers: self.debug_registers.values(),
            inject: false,
        }
    }

    fn vcpu(&self, id: usize) -> Result<&DebugVcpu, Error> {
        self.vcpus
            .get(id)
            .ok_or(Error::NoVcpu(id.saturating_add(1)))
    }

    fn vcpu_of(&self, tid: Tid) -> Result<&DebugVcpu, Error> {
        self.vcpu(id(tid))
    }

    fn read(&self, tid: Tid) -> Result<X86_64CoreRegs, Error> {
        let vcpu = self.vcpu_of(tid)?;
        let (general, special) = (vcpu.registers()?, vcpu.special_registers()?);
        Ok(registers::to_gdb(&general, &special, &vcpu.fpu()?))
    }

    /// Does something to each piece of `len` bytes at `address` that lies in one page: it gets the piece's
    /// guest-physical address, its place and its length. Returns how much was done before something was not mapped.
    fn pages(
        &self,
        tid: Tid,
        address: u64,
        len: usize,
        mut each: impl FnMut(GuestAddress, usize, usize) -> bool,
    ) -> Result<usize, Error> {
        let vcpu = self.vcpu_of(tid)?;
        let mut done = 0;
        while done < len {
            let here = address.wrapping_add(done as u64);
            let left_in_page = PAGE.saturating_sub(here % PAGE) as usize;
            let piece = left_in_page.min(len.saturating_sub(done));
            let Some(physical) = vcpu.translate(here)? else {
                break;
            };
            if !each(GuestAddress(physical), done, piece) {
                break;
            }
            done = done.saturating_add(piece);
        }
        Ok(done)
    }

    fn act(&mut self, tid: Tid, action: Action) -> Result<(), Error> {
        let place = self.actions.get_mut(id(tid));
        *place.ok_or(Error::NoVcpu(tid.get()))? = Some(action);
        Ok(())
    }
}

fn tid(id: usize) -> Tid {
    NonZeroUsize::MIN.saturating_add(id)
}

fn id(tid: Tid) -> usize {
    tid.get().saturating_sub(1)
}

fn instruction(address: u64, kind: Kind) -> Place {
    let len = 1;
    Place { address, len, kind }
}

/// The registers know no reads alone.
fn watched_place(address: u64, len: u64, kind: WatchKind) -> Option<Place> {
    let kind = match kind {
        WatchKind::Write => Kind::Write,
        WatchKind::ReadWrite => Kind::Access,
        WatchKind::Read => return None,
    };
    Some(Place { address, len, kind })
}

/// What gdb is told, and debugging goes on.
fn refused(error: Error) -> TargetError<Error> {
    warn!("gdb: {error}");
    TargetError::NonFatal
}

impl Target for Machine {
    type Arch = X86_64_SSE;
    type Error = Error;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64_SSE, Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Machine {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        *regs = self.read(tid).map_err(refused)?;
        Ok(())
    }

    /// The general registers; gdb is told that others cannot be written.
    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        if registers::differ_elsewhere(&self.read(tid).map_err(refused)?, regs) {
            return Err(TargetError::NonFatal);
        }
        let vcpu = self.vcpu_of(tid).map_err(refused)?;
        let written = vcpu.set_registers(&registers::general(regs));
        written.map_err(Error::from).map_err(refused)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let memory = self.memory.clone();
        let len = data.len();
        let read = self.pages(tid, start, len, |physical, at, len| {
            let piece = data.get_mut(at..at.saturating_add(len));
            piece.is_some_and(|piece| memory.read_slice(piece, physical).is_ok())
        });
        let read = read.map_err(refused)?;
        if read == 0 && len != 0 {
            return Err(TargetError::NonFatal);
        }
        Ok(read)
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let written = self.pages(tid, start, data.len(), |physical, at, len| {
            let piece = data.get(at..at.saturating_add(len));
            piece.is_some_and(|piece| self.memory.write_slice(piece, physical).is_ok())
        });
        match written.map_err(refused)? {
            written if written == data.len() => Ok(()),
            _ => Err(TargetError::NonFatal),
        }
    }

    fn list_active_threads(&mut self, found: &mut dyn FnMut(Tid)) -> Result<(), Error> {
        (0..self.threads.len()).map(tid).for_each(found);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Machine {
    fn resume(&mut self) -> Result<(), Error> {
        if !self.untold.is_empty() {
            // Told at once, as if the machine had gone on and stopped.
            return Ok(());
        }
        self.goes_on = true;
        let unmentioned = if self.locked {
            Action::Stay
        } else {
            Action::Continue
        };
        let actions: Vec<Action> = self
            .actions
            .iter()
            .map(|action| action.unwrap_or(unmentioned))
            .collect();
        self.stepping = actions
            .iter()
            .map(|action| *action == Action::Step)
            .collect();
        for (id, action) in actions.iter().enumerate() {
            if *action != Action::Stay {
                self.vcpu(id)?.watch(self.watched(id))?;
            }
        }
        for (thread, action) in self.threads.iter().zip(&actions) {
            if *action != Action::Stay {
                thread.release();
            }
        }
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Error> {
        self.actions.fill(None);
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        self.act(tid, Action::Continue)
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Machine {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        self.act(tid, Action::Step)
    }
}

impl MultiThreadSchedulerLocking for Machine {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Error> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for Machine {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Machine {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self
            .debug_registers
            .add(instruction(address, Kind::Breakpoint)))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self
            .debug_registers
            .remove(instruction(address, Kind::Breakpoint)))
    }
}

impl HwBreakpoint for Machine {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self
            .debug_registers
            .add(instruction(address, Kind::HardwareBreakpoint)))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self
            .debug_registers
            .remove(instruction(address, Kind::HardwareBreakpoint)))
    }
}

impl HwWatchpoint for Machine {
    fn add_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let place = watched_place(address, len, kind);
        Ok(place.is_some_and(|place| self.debug_registers.add(place)))
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let place = watched_place(address, len, kind);
        Ok(place.is_some_and(|place| self.debug_registers.remove(place)))
    }
}

//! What a debugger does with a vCPU's thread: it holds it, lets it go, and learns why it stopped by itself.

use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::EventFd;

use super::{Command as Order, VcpuThread};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Hold,
    Release,
}

/// Where a thread says why it stopped: what DR6 says, and whom that wakes.
#[derive(Default)]
pub(super) struct StopSlot(Mutex<(Option<u64>, Option<Arc<EventFd>>)>);

impl StopSlot {
    /// To be called once the thread counts as paused: whoever is woken goes on from there.
    pub(super) fn report(&self, dr6: u64) {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.0 = Some(dr6);
        if let Some(event) = &slot.1 {
            // It fails only if the counter is full: then the debugger knows.
            let _ = event.write(1);
        }
    }
}

impl VcpuThread {
    /// Stops the guest at its next instruction until [`VcpuThread::release`], whoever else lets it run.
    pub fn hold(&self) {
        self.command(Order::Debug(Command::Hold));
        self.kick();
    }

    /// Ends [`VcpuThread::hold`], or the stop of its own that the debugger was told of.
    pub fn release(&self) {
        self.command(Order::Debug(Command::Release));
    }

    /// Has `event` written when the thread stops by itself.
    pub fn report_stops(&self, event: Arc<EventFd>) {
        let slot = self.status.stop.0.lock();
        slot.unwrap_or_else(PoisonError::into_inner).1 = Some(event);
    }

    /// Why the thread stopped by itself, once: what DR6 says.
    pub fn take_stop(&self) -> Option<u64> {
        let slot = self.status.stop.0.lock();
        slot.unwrap_or_else(PoisonError::into_inner).0.take()
    }
}

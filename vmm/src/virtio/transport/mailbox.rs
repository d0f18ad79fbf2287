//! How a vCPU has its device started or stopped: the work is done on the device thread, the vCPU
//! waits. A vCPU makes no other system calls for it than a futex and a write to an eventfd.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::virtio::queue::QueueStates;

/// What the device thread is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Start the device.
    Start {
        /// What the driver accepted.
        features: u64,
        /// The queues as the driver configured them, unchecked.
        queues: QueueStates,
    },
    /// Stop it; nothing may be in flight afterwards.
    Stop,
}

#[derive(Clone, Copy)]
enum Slot {
    Empty,
    Asked(Command),
    /// Taken by the device thread, not yet answered.
    Taken,
    Answered(bool),
    /// The device thread is gone.
    Closed,
}

/// Room for one command and its answer. Only one vCPU asks at a time: it holds the registers.
pub struct Mailbox {
    slot: Mutex<Slot>,
    answered: Condvar,
    doorbell: EventFd,
}

impl Mailbox {
    /// An empty mailbox.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            slot: Mutex::new(Slot::Empty),
            answered: Condvar::new(),
            doorbell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Readable when a command waits.
    pub fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks and waits for the answer: whether the command succeeded.
    pub fn ask(&self, command: Command) -> bool {
        let mut slot = self.lock();
        if matches!(*slot, Slot::Closed) {
            return false;
        }
        *slot = Slot::Asked(command);
        // It fails only if the counter is full; then the doorbell rings already.
        let _ = self.doorbell.write(1);
        loop {
            match *slot {
                Slot::Answered(success) => {
                    *slot = Slot::Empty;
                    return success;
                }
                Slot::Closed => return false,
                Slot::Empty | Slot::Asked(_) | Slot::Taken => {
                    slot = self
                        .answered
                        .wait(slot)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Takes the command, if there is one. Each is answered with [`Mailbox::answer`].
    pub fn take(&self) -> Option<Command> {
        // Nothing to read is fine: an earlier call may have seen the command.
        let _ = self.doorbell.read();
        let mut slot = self.lock();
        match *slot {
            Slot::Asked(command) => {
                *slot = Slot::Taken;
                Some(command)
            }
            _ => None,
        }
    }

    /// Answers the command that was taken.
    pub fn answer(&self, success: bool) {
        *self.lock() = Slot::Answered(success);
        self.answered.notify_all();
    }

    /// Answers every command from now on with a failure: nobody takes them any more.
    pub fn close(&self) {
        *self.lock() = Slot::Closed;
        self.answered.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn answers_reach_the_one_who_asked() {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let device = Arc::clone(&mailbox);
        let thread = std::thread::spawn(move || {
            for success in [true, false] {
                let command = loop {
                    match device.take() {
                        Some(command) => break command,
                        None => std::thread::yield_now(),
                    }
                };
                assert_eq!(command, Command::Stop);
                assert_eq!(device.take(), None);
                device.answer(success);
            }
        });
        assert!(mailbox.ask(Command::Stop));
        assert!(!mailbox.ask(Command::Stop));
        thread.join().unwrap();
    }

    #[test]
    fn nobody_waits_for_a_device_thread_that_is_gone() {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let device = Arc::clone(&mailbox);
        let thread = std::thread::spawn(move || {
            while device.take().is_none() {
                std::thread::yield_now();
            }
            device.close();
        });
        assert!(!mailbox.ask(Command::Stop));
        assert!(!mailbox.ask(Command::Stop));
        thread.join().unwrap();
    }
}

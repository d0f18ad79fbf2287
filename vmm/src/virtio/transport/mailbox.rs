//! How one thread has another do something and waits for it: a vCPU has its device started or
//! stopped by the device thread, the control thread has a device changed. The one who asks makes
//! no other system calls for it than a futex and a write to an eventfd.

use std::io;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

enum Slot<C, A> {
    Empty,
    Asked(C),
    /// Taken by the device thread, not yet answered.
    Taken,
    Answered(A),
    /// The device thread is gone.
    Closed,
}

/// Room for one command and its answer. Only one thread asks at a time: a vCPU holds the registers,
/// and there is one control thread.
pub struct Mailbox<C, A> {
    slot: Mutex<Slot<C, A>>,
    answered: Condvar,
    doorbell: Arc<EventFd>,
}

impl<C, A> Mailbox<C, A> {
    /// An empty mailbox.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new() -> io::Result<Self> {
        let doorbell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self::with_doorbell(Arc::new(doorbell)))
    }

    /// An empty mailbox whose doorbell is there already.
    pub fn with_doorbell(doorbell: Arc<EventFd>) -> Self {
        Self {
            slot: Mutex::new(Slot::Empty),
            answered: Condvar::new(),
            doorbell,
        }
    }

    /// Readable when a command waits.
    pub fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    /// Wakes the one who takes commands, though there is none.
    pub fn ring(&self) {
        // It fails only if the counter is full; then the doorbell rings already.
        let _ = self.doorbell.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Slot<C, A>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks and waits for the answer; `None` when nobody is there to give one.
    pub fn ask(&self, command: C) -> Option<A> {
        let mut slot = self.lock();
        if matches!(*slot, Slot::Closed) {
            return None;
        }
        *slot = Slot::Asked(command);
        self.ring();
        loop {
            match mem::replace(&mut *slot, Slot::Empty) {
                Slot::Answered(answer) => return Some(answer),
                Slot::Closed => {
                    *slot = Slot::Closed;
                    return None;
                }
                waiting => {
                    *slot = waiting;
                    slot = self
                        .answered
                        .wait(slot)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Takes the command, if there is one. Each is answered with [`Mailbox::answer`].
    pub fn take(&self) -> Option<C> {
        // Nothing to read is fine: an earlier call may have seen the command.
        let _ = self.doorbell.read();
        let mut slot = self.lock();
        match mem::replace(&mut *slot, Slot::Taken) {
            Slot::Asked(command) => Some(command),
            other => {
                *slot = other;
                None
            }
        }
    }

    /// Answers the command that was taken.
    pub fn answer(&self, answer: A) {
        *self.lock() = Slot::Answered(answer);
        self.answered.notify_all();
    }

    /// Answers every command from now on with nothing: nobody takes them any more.
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
                assert_eq!(command, "stop");
                assert_eq!(device.take(), None);
                device.answer(success);
            }
        });
        assert_eq!(mailbox.ask("stop"), Some(true));
        assert_eq!(mailbox.ask("stop"), Some(false));
        thread.join().unwrap();
    }

    #[test]
    fn nobody_waits_for_a_device_thread_that_is_gone() {
        let mailbox = Arc::new(Mailbox::<_, ()>::new().unwrap());
        let device = Arc::clone(&mailbox);
        let thread = std::thread::spawn(move || {
            while device.take().is_none() {
                std::thread::yield_now();
            }
            device.close();
        });
        assert_eq!(mailbox.ask(1), None);
        assert_eq!(mailbox.ask(2), None);
        thread.join().unwrap();
    }
}

//! The device thread's event loop: `epoll`, and tokens that say what woke it.
//!
//! A token names a device and, within it, what the device itself calls the descriptor. Keys are
//! never used twice in a row, so an event that was already fetched for a descriptor that has since
//! been closed finds nobody.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

pub use vmm_sys_util::epoll::EventSet;

/// How many events one wait fetches at most.
const BATCH: usize = 32;

/// What went wrong with `epoll`.
#[derive(Debug, Error)]
pub enum Error {
    /// `epoll_create1` failed.
    #[error("cannot create the event loop (epoll_create1): {0}")]
    Create(#[source] io::Error),
    /// `epoll_ctl` refused a descriptor.
    #[error("cannot watch descriptor {fd} (epoll_ctl): {source}")]
    Control {
        /// The descriptor.
        fd: i32,
        /// What the kernel said.
        source: io::Error,
    },
    /// More devices than a token can name.
    #[error("there are too many devices for one event loop")]
    Full,
    /// `epoll_wait` failed.
    #[error("cannot wait for events (epoll_wait): {0}")]
    Wait(#[source] io::Error),
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// The guest rang the doorbell of a queue.
    Queue {
        /// Index of the device in its worker.
        device: u16,
        /// Index of the queue in the device.
        queue: u16,
    },
    /// The transport wants the device started or stopped.
    Command {
        /// Index of the device in its worker.
        device: u16,
    },
    /// The control thread wants something of the worker.
    Request,
    /// A descriptor that the device watches itself is ready.
    Device {
        /// Index of the device in its worker.
        device: u16,
        /// The device's own name for the descriptor.
        key: u32,
    },
}

const KIND_QUEUE: u64 = 1;
const KIND_COMMAND: u64 = 2;
const KIND_DEVICE: u64 = 3;
const KIND_REQUEST: u64 = 4;

impl Token {
    /// The token as `epoll_event.data`: kind, device and key in bits 48, 32 and 0.
    fn to_data(self) -> u64 {
        let (kind, device, key) = match self {
            Token::Queue { device, queue } => (KIND_QUEUE, device, u32::from(queue)),
            Token::Command { device } => (KIND_COMMAND, device, 0),
            Token::Device { device, key } => (KIND_DEVICE, device, key),
            Token::Request => (KIND_REQUEST, 0, 0),
        };
        (kind << 48) | (u64::from(device) << 32) | u64::from(key)
    }

    fn from_data(data: u64) -> Option<Self> {
        let device = (data >> 32) as u16;
        let key = data as u32;
        match data >> 48 {
            KIND_QUEUE => Some(Token::Queue {
                device,
                queue: key as u16,
            }),
            KIND_COMMAND => Some(Token::Command { device }),
            KIND_DEVICE => Some(Token::Device { device, key }),
            KIND_REQUEST => Some(Token::Request),
            _ => None,
        }
    }
}

/// A thread's event loop.
pub struct EventLoop {
    epoll: Arc<Epoll>,
    fetched: Vec<EpollEvent>,
}

impl EventLoop {
    /// A loop that watches nothing yet.
    ///
    /// # Errors
    /// When the kernel gives no epoll descriptor. Call it before the thread is sealed.
    pub fn new() -> Result<Self, Error> {
        Ok(Self {
            epoll: Arc::new(Epoll::new().map_err(Error::Create)?),
            fetched: vec![EpollEvent::default(); BATCH],
        })
    }

    /// Reports `token` as long as `fd` is readable.
    ///
    /// # Errors
    /// When the kernel refuses the descriptor.
    pub fn watch(&self, fd: &impl AsRawFd, token: Token) -> Result<(), Error> {
        control(
            &self.epoll,
            ControlOperation::Add,
            fd,
            EventSet::IN,
            token.to_data(),
        )
    }

    /// Reports nothing about `fd` any more.
    pub fn unwatch(&self, fd: &impl AsRawFd) {
        unwatch(&self.epoll, fd);
    }

    /// What a device with this index watches its own descriptors with.
    pub fn registrar(&self, device: u16) -> Registrar {
        Registrar {
            epoll: Arc::clone(&self.epoll),
            device,
        }
    }

    /// Waits until something happens, for `timeout` at most (rounded up to milliseconds; for ever
    /// without one); returns how many events to read with [`EventLoop::event`].
    ///
    /// # Errors
    /// When `epoll_wait` fails; being interrupted by a signal counts as no event.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<usize, Error> {
        let milliseconds = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
        });
        match self.epoll.wait(milliseconds, &mut self.fetched) {
            Ok(count) => Ok(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(error) => Err(Error::Wait(error)),
        }
    }

    /// The event number `index` of the last wait.
    pub fn event(&self, index: usize) -> Option<(Token, EventSet)> {
        let event = self.fetched.get(index)?;
        Some((Token::from_data(event.data())?, event.event_set()))
    }
}

/// Lets a device watch descriptors of its own in the loop of its worker.
#[derive(Clone)]
pub struct Registrar {
    epoll: Arc<Epoll>,
    device: u16,
}

impl Registrar {
    /// Reports `events` on `fd` to the device as `key`.
    ///
    /// # Errors
    /// When the kernel refuses the descriptor.
    pub fn watch(
        &self,
        fd: &(impl AsRawFd + ?Sized),
        key: u32,
        events: EventSet,
    ) -> Result<(), Error> {
        let token = Token::Device {
            device: self.device,
            key,
        };
        control(
            &self.epoll,
            ControlOperation::Add,
            fd,
            events,
            token.to_data(),
        )
    }

    /// Reports nothing about `fd` any more. (Closing the last descriptor of a file does it too.)
    pub fn unwatch(&self, fd: &(impl AsRawFd + ?Sized)) {
        unwatch(&self.epoll, fd);
    }
}

fn unwatch(epoll: &Epoll, fd: &(impl AsRawFd + ?Sized)) {
    // It fails only if the descriptor is not watched, which is what was asked for.
    let _ = control(epoll, ControlOperation::Delete, fd, EventSet::empty(), 0);
}

fn control(
    epoll: &Epoll,
    operation: ControlOperation,
    fd: &(impl AsRawFd + ?Sized),
    events: EventSet,
    data: u64,
) -> Result<(), Error> {
    let fd = fd.as_raw_fd();
    epoll
        .ctl(operation, fd, EpollEvent::new(events, data))
        .map_err(|source| Error::Control { fd, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[test]
    fn tokens_survive_the_kernel() {
        for token in [
            Token::Queue {
                device: 17,
                queue: 2,
            },
            Token::Command { device: u16::MAX },
            Token::Request,
            Token::Device {
                device: 3,
                key: u32::MAX,
            },
        ] {
            assert_eq!(Token::from_data(token.to_data()), Some(token));
        }
        assert_eq!(Token::from_data(0), None);
        assert_eq!(Token::from_data(u64::MAX), None);
    }

    #[test]
    fn reports_what_is_watched_and_nothing_else() {
        let mut events = EventLoop::new().unwrap();
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let registrar = events.registrar(4);
        registrar.watch(&fd, 9, EventSet::IN).unwrap();
        assert_eq!(events.wait(Some(Duration::ZERO)).unwrap(), 0);
        fd.write(1).unwrap();
        assert_eq!(events.wait(None).unwrap(), 1);
        assert_eq!(
            events.event(0),
            Some((Token::Device { device: 4, key: 9 }, EventSet::IN))
        );
        registrar.unwatch(&fd);
        assert_eq!(events.wait(Some(Duration::ZERO)).unwrap(), 0);
    }
}

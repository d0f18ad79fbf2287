//! What the control thread has of a console: typed bytes on their way to the guest, and the size of the
//! terminal.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::devices::serial::Offer;
use crate::virtio::ConfigSpace;

/// Most bytes that wait for the guest. Whoever types more waits with it.
pub const CAPACITY: usize = 4096;

/// Columns and rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// The way to a console.
pub struct Port {
    typed: Mutex<VecDeque<u8>>,
    config: Arc<ConfigSpace>,
    /// A driver runs the device, so that input is its own.
    running: AtomicBool,
    /// The size is another one than the driver was told.
    resized: AtomicBool,
    news: EventFd,
    room: EventFd,
}

impl Port {
    /// A port whose terminal has that size; zeroes say that it is unknown.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new(size: Size) -> io::Result<Arc<Self>> {
        // struct virtio_console_config (section 5.3.4): the size, then fields of features that are
        // not offered.
        let mut config = Vec::from(size_bytes(size));
        config.extend([0; 8]);
        Ok(Arc::new(Self {
            typed: Mutex::new(VecDeque::with_capacity(CAPACITY)),
            config: ConfigSpace::new(config),
            running: AtomicBool::new(false),
            resized: AtomicBool::new(false),
            news: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            room: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))
    }

    fn typed(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.typed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the guest has a driver for it.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    /// Readable when [`Port::offer`] may take more, or another device shall be offered it.
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    /// Offers input to the guest, never waiting.
    pub fn offer(&self, input: &[u8]) -> Offer {
        let mut typed = self.typed();
        let count = CAPACITY.saturating_sub(typed.len()).min(input.len());
        if count == 0 {
            return Offer::Full;
        }
        typed.extend(input.iter().take(count));
        drop(typed);
        ring(&self.news);
        Offer::Taken(count)
    }

    /// The terminal has another size.
    pub fn resize(&self, size: Size) {
        let bytes = size_bytes(size);
        if self.config.bytes().starts_with(&bytes) {
            return;
        }
        self.config.set(0, &bytes);
        self.resized.store(true, Ordering::SeqCst);
        ring(&self.news);
    }

    /// The device's configuration space.
    pub(super) fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    /// Readable when there is input or another size.
    pub(super) fn news(&self) -> &EventFd {
        &self.news
    }

    /// Whether the driver has to be told of another size, once.
    pub(super) fn take_resized(&self) -> bool {
        self.resized.swap(false, Ordering::SeqCst)
    }

    /// A driver has come or gone.
    pub(super) fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::SeqCst);
        ring(&self.room);
    }

    /// Moves input to `data`, as much as there is or fits, and says how much.
    pub(super) fn take(&self, data: &mut [u8]) -> usize {
        let mut typed = self.typed();
        let was_full = typed.len() == CAPACITY;
        let count = typed.len().min(data.len());
        for (to, from) in data.iter_mut().zip(typed.drain(..count)) {
            *to = from;
        }
        drop(typed);
        if was_full && count > 0 {
            ring(&self.room);
        }
        count
    }
}

/// A full counter wakes whoever waits as well.
fn ring(bell: &EventFd) {
    let _ = bell.write(1);
}

/// The first fields of the configuration.
fn size_bytes(size: Size) -> [u8; 4] {
    let ([a, b], [c, d]) = (size.columns.to_le_bytes(), size.rows.to_le_bytes());
    [a, b, c, d]
}

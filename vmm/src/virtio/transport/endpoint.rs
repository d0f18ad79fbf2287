//! The device's side of a transport: what the device thread needs of it, whichever it is.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::core::{Core, Transition, status};
use super::mailbox::Mailbox;
use crate::memory::GuestMemory;
use crate::virtio::device::Traits;
use crate::virtio::queue::{QueueStates, Signal};

/// What the device thread is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(
    clippy::large_enum_variant,
    reason = "there is one of them, in the mailbox, and a vCPU allocates nothing"
)]
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

/// The doorbells, the interrupt and the mailbox of one device.
pub struct Endpoint {
    notifiers: Vec<EventFd>,
    mailbox: Mailbox<Command, bool>,
    memory: GuestMemory,
    signal: Arc<dyn Signal>,
    needs_reset: AtomicBool,
}

impl Endpoint {
    /// The endpoint of a device with these traits, which interrupts its driver by `signal`.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new(
        traits: Traits,
        memory: GuestMemory,
        signal: Arc<dyn Signal>,
    ) -> io::Result<Arc<Self>> {
        let notifiers = traits
            .queue_sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<Result<_, _>>()?;
        Ok(Arc::new(Self {
            notifiers,
            mailbox: Mailbox::new()?,
            memory,
            signal,
            needs_reset: AtomicBool::new(false),
        }))
    }

    /// The doorbell of each queue, in order.
    pub fn notifiers(&self) -> &[EventFd] {
        &self.notifiers
    }

    /// Rings the doorbell of `queue`, as an ioeventfd does with no exit.
    pub fn notify(&self, queue: u32) {
        let queue = usize::try_from(queue).ok();
        if let Some(notifier) = queue.and_then(|queue| self.notifiers.get(queue)) {
            // It fails only if the counter is full; then the doorbell rings already.
            let _ = notifier.write(1);
        }
    }

    /// Where the transport has its device started and stopped.
    pub fn mailbox(&self) -> &Mailbox<Command, bool> {
        &self.mailbox
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The interrupt.
    pub fn signal(&self) -> &Arc<dyn Signal> {
        &self.signal
    }

    /// Whether the device waits for a reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Sets NEEDS_RESET and tells the driver by a configuration interrupt (section 2.1.2).
    pub fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.signal.config_changed();
    }

    /// The status register as the driver reads it.
    pub fn read_status(&self, core: &Core) -> u8 {
        let needs_reset = if self.needs_reset() {
            status::NEEDS_RESET
        } else {
            0
        };
        core.status() | needs_reset
    }

    /// Takes the driver's write to the status register, and starts or stops the device. True when
    /// it was a reset: the transport then clears what it keeps itself.
    ///
    /// The caller holds the registers while the device thread works: no other vCPU can touch the
    /// device in between, and the device thread never takes them.
    pub fn write_status(&self, core: &mut Core, value: u8) -> bool {
        match core.write_status(value) {
            Transition::None => false,
            Transition::Start => {
                let command = Command::Start {
                    features: core.accepted_features(),
                    queues: core.queue_states(),
                };
                if self.mailbox.ask(command) != Some(true) {
                    self.set_needs_reset();
                }
                false
            }
            Transition::Reset => {
                if core.is_started() {
                    self.mailbox.ask(Command::Stop);
                }
                core.reset();
                self.needs_reset.store(false, Ordering::SeqCst);
                true
            }
        }
    }
}

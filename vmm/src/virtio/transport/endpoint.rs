//! The device's side of a transport: what the device thread needs of it, whichever it is.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::core::{Core, Transition, status};
use super::mailbox::Mailbox;
use super::state::Start;
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

/// The eventfds of an endpoint. They can be made before the device is there, while descriptors may be
/// made, and outlive it: another device may have them next.
pub struct Doorbells {
    notifiers: Vec<EventFd>,
    commands: Arc<EventFd>,
}

impl Doorbells {
    /// For a device of `queues` queues at most.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new(queues: usize) -> io::Result<Arc<Self>> {
        let make = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let notifiers = (0..queues).map(|_| make()).collect::<Result<_, _>>()?;
        Ok(Arc::new(Self {
            notifiers,
            commands: Arc::new(make()?),
        }))
    }

    /// The doorbell of each queue, in order.
    pub fn notifiers(&self) -> &[EventFd] {
        &self.notifiers
    }
}

/// The doorbells, the interrupt and the mailbox of one device.
pub struct Endpoint {
    doorbells: Arc<Doorbells>,
    /// How many of the doorbells are for queues that the device has.
    queues: usize,
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
        let doorbells = Doorbells::new(traits.queue_sizes.len())?;
        Ok(Self::with_doorbells(traits, doorbells, memory, signal))
    }

    /// The same, with doorbells that are there already. A queue beyond them cannot be rung.
    pub fn with_doorbells(
        traits: Traits,
        doorbells: Arc<Doorbells>,
        memory: GuestMemory,
        signal: Arc<dyn Signal>,
    ) -> Arc<Self> {
        Arc::new(Self {
            queues: traits.queue_sizes.len(),
            mailbox: Mailbox::with_doorbell(Arc::clone(&doorbells.commands)),
            doorbells,
            memory,
            signal,
            needs_reset: AtomicBool::new(false),
        })
    }

    /// The doorbell of each queue, in order.
    pub fn notifiers(&self) -> &[EventFd] {
        let all = self.doorbells.notifiers();
        all.get(..self.queues).unwrap_or(all)
    }

    /// Rings the doorbell of `queue`, as an ioeventfd does with no exit.
    pub fn notify(&self, queue: u32) {
        let queue = usize::try_from(queue).ok();
        if let Some(notifier) = queue.and_then(|queue| self.notifiers().get(queue)) {
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

    /// Takes NEEDS_RESET over from another device, whose driver was told.
    pub fn restore_needs_reset(&self, needs_reset: bool) {
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// Sets NEEDS_RESET and tells the driver by a configuration interrupt (section 2.1.2). On the
    /// device thread only, as every interrupt.
    pub fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.signal.config_changed();
    }

    /// How the device is to be started whose registers these are, if it runs.
    pub fn start(&self, core: &Core) -> Option<Start> {
        (core.is_started() && !self.needs_reset()).then(|| Start {
            features: core.accepted_features(),
            queues: core.queue_states(),
        })
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
                // A device that does not start says so itself; without a device thread nobody does.
                if self.mailbox.ask(command).is_none() {
                    self.needs_reset.store(true, Ordering::SeqCst);
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

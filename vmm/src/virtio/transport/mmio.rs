//! virtio over MMIO, version 2 (virtio 1.2, section 4.2.2).

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::core::{Area, Core, Half};
use super::endpoint::Endpoint;
use super::state::{KindState, RestoreError, SavedTransport, Start, TransportState};
use crate::bus::BusDevice;
use crate::memory::GuestMemory;
use crate::virtio::config_space::ConfigSpace;
use crate::virtio::device::VirtioDevice;
use crate::virtio::queue::{QueueStates, Signal};

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "CSMT": the spec leaves the vendor to us.
const VENDOR: u32 = 0x544d_5343;
/// Where the device's own configuration space starts.
const CONFIG: u64 = 0x100;
/// Offset of QueueNotify, where ioeventfds are put, with the queue's index as data.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// Bit 0 of InterruptStatus: a used ring has news.
const INTERRUPT_USED: u32 = 1;
/// Bit 1 of InterruptStatus: the configuration, or NEEDS_RESET, changed.
const INTERRUPT_CONFIG: u32 = 2;

/// Why a transport could not be made.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel gave no eventfd.
    #[error("cannot make an eventfd for a virtio device: {0}")]
    EventFd(#[source] io::Error),
}

/// The interrupt of a device: what the device thread sets and the vCPUs read and acknowledge.
struct Interrupt {
    status: AtomicU32,
    irq: EventFd,
}

impl Interrupt {
    fn raise(&self, bits: u32) {
        // The bits first, for the handler reads them when the interrupt arrives.
        self.status.fetch_or(bits, Ordering::SeqCst);
        // It fails only if the counter is full; then an interrupt is pending already.
        let _ = self.irq.write(1);
    }
}

impl Signal for Interrupt {
    fn used(&self, _: u16) {
        self.raise(INTERRUPT_USED);
    }

    fn config_changed(&self) {
        self.raise(INTERRUPT_CONFIG);
    }
}

/// A virtio-mmio window: the registers of one device.
///
/// The registers live here and are used by vCPUs; the device itself belongs to a
/// [`DeviceWorker`](crate::virtio::DeviceWorker), which has the [`Endpoint`].
pub struct MmioTransport {
    registers: Mutex<Core>,
    config: Arc<ConfigSpace>,
    interrupt: Arc<Interrupt>,
    endpoint: Arc<Endpoint>,
}

impl MmioTransport {
    /// A transport for `device`, which interrupts the guest by writing to `irq`.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new(
        device: &dyn VirtioDevice,
        memory: GuestMemory,
        irq: EventFd,
    ) -> Result<Arc<Self>, Error> {
        let interrupt = Arc::new(Interrupt {
            status: AtomicU32::new(0),
            irq,
        });
        let signal = Arc::clone(&interrupt) as Arc<dyn Signal>;
        let traits = device.traits();
        Ok(Arc::new(Self {
            registers: Mutex::new(Core::new(traits)),
            config: device.config(),
            interrupt,
            endpoint: Endpoint::new(traits, memory, signal).map_err(Error::EventFd)?,
        }))
    }

    /// The device's side. Its doorbells are to be bound as ioeventfds at [`QUEUE_NOTIFY`] with the
    /// queue's index as 32-bit data. Without an ioeventfd a write there rings too, only slower.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    fn registers(&self) -> MutexGuard<'_, Core> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u64) -> u32 {
        let core = self.registers();
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => core.device_id(),
            0x0c => VENDOR,
            0x10 => core.device_features(),
            0x34 => u32::from(core.queue_max_size()),
            0x44 => u32::from(core.queue_ready()),
            0x60 => self.interrupt.status.load(Ordering::SeqCst),
            0x70 => u32::from(self.endpoint.read_status(&core)),
            // No shared memory region exists: length and base read as all ones (section 4.2.2).
            0xb0..=0xbc => u32::MAX,
            0xfc => self.config.generation(),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            // These two are hot and need no registers.
            QUEUE_NOTIFY => return self.endpoint.notify(value),
            0x64 => {
                self.interrupt.status.fetch_and(!value, Ordering::SeqCst);
                return;
            }
            _ => {}
        }
        let mut core = self.registers();
        match offset {
            0x14 => core.select_device_features(value),
            0x20 => core.accept_features(value),
            0x24 => core.select_driver_features(value),
            0x30 => core.select_queue(value),
            0x38 => core.set_queue_size(value),
            0x44 => core.set_queue_ready(value == 1),
            // The status is a byte; what is beyond it never was a status.
            0x70 => {
                if let Ok(value) = u8::try_from(value)
                    && self.endpoint.write_status(&mut core, value)
                {
                    self.interrupt.status.store(0, Ordering::SeqCst);
                }
            }
            0x80 => core.set_queue_address(Area::Descriptors, Half::Low, value),
            0x84 => core.set_queue_address(Area::Descriptors, Half::High, value),
            0x90 => core.set_queue_address(Area::Driver, Half::Low, value),
            0x94 => core.set_queue_address(Area::Driver, Half::High, value),
            0xa0 => core.set_queue_address(Area::Device, Half::Low, value),
            0xa4 => core.set_queue_address(Area::Device, Half::High, value),
            _ => {}
        }
    }
}

impl SavedTransport for MmioTransport {
    fn save(&self, queues: &QueueStates) -> TransportState {
        TransportState {
            registers: self.registers().save(queues),
            needs_reset: self.endpoint.needs_reset(),
            kind: KindState::Mmio {
                interrupt_status: self.interrupt.status.load(Ordering::SeqCst),
            },
        }
    }

    fn restore(&self, state: &TransportState) -> Result<Option<Start>, RestoreError> {
        let KindState::Mmio { interrupt_status } = state.kind else {
            return Err(RestoreError::Kind);
        };
        let mut core = self.registers();
        core.restore(&state.registers)?;
        self.endpoint.restore_needs_reset(state.needs_reset);
        let known = INTERRUPT_USED | INTERRUPT_CONFIG;
        self.interrupt.raise(interrupt_status & known);
        Ok(self.endpoint.start(&core))
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.config.read(offset, data);
        }
        // Registers are 32 bits wide and aligned (section 4.2.2.2); any other access reads zero.
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(register) if offset.is_multiple_of(4) => {
                *register = self.read_register(offset).to_le_bytes();
            }
            _ => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.config.write(offset, data);
        }
        if offset.is_multiple_of(4)
            && let Ok(register) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(register));
        }
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;

//! virtio over PCI (virtio 1.2, section 4.1), modern devices only: a function with one BAR.
//!
//! | offset in the BAR | structure |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x0100 | ISR |
//! | 0x0400 | device configuration |
//! | 0x1000 | MSI-X table |
//! | 0x1800 | MSI-X pending bits |
//! | 0x2000 | doorbells: 128 bytes for each slot of the bus, of which a function uses its own |
//!
//! Interrupts are MSI-X; there is no INTx pin. A driver without MSI-X can poll the ISR.
//!
//! A doorbell is an ioeventfd at the address where the BAR starts out. A guest may move the BAR; then
//! its doorbells make exits, and go on working. That no two slots have their doorbells at the same
//! offset is what makes it safe: a BAR that was moved to where another one started out does not
//! ring that one's.

mod common;
pub mod msix;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::core::Core;
use super::endpoint::{Doorbells, Endpoint};
use super::state::{KindState, RestoreError, SavedTransport, Start, TransportState};
use crate::memory::{GuestMemory, layout};
use crate::pci::config::Identity;
use crate::pci::{FunctionConfig, PciFunction};
use crate::virtio::config_space::ConfigSpace;
use crate::virtio::device::{DeviceType, VirtioDevice};
use crate::virtio::queue::{QueueStates, Signal};
use common::Common;
use msix::{MsiSender, Msix, Source};

const ISR: u64 = 0x100;
const CONFIG: u64 = 0x400;
const CONFIG_MAX_SIZE: u64 = 0x400;
const TABLE: u64 = 0x1000;
const PENDING: u64 = 0x1800;
const DOORBELLS: u64 = 0x2000;
const DOORBELLS_OF_SLOT: u64 = 0x80;
/// Bytes from one queue's doorbell to the next one's (notify_off_multiplier).
pub const DOORBELL_SIZE: usize = 4;

/// The vendor of every virtio device, and the device id of type 0 (section 4.1.2).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
/// Anything from here on says that the device is no transitional one (section 4.1.2.1).
const SUBSYSTEM: u16 = 0x40;
const REVISION: u8 = 1;

const CAP_MSIX: u8 = 0x11;
const CAP_VENDOR: u8 = 0x09;
/// Types of virtio's capabilities (section 4.1.4).
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI: u8 = 5;
/// MSI-X message control, second byte: enable, and mask all.
const MSIX_ENABLE: u8 = 1 << 7;
const MSIX_MASK: u8 = 1 << 6;
/// In the capability for access through configuration space: BAR, offset, length, data.
const ACCESS_BAR: usize = 4;
const ACCESS_OFFSET: usize = 8;
const ACCESS_LENGTH: usize = 12;
const ACCESS_DATA: usize = 16;

/// The interrupts as the device thread makes them.
struct Interrupt(Arc<Msix>);

impl Signal for Interrupt {
    fn used(&self, queue: u16) {
        self.0.raise(Source::Queue(queue));
    }
    fn config_changed(&self) {
        self.0.raise(Source::Config);
    }
    fn flush(&self) {
        self.0.flush();
    }
}

/// Address of the first doorbell of the function in `slot` where its BAR starts out; one every four
/// bytes. A doorbell is a write of two bytes, the queue's index.
pub fn doorbells(slot: usize) -> u64 {
    home(slot).saturating_add(doorbells_offset(slot))
}

fn doorbells_offset(slot: usize) -> u64 {
    DOORBELLS.saturating_add((slot as u64).saturating_mul(DOORBELLS_OF_SLOT))
}

/// Where the BAR of `slot` starts out: one behind the other from the window's start, for the host bridge in slot
/// 0 has none. So a guest that gives BARs the lowest free addresses leaves every BAR where it was.
fn home(slot: usize) -> u64 {
    let below = (slot as u64)
        .saturating_sub(1)
        .saturating_mul(layout::PCI_BAR_SIZE);
    layout::PCI_WINDOW_START.saturating_add(below)
}

/// A virtio device as a PCI function.
///
/// The registers live here and are used by vCPUs; the device itself belongs to a
/// [`DeviceWorker`](crate::virtio::DeviceWorker), which has the [`Endpoint`].
pub struct PciTransport {
    registers: Mutex<Core>,
    function: Mutex<FunctionConfig>,
    config: Arc<ConfigSpace>,
    msix: Arc<Msix>,
    endpoint: Arc<Endpoint>,
    slot: usize,
    /// Offset of the doorbells in the BAR.
    doorbells: u64,
    /// Offsets of capabilities in configuration space.
    msix_capability: usize,
    access_capability: usize,
}

impl PciTransport {
    /// A transport for `device` in `slot`, which interrupts the guest by `sender`. `doorbells` are to be
    /// bound at [`doorbells`].
    pub fn new(
        device: &dyn VirtioDevice,
        memory: GuestMemory,
        slot: usize,
        doorbells: Arc<Doorbells>,
        sender: Arc<dyn MsiSender>,
    ) -> Arc<Self> {
        let traits = device.traits();
        let config = device.config();
        let queues = traits.queue_sizes.len();
        let msix = Arc::new(Msix::new(queues, sender));
        let signal = Arc::new(Interrupt(Arc::clone(&msix)));
        let mut function = FunctionConfig::new(Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE.saturating_add(traits.device_type as u16),
            class: class(traits.device_type),
            revision: REVISION,
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        function.set_bar(home(slot) as u32, layout::PCI_BAR_SIZE as u32);
        let doorbells_at = doorbells_offset(slot);
        let msix_capability = add_msix(&mut function, queues);
        add_structure(&mut function, TYPE_COMMON, 0, common::SIZE, &[]);
        add_structure(&mut function, TYPE_ISR, ISR, 1, &[]);
        let config_size = (config.bytes().len() as u64).min(CONFIG_MAX_SIZE);
        // Linux takes no device whose structure is empty.
        if config_size > 0 {
            add_structure(&mut function, TYPE_DEVICE, CONFIG, config_size, &[]);
        }
        let multiplier = (DOORBELL_SIZE as u32).to_le_bytes();
        let size = (DOORBELL_SIZE.saturating_mul(queues)) as u64;
        add_structure(&mut function, TYPE_NOTIFY, doorbells_at, size, &multiplier);
        let access_capability = add_structure(&mut function, TYPE_PCI, 0, 0, &[0; 4]);
        Arc::new(Self {
            registers: Mutex::new(Core::new(traits)),
            function: Mutex::new(function),
            config,
            msix,
            endpoint: Endpoint::with_doorbells(traits, doorbells, memory, signal),
            slot,
            doorbells: doorbells_at,
            msix_capability,
            access_capability,
        })
    }

    /// The slot that it was made for.
    pub fn slot(&self) -> usize {
        self.slot
    }

    /// The device's side.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    fn function(&self) -> MutexGuard<'_, FunctionConfig> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_common<T>(&self, then: impl FnOnce(&mut Common<'_>) -> T) -> T {
        let mut core = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        then(&mut Common {
            core: &mut core,
            msix: &self.msix,
            endpoint: &self.endpoint,
            config: &self.config,
        })
    }

    /// Has the device thread send what this vCPU's write let through.
    fn send_pending(&self) {
        if self.msix.has_something_to_send() {
            self.endpoint.mailbox().ring();
        }
    }

    fn ring(&self, offset: u64, data: &[u8]) {
        if let Ok(queue) = <[u8; 2]>::try_from(data) {
            let queue = u32::from(u16::from_le_bytes(queue));
            // The queue is told twice: by the place and by the value.
            if offset == u64::from(queue).saturating_mul(DOORBELL_SIZE as u64) {
                self.endpoint.notify(queue);
            }
        }
    }

    /// The access to the BAR that the guest described in configuration space (section 4.1.4.9), if `len` bytes
    /// at `offset` there are the data of one.
    fn indirect_access(&self, offset: usize, len: usize) -> Option<u64> {
        let base = self.access_capability;
        if offset != base.saturating_add(ACCESS_DATA) {
            return None;
        }
        let function = self.function();
        let long = |field: usize| function.long(base.saturating_add(field));
        let (at, length) = (long(ACCESS_OFFSET), long(ACCESS_LENGTH) as usize);
        let is_ours = function.byte(base.saturating_add(ACCESS_BAR)) == 0;
        let aligned = length == len && u64::from(at).is_multiple_of(len as u64);
        (is_ours && aligned).then_some(at.into())
    }
}

impl SavedTransport for PciTransport {
    fn save(&self, queues: &QueueStates) -> TransportState {
        TransportState {
            registers: self.with_common(|common| common.core.save(queues)),
            needs_reset: self.endpoint.needs_reset(),
            kind: KindState::Pci {
                config: self.function().bytes().to_vec(),
                msix: self.msix.save(),
            },
        }
    }

    fn restore(&self, state: &TransportState) -> Result<Option<Start>, RestoreError> {
        let KindState::Pci { config, msix } = &state.kind else {
            return Err(RestoreError::Kind);
        };
        let start = self.with_common(|common| {
            common.core.restore(&state.registers)?;
            self.endpoint.restore_needs_reset(state.needs_reset);
            Ok(self.endpoint.start(common.core))
        })?;
        self.msix.restore(msix)?;
        // The guest's own bits of it; the rest is as it was made.
        self.config_write(0, config);
        Ok(start)
    }
}

impl PciFunction for PciTransport {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        match self.indirect_access(offset, data.len()) {
            Some(at) => self.bar_read(at, data),
            None => self.function().read(offset, data),
        }
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        if let Some(at) = self.indirect_access(offset, data.len()) {
            return self.bar_write(at, data);
        }
        let mut function = self.function();
        function.write(offset, data);
        let control = function.byte(self.msix_capability.saturating_add(3));
        // With the function held, so that what is last there is what counts.
        self.msix.control(
            control & MSIX_ENABLE != 0,
            control & MSIX_MASK != 0,
            function.is_bus_master(),
        );
        drop(function);
        self.send_pending();
    }

    fn bar(&self) -> Option<u64> {
        self.function().bar()
    }

    /// As if its driver had reset the device.
    fn stop(&self) {
        self.with_common(|common| common.write(common::STATUS, 1, 0));
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        match offset {
            0..common::SIZE => {
                let value = self.with_common(|common| common.read(offset, data.len()));
                data.fill(0);
                for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
                    *to = from;
                }
            }
            ISR if data.len() == 1 => data.fill(self.msix.take_isr()),
            CONFIG..TABLE => {
                let offset = offset.saturating_sub(CONFIG);
                self.config.read(offset, data);
            }
            TABLE..PENDING => self.msix.read_table(offset.saturating_sub(TABLE), data),
            PENDING..DOORBELLS => {
                self.msix.read_pending(offset.saturating_sub(PENDING), data);
            }
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        match offset {
            0..common::SIZE => {
                let value = data
                    .iter()
                    .rev()
                    .fold(0, |value: u64, byte| value << 8 | u64::from(*byte));
                self.with_common(|common| common.write(offset, data.len(), value));
            }
            CONFIG..TABLE => self.config.write(offset.saturating_sub(CONFIG), data),
            TABLE..PENDING => {
                self.msix.write_table(offset.saturating_sub(TABLE), data);
                self.send_pending();
            }
            _ => {
                if let Some(offset) = offset.checked_sub(self.doorbells) {
                    self.ring(offset, data);
                }
            }
        }
    }
}

/// Class codes (PCI code and id assignment specification 1.11): a guest shows them to people.
fn class(device_type: DeviceType) -> u32 {
    match device_type {
        DeviceType::Net => 0x02_00_00,
        DeviceType::Block => 0x01_80_00,
        DeviceType::Console => 0x07_80_00,
        _ => 0xff_00_00,
    }
}

/// Bits 2..0 of the offsets are the BAR, which is BAR 0.
fn add_msix(function: &mut FunctionConfig, queues: usize) -> usize {
    // The size of the table, less one: one vector for each queue, and one.
    let mut body = (queues as u16).to_le_bytes().to_vec();
    body.extend((TABLE as u32).to_le_bytes());
    body.extend((PENDING as u32).to_le_bytes());
    function.add_capability(CAP_MSIX, &body, &[0, MSIX_ENABLE | MSIX_MASK])
}

/// Adds a `virtio_pci_cap` (section 4.1.4) and what follows it.
fn add_structure(
    function: &mut FunctionConfig,
    kind: u8,
    offset: u64,
    size: u64,
    more: &[u8],
) -> usize {
    const HEADER: usize = 16;
    let length = HEADER.saturating_add(more.len()) as u8;
    // Length of the capability, type, BAR, id, two bytes of nothing.
    let mut body = vec![length, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((size as u32).to_le_bytes());
    body.extend(more);
    // BAR, offset and length are the guest's to write where it accesses the BAR through them.
    let writable: &[u8] = match kind {
        TYPE_PCI => &[
            0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        ],
        _ => &[],
    };
    function.add_capability(CAP_VENDOR, &body, writable)
}

#[cfg(test)]
mod started_tests;
#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;

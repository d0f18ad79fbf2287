//! Just enough of a virtio driver (virtio 1.2, sections 2 and 3), by polling.

pub mod hostile;
mod mmio;
mod pci;

use core::sync::atomic::{Ordering, fence};

use crate::cmdline::Cmdline;
use crate::machine::{read32, wait_for, write16, write32};
use mmio::Mmio;
use pci::Pci;

/// How a device is reached.
trait Transport {
    /// The status register.
    fn status(&self) -> u32;
    /// Writes it.
    fn set_status(&self, status: u32);
    /// 32 of the features that the device offers.
    fn features(&self, half: u32) -> u32;
    /// Accepts 32 features.
    fn accept(&self, half: u32, features: u32);
    /// Largest size of queue `index`; zero if there is none.
    fn queue_max(&self, index: u32) -> usize;
    /// Makes queue `index` ready, with its three areas. Where it is rung, unless the device refused it.
    fn set_up_queue(&self, index: u32, size: u32, areas: [u64; 3]) -> Option<Doorbell>;
    /// Takes the interrupts that came: bit 0 for queues, bit 1 for the configuration.
    fn take_interrupts(&self) -> u32;
    /// Where the device's configuration space is.
    fn config(&self) -> u64;
}

/// Where a queue is rung with its index.
#[derive(Clone, Copy)]
enum Doorbell {
    Wide(u64),
    Narrow(u64),
}

enum AnyTransport {
    Mmio(Mmio),
    Pci(Pci),
}

impl core::ops::Deref for AnyTransport {
    type Target = dyn Transport;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Mmio(transport) => transport,
            Self::Pci(transport) => transport,
        }
    }
}

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const VERSION_1: u64 = 1 << 32;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;

/// Descriptors in a ring of the probe.
pub const RING: usize = 16;
const RINGS: usize = 5;

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[repr(C, align(4096))]
struct RingMemory {
    descriptors: [Descriptor; RING],
    avail_flags: u16,
    avail_index: u16,
    avail: [u16; RING],
    used_event: u16,
    used: Used,
}

#[repr(C, align(4))]
struct Used {
    flags: u16,
    index: u16,
    ring: [(u32, u32); RING],
    avail_event: u16,
}

const EMPTY: RingMemory = RingMemory {
    descriptors: [Descriptor {
        address: 0,
        len: 0,
        flags: 0,
        next: 0,
    }; RING],
    avail_flags: 0,
    avail_index: 0,
    avail: [0; RING],
    used_event: 0,
    used: Used {
        flags: 0,
        index: 0,
        ring: [(0, 0); RING],
        avail_event: 0,
    },
};

static mut RING_MEMORY: [RingMemory; RINGS] = [EMPTY; RINGS];

/// A piece of memory for the device: to read, or to write.
#[derive(Clone, Copy)]
pub enum Buffer {
    /// The device reads it.
    Out(*const u8, usize),
    /// The device writes it.
    In(*mut u8, usize),
}

impl Buffer {
    /// A buffer that the device reads.
    pub fn out(bytes: &[u8]) -> Self {
        Self::Out(bytes.as_ptr(), bytes.len())
    }

    /// A buffer that the device writes.
    pub fn into(bytes: &mut [u8]) -> Self {
        Self::In(bytes.as_mut_ptr(), bytes.len())
    }
}

/// A device whose driver is this program.
pub struct Device {
    transport: AnyTransport,
}

impl Device {
    /// The `index`th device of type `id`, reset and with the features `wanted` (of those that it offers)
    /// accepted; `finish` makes it live. Devices are in the windows on the command line or, without any there,
    /// on the PCI bus.
    pub fn find(
        cmdline: &Cmdline,
        id: u32,
        index: usize,
        wanted: u64,
    ) -> Result<Self, &'static str> {
        let transport = if cmdline.virtio_windows().next().is_some() {
            Mmio::find(cmdline, id, index).map(AnyTransport::Mmio)
        } else {
            Pci::find(id, index).map(AnyTransport::Pci)
        };
        let transport = transport.ok_or("no such device on the command line or the PCI bus")?;
        transport.set_status(0);
        wait_for(|| transport.status() == 0)?;
        transport.set_status(ACKNOWLEDGE | DRIVER);
        let device = Self { transport };
        let accepted = device.features() & (wanted | VERSION_1);
        if accepted & VERSION_1 == 0 {
            return Err("the device does not offer VERSION_1");
        }
        let transport = &device.transport;
        for half in 0..2 {
            transport.accept(half, (accepted >> (32 * half)) as u32);
        }
        transport.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if transport.status() & FEATURES_OK == 0 {
            return Err("the device refused the features");
        }
        Ok(device)
    }

    /// The features that the device offers.
    pub fn features(&self) -> u64 {
        u64::from(self.transport.features(1)) << 32 | u64::from(self.transport.features(0))
    }

    /// Sets up virtqueue `index` on the `slot`th ring memory.
    pub fn queue(&self, index: u32, slot: usize) -> Result<Queue, &'static str> {
        if self.transport.queue_max(index) < RING {
            return Err("the queue is missing or too small");
        }
        // SAFETY: single-threaded, and each slot is used by one queue.
        let memory = unsafe { (&raw mut RING_MEMORY).cast::<RingMemory>().add(slot) };
        // SAFETY: as above; a fresh ring.
        let areas = unsafe {
            memory.write(EMPTY);
            [
                &raw const (*memory).descriptors as u64,
                &raw const (*memory).avail_flags as u64,
                &raw const (*memory).used as u64,
            ]
        };
        let doorbell = self.transport.set_up_queue(index, RING as u32, areas);
        Ok(Queue {
            memory,
            doorbell: doorbell.ok_or("the device refused the queue")?,
            index,
            next: 0,
            seen: 0,
        })
    }

    /// The driver is ready: the device goes live.
    pub fn finish(&self) -> Result<(), &'static str> {
        let live = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.transport.set_status(live);
        if self.transport.status() == live {
            Ok(())
        } else {
            Err("the device did not go live")
        }
    }

    /// Takes the interrupts that came: bit 0 for queues, bit 1 for the configuration.
    pub fn take_interrupts(&self) -> u32 {
        self.transport.take_interrupts()
    }

    /// What the status register says.
    pub fn status(&self) -> u32 {
        self.transport.status()
    }

    /// A number of eight bytes in the device's configuration space.
    pub fn config64(&self, offset: u64) -> u64 {
        u64::from(self.config32(offset)) | u64::from(self.config32(offset + 4)) << 32
    }

    /// A byte of the device's configuration space.
    pub fn config8(&self, offset: u64) -> u8 {
        // SAFETY: within the device's window.
        unsafe { ((self.transport.config() + offset) as *const u8).read_volatile() }
    }

    /// A word of the device's configuration space.
    pub fn config32(&self, offset: u64) -> u32 {
        read32(self.transport.config() + offset)
    }

    /// Writes a word of the device's configuration space.
    pub fn set_config32(&self, offset: u64, value: u32) {
        write32(self.transport.config() + offset, value);
    }
}

/// One virtqueue. A chain lives in the descriptors from its slot on.
pub struct Queue {
    memory: *mut RingMemory,
    doorbell: Doorbell,
    index: u32,
    next: u16,
    seen: u16,
}

impl Queue {
    /// Offers the chain `buffers`, whose first descriptor is `head`, without a notification.
    pub fn add(&mut self, head: u16, buffers: &[Buffer]) {
        // SAFETY: the ring is ours; the device only reads what avail names, which is published
        // last. Indices stay below RING by the callers' constants and the mask.
        unsafe {
            let ring = &mut *self.memory;
            for (position, buffer) in buffers.iter().enumerate() {
                let slot = (head as usize + position) % RING;
                let more = if position + 1 < buffers.len() {
                    DESC_NEXT
                } else {
                    0
                };
                let (address, len, write) = match *buffer {
                    Buffer::Out(at, len) => (at as u64, len as u32, 0),
                    Buffer::In(at, len) => (at as u64, len as u32, DESC_WRITE),
                };
                (&raw mut ring.descriptors[slot]).write_volatile(Descriptor {
                    address,
                    len,
                    flags: more | write,
                    next: ((slot + 1) % RING) as u16,
                });
            }
            (&raw mut ring.avail[self.next as usize % RING]).write_volatile(head);
            self.next = self.next.wrapping_add(1);
            fence(Ordering::SeqCst);
            (&raw mut ring.avail_index).write_volatile(self.next);
            fence(Ordering::SeqCst);
        }
    }

    /// Tells the device to look.
    pub fn kick(&self) {
        match self.doorbell {
            Doorbell::Wide(address) => write32(address, self.index),
            Doorbell::Narrow(address) => write16(address, self.index as u16),
        }
    }

    /// The next chain that the device is done with: its head and the bytes written.
    pub fn take(&mut self) -> Option<(u16, usize)> {
        // SAFETY: reading what the device publishes, index first.
        unsafe {
            if (&raw const (*self.memory).used.index).read_volatile() == self.seen {
                return None;
            }
            fence(Ordering::SeqCst);
            let slot = self.seen as usize % RING;
            let (head, len) = (&raw const (*self.memory).used.ring[slot]).read_volatile();
            self.seen = self.seen.wrapping_add(1);
            Some((head as u16, len as usize))
        }
    }

    /// Offers one chain, notifies, and waits for its end: the bytes written.
    pub fn call(&mut self, buffers: &[Buffer]) -> Result<usize, &'static str> {
        self.add(0, buffers);
        self.kick();
        let mut done = None;
        wait_for(|| {
            done = self.take();
            done.is_some()
        })?;
        done.map(|(_, len)| len).ok_or("no answer")
    }
}

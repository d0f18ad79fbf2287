//! Just enough of a virtio-mmio driver (virtio 1.2, section 4.2), by polling.

use core::sync::atomic::{Ordering, fence};

use crate::cmdline::Cmdline;
use crate::machine::{read32, wait_for, write32};

/// Register offsets (virtio 1.2, table 4.1).
mod reg {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const CONFIG: u64 = 0x100;
}

const MAGIC: u32 = 0x7472_6976;
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
    base: u64,
}

impl Device {
    /// The `index`th device of type `id` among those on the command line, reset and with the
    /// features `wanted` (of those that it offers) accepted; `finish` makes it live.
    pub fn find(
        cmdline: &Cmdline,
        id: u32,
        index: usize,
        wanted: u64,
    ) -> Result<Self, &'static str> {
        let base = cmdline
            .virtio_windows()
            .filter(|&base| {
                read32(base + reg::MAGIC) == MAGIC
                    && read32(base + reg::VERSION) == 2
                    && read32(base + reg::DEVICE_ID) == id
            })
            .nth(index)
            .ok_or("no such device on the command line")?;
        let device = Self { base };
        device.set(reg::STATUS, 0);
        wait_for(|| device.get(reg::STATUS) == 0)?;
        device.set(reg::STATUS, ACKNOWLEDGE | DRIVER);
        let accepted = device.features() & (wanted | VERSION_1);
        if accepted & VERSION_1 == 0 {
            return Err("the device does not offer VERSION_1");
        }
        for half in 0..2 {
            device.set(reg::DRIVER_FEATURES_SEL, half);
            device.set(reg::DRIVER_FEATURES, (accepted >> (32 * half)) as u32);
        }
        device.set(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if device.get(reg::STATUS) & FEATURES_OK == 0 {
            return Err("the device refused the features");
        }
        Ok(device)
    }

    /// The features that the device offers.
    pub fn features(&self) -> u64 {
        self.set(reg::DEVICE_FEATURES_SEL, 0);
        let low = self.get(reg::DEVICE_FEATURES);
        self.set(reg::DEVICE_FEATURES_SEL, 1);
        u64::from(self.get(reg::DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    /// Sets up virtqueue `index` on the `slot`th ring memory.
    pub fn queue(&self, index: u32, slot: usize) -> Result<Queue, &'static str> {
        self.set(reg::QUEUE_SEL, index);
        if (self.get(reg::QUEUE_NUM_MAX) as usize) < RING {
            return Err("the queue is missing or too small");
        }
        // SAFETY: single-threaded, and each slot is used by one queue.
        let memory = unsafe { (&raw mut RING_MEMORY).cast::<RingMemory>().add(slot) };
        // SAFETY: as above; a fresh ring.
        let (desc, avail, used) = unsafe {
            memory.write(EMPTY);
            (
                &raw const (*memory).descriptors as u64,
                &raw const (*memory).avail_flags as u64,
                &raw const (*memory).used as u64,
            )
        };
        self.set(reg::QUEUE_NUM, RING as u32);
        for (register, address) in [
            (reg::QUEUE_DESC, desc),
            (reg::QUEUE_DRIVER, avail),
            (reg::QUEUE_DEVICE, used),
        ] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(reg::QUEUE_READY, 1);
        if self.get(reg::QUEUE_READY) != 1 {
            return Err("the device refused the queue");
        }
        Ok(Queue {
            memory,
            notify: self.base + reg::QUEUE_NOTIFY,
            index,
            next: 0,
            seen: 0,
        })
    }

    /// The driver is ready: the device goes live.
    pub fn finish(&self) -> Result<(), &'static str> {
        let live = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.set(reg::STATUS, live);
        if self.get(reg::STATUS) == live {
            Ok(())
        } else {
            Err("the device did not go live")
        }
    }

    /// Takes and acknowledges the pending interrupt bits.
    pub fn take_interrupts(&self) -> u32 {
        let bits = self.get(reg::INTERRUPT_STATUS);
        self.set(reg::INTERRUPT_ACK, bits);
        bits
    }

    /// A byte of the device's configuration space.
    pub fn config8(&self, offset: u64) -> u8 {
        // SAFETY: within the device's window.
        unsafe { ((self.base + reg::CONFIG + offset) as *const u8).read_volatile() }
    }

    /// A word of the device's configuration space.
    pub fn config32(&self, offset: u64) -> u32 {
        self.get(reg::CONFIG + offset)
    }

    /// Writes a word of the device's configuration space.
    pub fn set_config32(&self, offset: u64, value: u32) {
        self.set(reg::CONFIG + offset, value);
    }

    fn get(&self, register: u64) -> u32 {
        read32(self.base + register)
    }

    fn set(&self, register: u64, value: u32) {
        write32(self.base + register, value);
    }
}

/// One virtqueue. A chain lives in the descriptors from its slot on.
pub struct Queue {
    memory: *mut RingMemory,
    notify: u64,
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
        write32(self.notify, self.index);
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

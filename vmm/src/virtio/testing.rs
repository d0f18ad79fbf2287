//! A driver for tests: real rings in guest memory, filled honestly or not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::{Bytes as _, GuestAddress};

use super::device::{self, DeviceIo, EVENT_IDX, Event, Queues, VERSION_1, VirtioDevice};
use super::queue::{Progress, Queue, QueueState, QueueStates, Signal};
use crate::event_loop::{EventLoop, Token};
use crate::memory::GuestMemory;

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Rings of queue `n` lie at `RINGS + n * 0x4000`; data may lie from `DATA` on.
const RINGS: u64 = 0x08_0000;
pub const DATA: u64 = 0x20_0000;
/// Memory ends here.
pub const END: u64 = 0x40_0000;

pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), END as usize)]).unwrap()
}

/// The driver's side of one queue.
pub struct Driver {
    pub memory: GuestMemory,
    pub state: QueueState,
    next_descriptor: u16,
    available: u16,
    seen: u16,
}

impl Driver {
    pub fn new(memory: &GuestMemory, index: u16, size: u16) -> Self {
        let base = RINGS + u64::from(index) * 0x4000;
        Self {
            memory: memory.clone(),
            state: QueueState {
                size,
                descriptors: base,
                available: base + 0x2000,
                used: base + 0x3000,
                next_available: 0,
                next_used: 0,
            },
            next_descriptor: 0,
            available: 0,
            seen: 0,
        }
    }

    pub fn queue(&self, max: u16, event_idx: bool) -> Queue {
        Queue::new(0, &self.state, max, event_idx, &self.memory).unwrap()
    }

    /// Writes a descriptor to the table at `table`.
    pub fn describe_at(&self, table: u64, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory
            .write_slice(&bytes, GuestAddress(table + u64::from(i) * 16))
            .unwrap();
    }

    pub fn describe(&self, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.describe_at(self.state.descriptors, i, addr, len, flags, next);
    }

    /// Makes the chain that starts at `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = self.available % self.state.size;
        self.put16(self.state.available + 4 + u64::from(slot) * 2, head);
        self.available = self.available.wrapping_add(1);
        self.put16(self.state.available + 2, self.available);
    }

    /// Describes and offers a chain of (address, length, device-writable) and returns its head.
    pub fn add(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let size = self.state.size;
        let head = self.next_descriptor;
        for (n, &(addr, len, writable)) in buffers.iter().enumerate() {
            let i = self.next_descriptor;
            self.next_descriptor = (i + 1) % size;
            let more = if n + 1 < buffers.len() { NEXT } else { 0 };
            let write = if writable { WRITE } else { 0 };
            self.describe(i, addr, len, more | write, self.next_descriptor);
        }
        self.offer(head);
        head
    }

    /// The next completion, if there is one: head and length.
    pub fn used_pending(&self) -> Option<(u32, u32)> {
        if self.get16(self.state.used + 2) == self.seen {
            return None;
        }
        let slot = u64::from(self.seen % self.state.size);
        let entry = self.state.used + 4 + slot * 8;
        Some((self.get32(entry), self.get32(entry + 4)))
    }

    /// Takes the next completion.
    pub fn used(&mut self) -> Option<(u32, u32)> {
        let used = self.used_pending()?;
        self.seen = self.seen.wrapping_add(1);
        Some(used)
    }

    /// avail_event: the chain for which the device wants a doorbell.
    pub fn wanted_doorbell(&self) -> u16 {
        self.get16(self.state.used + 4 + 8 * u64::from(self.state.size))
    }

    /// used_event: the completion after which the driver wants an interrupt.
    pub fn want_interrupt_after(&self, index: u16) {
        self.put16(
            self.state.available + 4 + 2 * u64::from(self.state.size),
            index,
        );
    }

    pub fn set_available_index(&mut self, index: u16) {
        self.available = index;
        self.put16(self.state.available + 2, index);
    }

    pub fn put16(&self, address: u64, value: u16) {
        self.put(address, &value.to_le_bytes());
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn get16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.get(address, 2).try_into().unwrap())
    }

    fn get32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.get(address, 4).try_into().unwrap())
    }
}

/// Counts signals instead of interrupting anybody.
#[derive(Default)]
pub struct Counter {
    used: AtomicUsize,
    config: AtomicUsize,
}

impl Counter {
    pub fn count(&self) -> usize {
        self.used.load(Ordering::SeqCst)
    }

    pub fn config_changes(&self) -> usize {
        self.config.load(Ordering::SeqCst)
    }
}

impl Signal for Counter {
    fn used(&self, _: u16) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
}

/// A started device with a driver for each of its queues, and no thread, transport or KVM.
pub struct Rig<D> {
    pub device: D,
    pub drivers: Vec<Driver>,
    pub signal: Arc<Counter>,
    pub events: EventLoop,
    pub memory: GuestMemory,
}

impl<D: VirtioDevice> Rig<D> {
    pub fn new(device: D) -> Self {
        Self::with(device, 0, 16)
    }

    pub fn with(device: D, features: u64, size: u16) -> Self {
        Self::on(memory(), device, features, size)
    }

    pub fn on(memory: GuestMemory, device: D, features: u64, size: u16) -> Self {
        let count = device.traits().queue_sizes.len() as u16;
        let mut rig = Self {
            device,
            drivers: (0..count).map(|i| Driver::new(&memory, i, size)).collect(),
            signal: Arc::default(),
            events: EventLoop::new().unwrap(),
            memory,
        };
        let mut states = QueueStates::default();
        for (state, driver) in states.iter_mut().zip(&rig.drivers) {
            *state = Some(driver.state);
        }
        rig.start(&states, features);
        rig
    }

    pub fn start(&mut self, states: &QueueStates, features: u64) {
        let mut queues = Queues::default();
        for (i, state) in states.iter().enumerate() {
            queues[i] =
                state.map(|state| Queue::new(i as u16, &state, 256, true, &self.memory).unwrap());
        }
        let io = DeviceIo {
            memory: self.memory.clone(),
            signal: Arc::clone(&self.signal) as Arc<dyn Signal>,
            events: self.events.registrar(0),
        };
        self.device
            .start(queues, features | EVENT_IDX | VERSION_1, io)
            .unwrap();
    }

    /// Handles one event to its end, or until a rate limit holds it back.
    pub fn handle(&mut self, event: Event) -> Result<(), device::Error> {
        for _ in 0..10_000 {
            if self.device.handle(event)? != Progress::More {
                return Ok(());
            }
        }
        panic!("the device never gets done with {event:?}");
    }

    pub fn kick(&mut self, queue: u16) {
        self.handle(Event::Queue(queue)).unwrap();
    }

    /// Handles what the device's own descriptors report, until nothing more comes.
    pub fn poll(&mut self) {
        for _ in 0..1000 {
            let count = self.events.wait(Some(std::time::Duration::ZERO)).unwrap();
            if count == 0 {
                return;
            }
            for i in 0..count {
                if let Some((Token::Device { key, .. }, events)) = self.events.event(i) {
                    self.handle(Event::Ready { key, events }).unwrap();
                }
            }
        }
        panic!("the device's descriptors never become quiet");
    }
}

//! What no honest driver does to a queue.

use core::sync::atomic::{Ordering, fence};

use super::{
    DESC_NEXT, DESC_WRITE, Descriptor, Device, EMPTY, Queue, RING, RING_MEMORY, RingMemory,
};

const DESC_INDIRECT: u16 = 4;
/// Guest-physical: between RAM and the devices, in which there is nothing.
const HOLE: u64 = 0xc800_0000;
/// Entries of an indirect table whose buffers are larger than 4 GiB together.
const MANY: usize = 48;
const LARGE: u32 = 96 << 20;

/// A queue that cannot be: what is made of its size, descriptor table, available and used ring.
pub type Layout = (&'static str, fn(u32, [u64; 3]) -> (u32, [u64; 3]));

/// Queues that cannot be.
pub const LAYOUTS: [Layout; 9] = [
    ("size 0", |_, areas| (0, areas)),
    ("size 3", |_, areas| (3, areas)),
    ("size 65536", |_, areas| (65536, areas)),
    ("misaligned table", |size, [a, b, c]| (size, [a + 8, b, c])),
    ("misaligned used ring", |size, [a, b, c]| {
        (size, [a, b, c + 1])
    }),
    ("table in the hole", |size, [_, b, c]| (size, [HOLE, b, c])),
    ("used ring in the hole", |size, [a, b, _]| {
        (size, [a, b, HOLE])
    }),
    ("rings beyond all memory", |size, [a, _, _]| {
        (size, [a, !0xfff, !0xffff])
    }),
    ("overlapping rings", |size, [a, _, c]| (size, [a, c, c])),
];

/// A chain that cannot be, or that no device should believe: how it is written to the ring.
#[derive(Clone, Copy)]
pub struct Chain {
    /// What is wrong with it.
    pub name: &'static str,
    /// Whether the device must stop, and wait for a reset.
    pub breaks: bool,
    write: fn(&mut Queue),
}

/// Chains that cannot be.
pub const CHAINS: [Chain; 12] = [
    broken("a descriptor that is its own next", |queue| {
        queue.put(0, buffer(0, DESC_NEXT, 0));
        queue.publish(0);
    }),
    broken("a loop of two", |queue| {
        queue.put(0, buffer(0, DESC_NEXT, 1));
        queue.put(1, buffer(1, DESC_NEXT, 0));
        queue.publish(0);
    }),
    broken("a next out of range", |queue| {
        queue.put(0, buffer(0, DESC_NEXT, RING as u16));
        queue.publish(0);
    }),
    broken("a head out of range", |queue| queue.publish(u16::MAX)),
    broken("an available index that jumps", |queue| {
        queue.jump(RING as u16 + 1)
    }),
    broken("an indirect table in an indirect table", |queue| {
        let table = queue.table();
        queue.put(0, table_of(table, 1));
        queue.put(8, table_of(table, 1));
        queue.publish(0);
    }),
    broken("an indirect table of odd length", |queue| {
        let table = queue.table();
        queue.put(
            0,
            Descriptor {
                len: 17,
                ..table_of(table, 1)
            },
        );
        queue.publish(0);
    }),
    broken("an indirect table in the hole", |queue| {
        queue.put(0, table_of(HOLE, 1));
        queue.publish(0);
    }),
    broken("an indirect table of nothing", |queue| {
        let table = queue.table();
        queue.put(0, table_of(table, 0));
        queue.publish(0);
    }),
    odd("a buffer in the hole", |queue| {
        queue.put(
            0,
            Descriptor {
                address: HOLE,
                ..buffer(0, DESC_WRITE, 0)
            },
        );
        queue.publish(0);
    }),
    odd("a buffer that wraps around", |queue| {
        queue.put(
            0,
            Descriptor {
                address: !0xfff,
                len: u32::MAX,
                ..buffer(0, DESC_WRITE, 0)
            },
        );
        queue.publish(0);
    }),
    odd("a chain over 4 GiB", |queue| {
        let table = (&raw mut LARGE_TABLE).cast::<Descriptor>();
        for at in 0..MANY {
            let more = if at + 1 < MANY { DESC_NEXT } else { 0 };
            let entry = Descriptor {
                address: 1 << 20,
                len: LARGE,
                flags: more | DESC_WRITE,
                next: at as u16 + 1,
            };
            // SAFETY: single-threaded, within the table, and the device only reads it.
            unsafe { table.add(at).write_volatile(entry) };
        }
        queue.put(0, table_of(table as u64, MANY as u32));
        queue.publish(0);
    }),
];

static mut LARGE_TABLE: [Descriptor; MANY] = [Descriptor {
    address: 0,
    len: 0,
    flags: 0,
    next: 0,
}; MANY];
static mut SPARE: [u8; 4096] = [0; 4096];

const fn broken(name: &'static str, write: fn(&mut Queue)) -> Chain {
    Chain {
        name,
        breaks: true,
        write,
    }
}

const fn odd(name: &'static str, write: fn(&mut Queue)) -> Chain {
    Chain {
        name,
        breaks: false,
        write,
    }
}

/// A descriptor of 64 bytes of memory that nobody needs.
fn buffer(slot: u64, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address: &raw const SPARE as u64 + slot * 64,
        len: 64,
        flags,
        next,
    }
}

fn table_of(address: u64, entries: u32) -> Descriptor {
    Descriptor {
        address,
        len: entries * 16,
        flags: DESC_INDIRECT,
        next: 0,
    }
}

impl Device {
    /// Sets up virtqueue `index` as `layout` has it.
    pub fn broken_queue(&self, index: u32, (_, layout): &Layout) {
        let memory = (&raw mut RING_MEMORY).cast::<RingMemory>();
        // SAFETY: single-threaded; a fresh ring that nobody else uses.
        let areas = unsafe {
            memory.write(EMPTY);
            [
                &raw const (*memory).descriptors as u64,
                &raw const (*memory).avail_flags as u64,
                &raw const (*memory).used as u64,
            ]
        };
        let (size, areas) = layout(RING as u32, areas);
        self.transport.set_up_queue(index, size, areas);
    }
}

impl Queue {
    /// Writes `chain` to the ring, and tells the device to look.
    pub fn attack(&mut self, chain: &Chain) {
        (chain.write)(self);
        self.kick();
    }

    fn put(&mut self, slot: usize, descriptor: Descriptor) {
        // SAFETY: the ring is ours, and the callers' slots are in it.
        unsafe { (&raw mut (*self.memory).descriptors[slot]).write_volatile(descriptor) }
    }

    /// Where the second half of the descriptors is, for a table.
    fn table(&self) -> u64 {
        // SAFETY: only its address is taken.
        unsafe { &raw const (*self.memory).descriptors[8] as u64 }
    }

    fn publish(&mut self, head: u16) {
        // SAFETY: the ring is ours.
        unsafe {
            let slot = self.next as usize % RING;
            (&raw mut (*self.memory).avail[slot]).write_volatile(head);
        }
        self.jump(1);
    }

    /// Makes that many more chains available, whatever is in the ring.
    fn jump(&mut self, count: u16) {
        self.next = self.next.wrapping_add(count);
        fence(Ordering::SeqCst);
        // SAFETY: the ring is ours.
        unsafe { (&raw mut (*self.memory).avail_index).write_volatile(self.next) };
        fence(Ordering::SeqCst);
    }
}

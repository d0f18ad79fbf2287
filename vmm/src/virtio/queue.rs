//! Split virtqueues (virtio 1.2, section 2.7): `virtio-queue` does the ring arithmetic; this layer
//! checks what the driver configured, tells a malformed chain from a finished one, and bounds the
//! work done at a time.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_queue::{Queue as Ring, QueueOwnedT as _, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, Permissions};

use super::chain::{self, Chain};
use crate::memory::GuestMemory;

/// Most queues that a device has: eight pairs of a network card, and its control queue.
pub const MAX_QUEUES: usize = 17;

/// All that a queue is, as plain data. A fresh one has both indices zero.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Number of descriptors: a power of two.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring (the driver's area).
    pub available: u64,
    /// Guest-physical address of the used ring (the device's area).
    pub used: u64,
    /// The next entry to take from the available ring.
    pub next_available: u16,
    /// The next entry to write in the used ring.
    pub next_used: u16,
}

/// The queues of a device by index; `None` for one that the driver does not use.
pub type QueueStates = [Option<QueueState>; MAX_QUEUES];

/// What is wrong with a queue. All of it is the driver's doing and ends in NEEDS_RESET.
#[derive(Debug, Error)]
pub enum Error {
    /// The size is zero, no power of two, or more than the device offers.
    #[error("queue {queue}: size {size} is not a power of two between 1 and {max}")]
    Size {
        /// Index of the queue.
        queue: u16,
        /// The size asked for.
        size: u16,
        /// The largest one.
        max: u16,
    },
    /// A ring is misaligned.
    #[error("queue {queue}: {part} at {address:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// Index of the queue.
        queue: u16,
        /// Which part of the queue.
        part: &'static str,
        /// Where it is.
        address: u64,
        /// What its address must be a multiple of.
        align: u64,
    },
    /// A ring is not wholly in guest memory.
    #[error("queue {queue}: {part} at {address:#x}+{len:#x} is not guest memory")]
    OutOfMemory {
        /// Index of the queue.
        queue: u16,
        /// Which part of the queue.
        part: &'static str,
        /// Where it is.
        address: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Two rings overlap.
    #[error("queue {queue}: {first} and {second} overlap")]
    Overlap {
        /// Index of the queue.
        queue: u16,
        /// One part of the queue.
        first: &'static str,
        /// The other one.
        second: &'static str,
    },
    /// The driver's index names more chains than there are, or a ring became unreadable.
    #[error("queue {queue}: {source}")]
    Ring {
        /// Index of the queue.
        queue: u16,
        /// What `virtio-queue` says.
        source: virtio_queue::Error,
    },
    /// A descriptor chain is malformed.
    #[error("queue {queue}: {source}")]
    Chain {
        /// Index of the queue.
        queue: u16,
        /// What is wrong with it.
        source: chain::Error,
    },
}

/// How a device tells its driver that there is news. A transport makes an interrupt of it; a test
/// counts. Called on the device thread alone: a transport may do there what no vCPU thread may.
pub trait Signal: Send + Sync {
    /// The used ring of `queue` has news that the driver wants to hear about.
    fn used(&self, queue: u16);
    /// The configuration space, or the status register by itself, has changed.
    fn config_changed(&self);
    /// Sends what the driver did not let through before and does now.
    fn flush(&self) {}
}

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Used; that many bytes of its writable buffers were written.
    Used(u32),
    /// As `Used`; and it was so much work that the other devices shall have their turn.
    Enough(u32),
    /// The device works on it and completes it later, by [`Queue::complete`].
    Taken,
    /// As `Taken`; and the other devices shall have their turn.
    TakenEnough,
    /// There is nothing to put in it now: it stays available, and processing ends.
    Keep,
    /// It stays available until a rate limit lets it through, at that time; processing ends.
    Later(Instant),
}

/// Whether there is more to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All that could be done is done; the next event tells when to go on.
    Done,
    /// The budget is used up: call again after the other devices had their turn.
    More,
    /// A rate limit stands in the way: call again at that time.
    Later(Instant),
}

impl Progress {
    /// Whichever has to go on sooner.
    pub fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::More, _) | (_, Self::More) => Self::More,
            (Self::Later(one), Self::Later(other)) => Self::Later(one.min(other)),
            (Self::Later(at), Self::Done) | (Self::Done, Self::Later(at)) => Self::Later(at),
            (Self::Done, Self::Done) => Self::Done,
        }
    }
}

/// A running queue.
pub struct Queue {
    ring: Ring,
    index: u16,
    /// Something was completed since the driver was last told.
    news: bool,
    /// Tell the driver whatever it asked for: see [`Queue::complete_together`].
    insist: bool,
    /// The chain being processed, kept for its buffers' room.
    chain: Chain,
}

impl Queue {
    /// A queue running from `state`, which is checked whole: it comes from a guest or a file.
    ///
    /// # Errors
    /// When the size or the place of a ring is not what the spec allows.
    pub fn new(
        index: u16,
        state: &QueueState,
        max_size: u16,
        event_idx: bool,
        memory: &GuestMemory,
    ) -> Result<Self, Error> {
        let size = state.size;
        let wrong_size = || Error::Size {
            queue: index,
            size,
            max: max_size,
        };
        if !size.is_power_of_two() || size > max_size {
            return Err(wrong_size());
        }
        let n = u64::from(size);
        // Lengths with the event fields at the ends (sections 2.7.5, 2.7.6, 2.7.8).
        let parts = [
            ("descriptor table", state.descriptors, n * 16, 16),
            ("available ring", state.available, n * 2 + 6, 2),
            ("used ring", state.used, n * 8 + 6, 4),
        ];
        for &(part, address, len, align) in &parts {
            if !address.is_multiple_of(align) {
                return Err(Error::Misaligned {
                    queue: index,
                    part,
                    address,
                    align,
                });
            }
            if !memory.check_range(GuestAddress(address), len as usize, Permissions::ReadWrite) {
                return Err(Error::OutOfMemory {
                    queue: index,
                    part,
                    address,
                    len,
                });
            }
        }
        for (i, &(first, a, a_len, _)) in parts.iter().enumerate() {
            for &(second, b, b_len, _) in parts.iter().skip(i + 1) {
                // Both lie in guest memory, so neither end wraps.
                if a < b.saturating_add(b_len) && b < a.saturating_add(a_len) {
                    return Err(Error::Overlap {
                        queue: index,
                        first,
                        second,
                    });
                }
            }
        }
        let at = |source| Error::Ring {
            queue: index,
            source,
        };
        let mut ring = Ring::new(size).map_err(at)?;
        ring.try_set_desc_table_address(GuestAddress(state.descriptors))
            .map_err(at)?;
        ring.try_set_avail_ring_address(GuestAddress(state.available))
            .map_err(at)?;
        ring.try_set_used_ring_address(GuestAddress(state.used))
            .map_err(at)?;
        ring.set_event_idx(event_idx);
        ring.set_next_avail(state.next_available);
        ring.set_next_used(state.next_used);
        ring.set_ready(true);
        Ok(Self {
            ring,
            index,
            news: false,
            insist: false,
            chain: Chain::default(),
        })
    }

    /// The queue as plain data, from which it can run on.
    pub fn state(&self) -> QueueState {
        QueueState {
            size: self.ring.size(),
            descriptors: self.ring.desc_table(),
            available: self.ring.avail_ring(),
            used: self.ring.used_ring(),
            next_available: self.ring.next_avail(),
            next_used: self.ring.next_used(),
        }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Hands every available chain to `handle`, `budget` of them at most, and signals.
    ///
    /// # Errors
    /// When the driver broke the queue, or what `handle` says; the device then needs a reset.
    pub fn process(
        &mut self,
        memory: &GuestMemory,
        signal: &dyn Signal,
        budget: usize,
        mut handle: impl FnMut(&Chain) -> Result<Verdict, chain::Error>,
    ) -> Result<Progress, Error> {
        let mut chain = std::mem::take(&mut self.chain);
        let result = self.process_with(&mut chain, memory, budget, &mut handle);
        self.chain = chain;
        self.signal(memory, signal)?;
        result
    }

    fn process_with(
        &mut self,
        chain: &mut Chain,
        memory: &GuestMemory,
        budget: usize,
        handle: &mut dyn FnMut(&Chain) -> Result<Verdict, chain::Error>,
    ) -> Result<Progress, Error> {
        for _ in 0..budget {
            if !self.pop(memory, chain)? {
                if self.rearm(memory)? {
                    continue;
                }
                return Ok(Progress::Done);
            }
            match handle(chain).map_err(|source| self.broken(source))? {
                Verdict::Used(len) => self.complete(memory, chain.head(), len)?,
                Verdict::Enough(len) => {
                    self.complete(memory, chain.head(), len)?;
                    return Ok(Progress::More);
                }
                Verdict::Taken => {}
                Verdict::TakenEnough => return Ok(Progress::More),
                Verdict::Keep => {
                    self.put_back(1);
                    return Ok(Progress::Done);
                }
                Verdict::Later(at) => {
                    self.put_back(1);
                    return Ok(Progress::Later(at));
                }
            }
        }
        Ok(Progress::More)
    }

    /// Takes the next available chain into `chain`; false when there is none.
    ///
    /// # Errors
    /// When the available index jumped or the chain is malformed.
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, Error> {
        let index = self.index;
        let next = self
            .ring
            .iter(memory)
            .map_err(|source| Error::Ring {
                queue: index,
                source,
            })?
            .next();
        match next {
            None => Ok(false),
            Some(descriptors) => {
                chain
                    .fill(memory, descriptors)
                    .map_err(|source| self.broken(source))?;
                Ok(true)
            }
        }
    }

    /// Makes the last `count` chains taken available again.
    pub fn put_back(&mut self, count: u16) {
        self.ring
            .set_next_avail(self.ring.next_avail().wrapping_sub(count));
    }

    /// Gives a chain back to the driver with `len` bytes written.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn complete(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), Error> {
        self.news = true;
        self.ring
            .add_used(memory, head, len)
            .map_err(|source| Error::Ring {
                queue: self.index,
                source,
            })
    }

    /// Gives several chains back in one step: the driver sees all or none.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn complete_together(
        &mut self,
        memory: &GuestMemory,
        chains: &[(u16, u32)],
    ) -> Result<(), Error> {
        let Some((&(last, last_len), before)) = chains.split_last() else {
            return Ok(());
        };
        // `add_used` publishes what it writes. So write the others' entries behind its back, and
        // let the last one publish them all.
        for &(head, len) in before {
            let slot = self.ring.next_used() & self.ring.size().wrapping_sub(1);
            let entry = GuestAddress(
                self.ring
                    .used_ring()
                    .saturating_add(4 + 8 * u64::from(slot)),
            );
            let mut bytes = [0; 8];
            let (id, written) = bytes.split_at_mut(4);
            id.copy_from_slice(&u32::from(head).to_le_bytes());
            written.copy_from_slice(&len.to_le_bytes());
            memory
                .write_slice(&bytes, entry)
                .map_err(|source| Error::Ring {
                    queue: self.index,
                    source: virtio_queue::Error::GuestMemory(source),
                })?;
            self.ring
                .set_next_used(self.ring.next_used().wrapping_add(1));
        }
        // The ring now counts fewer completions than there were and could miss that the driver
        // asked to be told in the middle of them.
        self.insist |= !before.is_empty();
        self.complete(memory, last, last_len)
    }

    /// Tells the driver about completed chains, if it wants to know.
    ///
    /// # Errors
    /// When the available ring cannot be read.
    pub fn signal(&mut self, memory: &GuestMemory, signal: &dyn Signal) -> Result<(), Error> {
        if std::mem::take(&mut self.news) {
            let wanted = self
                .ring
                .needs_notification(memory)
                .map_err(|source| Error::Ring {
                    queue: self.index,
                    source,
                })?;
            if std::mem::take(&mut self.insist) || wanted {
                signal.used(self.index);
            }
        }
        Ok(())
    }

    /// Asks the driver to ring the doorbell for the next chain; true when one is there already,
    /// and no doorbell will be heard for it.
    ///
    /// # Errors
    /// When the rings cannot be accessed.
    pub fn rearm(&mut self, memory: &GuestMemory) -> Result<bool, Error> {
        self.ring
            .enable_notification(memory)
            .map_err(|source| Error::Ring {
                queue: self.index,
                source,
            })
    }

    /// An error of this queue out of one of a chain.
    pub fn broken(&self, source: chain::Error) -> Error {
        Error::Chain {
            queue: self.index,
            source,
        }
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;

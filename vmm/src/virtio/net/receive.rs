//! Frames on their way to the guest.
//!
//! The tap is read straight into the guest's buffers. Only a frame's length tells how many of them it
//! takes, so behind them lies a buffer of ours: what spills into it is copied once the guest has given
//! more. A frame that waits for that is held here, and nothing is read while the guest has no buffer at
//! all: the frames stay in the tap.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;

use vm_memory::Permissions;

use super::{HEADER_LEN, MAX_PACKET};
use crate::memory::GuestMemory;
use crate::memory::iovec::IoVecBuffer;
use crate::virtio::chain::{self, Chain};
use crate::virtio::queue::{self, Queue};

/// Where num_buffers lies in the header (section 5.1.6).
const NUM_BUFFERS: u64 = 10;
/// Room for an Ethernet frame without offloads: the least that is got ready for the next one.
const SMALL: usize = 2048;
/// Most buffers of guest memory that one read fills.
const MAX_SEGMENTS: usize = 512;

/// What became of trying to read a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// One was read, and waits to be delivered.
    Frame,
    /// The tap has none.
    Empty,
    /// The guest has given no buffer.
    NoRoom,
}

/// Whether a frame was got rid of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is with the guest, or lost because the guest could never take it.
    Gone,
    /// It waits for the guest to make more buffers available.
    NoRoom,
}

/// A frame with its header.
#[derive(Clone, Copy, Debug)]
struct Frame {
    len: usize,
    /// How much of it lies in the guest's buffers already. The rest lies in ours.
    direct: usize,
}

/// One receive queue's frames.
pub struct Receiver {
    /// Frames may be spread over several chains.
    merge: bool,
    /// Chains taken from the queue and not used yet, in their order.
    chains: VecDeque<Chain>,
    /// Chains kept for their room.
    spare: Vec<Chain>,
    frame: Option<Frame>,
    /// How much room is got ready for a frame.
    wanted: usize,
    pieces: IoVecBuffer,
    spill: Vec<u8>,
    taken: Vec<(u16, u32)>,
}

impl Receiver {
    /// Without a frame; `merge` if one may be spread over several chains.
    pub fn new(merge: bool) -> Self {
        Self {
            merge,
            chains: VecDeque::new(),
            spare: Vec::new(),
            frame: None,
            wanted: SMALL,
            pieces: IoVecBuffer::default(),
            spill: vec![0; MAX_PACKET],
            taken: Vec::new(),
        }
    }

    /// Bytes of the frame that waits, without its header.
    pub fn waiting(&self) -> Option<usize> {
        self.frame.map(|frame| frame.len.saturating_sub(HEADER_LEN))
    }

    /// Reads a frame. A tap that fails has none.
    ///
    /// # Errors
    /// When the driver broke the queue.
    pub fn read(
        &mut self,
        tap: &File,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Read, queue::Error> {
        self.gather(queue, memory)?;
        let chains = if self.merge { usize::MAX } else { 1 };
        let segments = self.chains.iter().take(chains).flat_map(Chain::writable);
        let limit = MAX_PACKET as u64;
        let guest = self
            .pieces
            .fill(memory, segments, 0, limit, Permissions::Write);
        let Ok(guest) = guest else {
            return Err(self.too_many(queue));
        };
        // At most `limit`.
        let room = guest.len() as usize;
        if room == 0 {
            return Ok(Read::NoRoom);
        }
        let Ok(mut pieces) = guest.with_spill(&mut self.spill) else {
            return Err(self.too_many(queue));
        };
        let len = loop {
            match pieces.read(tap.as_fd()) {
                Ok(0) => return Ok(Read::Empty),
                // Not more than there is room for.
                Ok(len) => break (len as usize).min(MAX_PACKET),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Ok(Read::Empty),
            }
        };
        self.expect(len);
        let direct = len.min(room);
        self.frame = Some(Frame { len, direct });
        Ok(Read::Frame)
    }

    /// Takes a frame that no tap has sent.
    pub fn put(&mut self, frame: &[u8]) {
        let len = frame.len().saturating_add(HEADER_LEN).min(MAX_PACKET);
        let (header, rest) = self.spill.split_at_mut(HEADER_LEN);
        header.fill(0);
        for (to, from) in rest.iter_mut().zip(frame) {
            *to = *from;
        }
        self.frame = Some(Frame { len, direct: 0 });
    }

    /// Gives the frame that waits to the driver.
    ///
    /// # Errors
    /// When the driver broke the queue.
    pub fn deliver(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Delivery, queue::Error> {
        let Some(Frame { len, direct }) = self.frame else {
            return Ok(Delivery::Gone);
        };
        let most = self.most(queue);
        let mut at = 0;
        self.taken.clear();
        while at < len && self.taken.len() < most {
            if self.taken.len() == self.chains.len() && !self.pop(queue, memory)? {
                return Ok(Delivery::NoRoom);
            }
            let Some(chain) = self.chains.get(self.taken.len()) else {
                return Ok(Delivery::NoRoom);
            };
            let part = room(chain).min(len.saturating_sub(at));
            let end = at.saturating_add(part);
            let start = at.max(direct);
            if start < end {
                let spilled = start.saturating_sub(direct)..end.saturating_sub(direct);
                let bytes = self.spill.get(spilled).unwrap_or_default();
                let offset = start.saturating_sub(at) as u64;
                chain
                    .write_at(memory, offset, bytes)
                    .map_err(|source| queue.broken(source))?;
            }
            // At most `MAX_PACKET`.
            self.taken.push((chain.head(), part as u32));
            at = end;
        }
        self.frame = None;
        if at < len {
            // Larger than anything that the driver can hold: lost, and its buffers are still free.
            return Ok(Delivery::Gone);
        }
        if let Some(first) = self.chains.front() {
            // At most a queue's size.
            let count = self.taken.len() as u16;
            first
                .write_at(memory, NUM_BUFFERS, &count.to_le_bytes())
                .map_err(|source| queue.broken(source))?;
        }
        queue.complete_together(memory, &self.taken)?;
        self.spare.extend(self.chains.drain(..self.taken.len()));
        Ok(Delivery::Gone)
    }

    /// Chains that were taken from the queue and not used yet.
    pub fn taken(&self) -> u16 {
        // At most a queue's size.
        self.chains.len() as u16
    }

    /// Gives the chains that were not used back to the queue.
    pub fn stop(&mut self, queue: &mut Queue) {
        // At most a queue's size.
        queue.put_back(self.chains.len() as u16);
        self.chains.clear();
        self.frame = None;
    }

    /// Most chains that a frame may take.
    fn most(&self, queue: &Queue) -> usize {
        if self.merge {
            usize::from(queue.size())
        } else {
            1
        }
    }

    /// Takes chains until a frame of the expected length fits in them, or there are no more.
    fn gather(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<(), queue::Error> {
        let most = self.most(queue);
        let mut ready = self.chains.iter().map(room).fold(0, usize::saturating_add);
        let segments = |chain: &Chain| chain.writable().len();
        let mut count: usize = self.chains.iter().map(segments).sum();
        while self.chains.len() < most
            && count < MAX_SEGMENTS
            && ready < self.wanted
            && self.pop(queue, memory)?
        {
            if let Some(chain) = self.chains.back() {
                ready = ready.saturating_add(room(chain));
                count = count.saturating_add(segments(chain));
            }
        }
        Ok(())
    }

    /// Takes one more chain; false if the driver has not given any. It rings for the next one then.
    fn pop(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<bool, queue::Error> {
        let mut chain = self.spare.pop().unwrap_or_default();
        // It is looked for once more, not in a loop: a driver that moves its index to and fro would
        // keep us here.
        let found = queue.pop(memory, &mut chain)?
            || (queue.rearm(memory)? && queue.pop(memory, &mut chain)?);
        if !found {
            self.spare.push(chain);
            return Ok(false);
        }
        if room(&chain) < HEADER_LEN {
            // Section 5.1.6.3.1 forbids it.
            let head = chain.head();
            return Err(queue.broken(chain::Error::TooShort { head }));
        }
        self.chains.push_back(chain);
        Ok(true)
    }

    /// Learns from a frame how much room the next one may take: large ones come in a row.
    fn expect(&mut self, len: usize) {
        if len > self.wanted {
            self.wanted = MAX_PACKET;
        } else if len < self.wanted / 4 {
            self.wanted = (self.wanted / 2).max(SMALL);
        }
    }

    fn too_many(&self, queue: &Queue) -> queue::Error {
        let head = self.chains.front().map_or(0, Chain::head);
        queue.broken(chain::Error::TooLong { head })
    }
}

/// Bytes that a frame may take in a chain.
fn room(chain: &Chain) -> usize {
    chain.writable_len().min(MAX_PACKET as u64) as usize
}

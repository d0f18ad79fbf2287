//! A frame on its way to the guest.
//!
//! It is read from the tap into a buffer of ours first, because only then its length tells how
//! many of the guest's buffers it takes; and it stays there while the guest has no room.

use std::io;

use super::{HEADER_LEN, MAX_PACKET};
use crate::memory::GuestMemory;
use crate::virtio::chain::{self, Chain};
use crate::virtio::queue::{self, Queue};

/// Where num_buffers lies in the header (section 5.1.6).
const NUM_BUFFERS: u64 = 10;

/// Whether a frame was got rid of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is with the guest, or lost because the guest could never take it.
    Gone,
    /// It waits for the guest to make more buffers available.
    NoRoom,
}

/// At most one frame, with its header.
pub struct FrameBuffer {
    bytes: Vec<u8>,
    len: usize,
    /// Taken chains, kept for their room: the first, and the one being filled.
    first: Chain,
    next: Chain,
    taken: Vec<(u16, u32)>,
}

impl FrameBuffer {
    /// An empty buffer.
    pub fn new() -> Self {
        Self {
            bytes: vec![0; MAX_PACKET],
            len: 0,
            first: Chain::default(),
            next: Chain::default(),
            taken: Vec::new(),
        }
    }

    /// Whether a frame waits in it.
    /// Bytes of the frame with its header; zero when there is none.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether a frame waits in it.
    pub fn is_full(&self) -> bool {
        self.len > 0
    }

    /// Reads a frame; false when there is none. A tap that fails has none.
    pub fn fill(&mut self, mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> bool {
        loop {
            match read(&mut self.bytes) {
                Ok(len) => {
                    self.len = len;
                    return len > 0;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }

    /// Gives the frame to the driver of `queue`, in several chains if `merge`.
    pub fn deliver(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        merge: bool,
    ) -> Result<Delivery, queue::Error> {
        let frame = self.bytes.get(..self.len).unwrap_or_default();
        let most = if merge { usize::from(queue.size()) } else { 1 };
        let mut rest = frame;
        self.taken.clear();
        while !rest.is_empty() && self.taken.len() < most {
            let chain = if self.taken.is_empty() {
                &mut self.first
            } else {
                &mut self.next
            };
            // The driver rings for the next chain, unless it came just now. It is looked for once more,
            // not in a loop: a driver that moves its index to and fro would keep us here.
            let found =
                queue.pop(memory, chain)? || (queue.rearm(memory)? && queue.pop(memory, chain)?);
            if !found {
                queue.put_back(count(&self.taken));
                return Ok(Delivery::NoRoom);
            }
            let room = chain.writable_len().min(MAX_PACKET as u64) as usize;
            if self.taken.is_empty() && room < HEADER_LEN {
                let head = chain.head();
                return Err(queue.broken(chain::Error::TooShort { head }));
            }
            let (part, after) = rest.split_at_checked(room).unwrap_or((rest, &[]));
            chain
                .write_at(memory, 0, part)
                .map_err(|source| queue.broken(source))?;
            // At most `MAX_PACKET`.
            self.taken.push((chain.head(), part.len() as u32));
            rest = after;
        }
        self.len = 0;
        if !rest.is_empty() {
            // Larger than anything that the driver can hold: lost, its buffers free again.
            queue.put_back(count(&self.taken));
            return Ok(Delivery::Gone);
        }
        self.first
            .write_at(memory, NUM_BUFFERS, &count(&self.taken).to_le_bytes())
            .map_err(|source| queue.broken(source))?;
        queue.complete_together(memory, &self.taken)?;
        Ok(Delivery::Gone)
    }
}

/// How many chains, of at most a queue's size.
fn count(taken: &[(u16, u32)]) -> u16 {
    taken.len() as u16
}

//! Descriptor chains, copied out of guest memory once and checked as copies.

use thiserror::Error;
use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, Permissions};

use crate::memory::GuestMemory;
pub use crate::memory::iovec::Segment;

/// Most buffers in a chain. The spec (section 2.7.5.2) bounds a chain by the queue's size, but an
/// indirect table can claim 65535.
pub const MAX_SEGMENTS: usize = 1024;

/// What is wrong with a chain.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// The chain stops where it says that it goes on: a loop, an index or an indirect table out of
    /// range, an indirect table in an indirect table, or more than 4 GiB in all.
    #[error("descriptor chain {head} is broken after {segments} buffers")]
    Broken {
        /// Index of its first descriptor.
        head: u16,
        /// Buffers that were well-formed.
        segments: usize,
    },
    /// More buffers than [`MAX_SEGMENTS`].
    #[error("descriptor chain {head} has more than {MAX_SEGMENTS} buffers")]
    TooLong {
        /// Index of its first descriptor.
        head: u16,
    },
    /// A device-readable buffer follows a device-writable one (section 2.7.4.2 forbids it).
    #[error("descriptor chain {head} has a readable buffer after a writable one")]
    Order {
        /// Index of its first descriptor.
        head: u16,
    },
    /// A buffer is not in guest memory.
    #[error("descriptor chain {head} names {address:#x}+{len:#x}, which is not guest memory")]
    OutOfMemory {
        /// Index of its first descriptor.
        head: u16,
        /// Guest-physical address of the buffer.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// The chain is too short for what the device must read from it or write to it.
    #[error("descriptor chain {head} is too short")]
    TooShort {
        /// Index of its first descriptor.
        head: u16,
    },
}

/// A chain of buffers that the driver made available: the device reads some and writes the rest.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Chain {
    /// Index of its first descriptor, by which it is completed.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The buffers for the device to read.
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// The buffers for the device to write.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes for the device to read; a whole chain holds less than 4 GiB.
    pub fn readable_len(&self) -> u64 {
        total(&self.readable)
    }

    /// Bytes for the device to write.
    pub fn writable_len(&self) -> u64 {
        total(&self.writable)
    }

    /// Becomes a copy of `descriptors`, checked.
    pub(super) fn fill(
        &mut self,
        memory: &GuestMemory,
        descriptors: virtio_queue::DescriptorChain<&GuestMemory>,
    ) -> Result<(), Error> {
        let head = descriptors.head_index();
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        // The iterator ends in silence on anything malformed; then the last descriptor that it
        // gave, if any, announces another one.
        let mut unfinished = true;
        for descriptor in descriptors {
            unfinished = descriptor.has_next();
            let segment = Segment {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            if self.readable.len() + self.writable.len() == MAX_SEGMENTS {
                return Err(Error::TooLong { head });
            }
            let access = if descriptor.is_write_only() {
                self.writable.push(segment);
                Permissions::Write
            } else if self.writable.is_empty() {
                self.readable.push(segment);
                Permissions::Read
            } else {
                return Err(Error::Order { head });
            };
            if segment.len > 0 && !memory.check_range(segment.address, segment.len as usize, access)
            {
                return Err(Error::OutOfMemory {
                    head,
                    address: segment.address.0,
                    len: segment.len,
                });
            }
        }
        if unfinished {
            let segments = self.readable.len() + self.writable.len();
            return Err(Error::Broken { head, segments });
        }
        Ok(())
    }

    /// Copies the readable bytes at `offset` into `data`.
    ///
    /// # Errors
    /// When there are not as many.
    pub fn read_at(&self, memory: &GuestMemory, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let mut rest = data;
        let copied = walk(
            &self.readable,
            offset,
            rest.len(),
            |address, count| match std::mem::take(&mut rest).split_at_mut_checked(count) {
                Some((part, after)) => {
                    rest = after;
                    memory.read_slice(part, address).is_ok()
                }
                None => false,
            },
        );
        self.enough(copied)
    }

    /// Copies `data` to the writable bytes at `offset`.
    ///
    /// # Errors
    /// When there is not as much room.
    pub fn write_at(&self, memory: &GuestMemory, offset: u64, data: &[u8]) -> Result<(), Error> {
        let mut rest = data;
        let copied = walk(
            &self.writable,
            offset,
            data.len(),
            |address, count| match rest.split_at_checked(count) {
                Some((part, after)) => {
                    rest = after;
                    memory.write_slice(part, address).is_ok()
                }
                None => false,
            },
        );
        self.enough(copied)
    }

    /// Where the writable byte at `offset` is in guest memory.
    pub fn writable_address(&self, mut offset: u64) -> Option<GuestAddress> {
        for segment in &self.writable {
            let len = u64::from(segment.len);
            if offset < len {
                let address = segment.address.0.checked_add(offset)?;
                return Some(GuestAddress(address));
            }
            offset = offset.saturating_sub(len);
        }
        None
    }

    fn enough(&self, copied: bool) -> Result<(), Error> {
        if copied {
            Ok(())
        } else {
            Err(Error::TooShort { head: self.head })
        }
    }
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// Calls `copy` for each run of the `count` bytes at `offset`; false when they are not all there.
fn walk(
    segments: &[Segment],
    mut offset: u64,
    mut count: usize,
    mut copy: impl FnMut(GuestAddress, usize) -> bool,
) -> bool {
    for segment in segments {
        if count == 0 {
            break;
        }
        let Some(len) = u64::from(segment.len).checked_sub(offset) else {
            offset = offset.saturating_sub(u64::from(segment.len));
            continue;
        };
        // A segment's length is a u32, so this fits.
        let part = count.min(len as usize);
        let Some(address) = segment.address.0.checked_add(offset) else {
            return false;
        };
        if part > 0 && !copy(GuestAddress(address), part) {
            return false;
        }
        count = count.saturating_sub(part);
        offset = 0;
    }
    count == 0
}

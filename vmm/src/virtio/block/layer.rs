//! A private layer over a shared image: the image is only read, what the guest writes goes to a sparse
//! file of this machine alone, and that holds no more than it may.
//!
//! The layer's file has the disk's clusters at their own places, so a cluster is in one place or the other
//! and nothing needs looking up; then a bitmap of those that it has; then one block that says what it is:
//!
//! ```text
//! 0            clusters of 64 KiB, as many as the disk has
//! data_len     one bit for each: the first cluster is the lowest bit of the first byte
//! header_at    MAGIC, version, cluster size, sectors of the disk; zeros up to 4 KiB
//! ```
//!
//! The bitmap is written behind the data that it tells of. Where the guest has a cache to flush, it is
//! written by a flush, between two fdatasync(2): a bit on the disk never names data that is not.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::AsFd as _;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::{preadv, pwritev};
use thiserror::Error;
use vm_memory::Permissions;

use super::disk::{Span, transfer};
use crate::memory::iovec::IoVecBuffer;

/// Bytes that are copied from the image at once, and the unit of what the layer may hold.
pub const CLUSTER: u64 = 64 << 10;
const BLOCK: u64 = 4 << 10;
const MAGIC: [u8; 16] = *b"casemate-layer\0\0";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 32;

/// Why a file cannot be a layer.
#[derive(Debug, Error)]
pub enum Error {
    /// It is too short: nothing may grow once the machine runs.
    #[error(
        "its layer's file has {found} bytes and needs {needed}: make it longer (`truncate -s {needed}`)"
    )]
    TooShort {
        /// Its length.
        found: u64,
        /// What it must have.
        needed: u64,
    },
    /// Neither empty nor a layer over a disk of this size.
    #[error("its layer's file is neither empty nor a layer over an image of {0} sectors")]
    NotALayer(u64),
    /// The host does not read or write it.
    #[error("cannot use its layer's file: {0}")]
    Host(#[from] io::Error),
}

/// A shared image and a private layer over it.
#[derive(Debug)]
pub struct Layer {
    base: File,
    upper: File,
    /// Length of the disk in bytes.
    len: u64,
    present: Vec<u8>,
    /// Clusters that the layer has, and how many it may have.
    used: u64,
    most: u64,
    /// Write the bitmap at a flush only.
    deferred: bool,
    /// The bytes of the bitmap that the file does not have yet: first and last.
    unsaved: Option<(usize, usize)>,
    bounce: Box<[u8]>,
}

/// Where the parts of a layer are, over a disk of `len` bytes.
struct Places {
    bitmap_at: u64,
    bitmap_len: u64,
    header_at: u64,
}

impl Places {
    fn of(len: u64) -> Self {
        // A disk has less than 2^63 bytes, so nothing of this overflows.
        let clusters = len.div_ceil(CLUSTER);
        let bitmap_at = clusters.saturating_mul(CLUSTER);
        let bitmap_len = clusters.div_ceil(8);
        let blocks = bitmap_len.div_ceil(BLOCK).saturating_mul(BLOCK);
        Self {
            bitmap_at,
            bitmap_len,
            header_at: bitmap_at.saturating_add(blocks),
        }
    }
}

/// How long the file of a layer over a disk of `len` bytes must be.
pub fn file_len(len: u64) -> u64 {
    Places::of(len).header_at.saturating_add(BLOCK)
}

impl Layer {
    /// A layer in `upper`, which is one over `base` already or has nothing but zeros, for a disk of `len`
    /// bytes. It takes up to `most` bytes, in whole clusters. With `deferred` its bitmap waits for a flush.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(
        base: File,
        upper: File,
        len: u64,
        most: u64,
        deferred: bool,
    ) -> Result<Self, Error> {
        let places = Places::of(len);
        let (found, needed) = (upper.metadata()?.len(), file_len(len));
        if found < needed {
            return Err(Error::TooShort { found, needed });
        }
        let sectors = len / super::SECTOR;
        let mut header = [0; HEADER_LEN];
        let (magic, numbers) = header.split_at_mut(MAGIC.len());
        magic.copy_from_slice(&MAGIC);
        let cluster = (CLUSTER as u32).to_le_bytes();
        let fields = [&VERSION.to_le_bytes()[..], &cluster, &sectors.to_le_bytes()].concat();
        numbers.copy_from_slice(&fields);

        let length = usize::try_from(places.bitmap_len).map_err(|_| Error::NotALayer(sectors))?;
        let mut present = vec![0; length];
        read(&upper, &mut present, places.bitmap_at)?;
        let mut there = [0; HEADER_LEN];
        read(&upper, &mut there, places.header_at)?;
        let empty = there == [0; HEADER_LEN] && present.iter().all(|&byte| byte == 0);
        if empty {
            write(&upper, &header, places.header_at)?;
        } else if there != header {
            return Err(Error::NotALayer(sectors));
        }
        let used = present
            .iter()
            .map(|byte| u64::from(byte.count_ones()))
            .sum();
        Ok(Self {
            base,
            upper,
            len,
            present,
            used,
            most: most / CLUSTER,
            deferred,
            unsaved: None,
            bounce: vec![0; CLUSTER as usize].into(),
        })
    }

    /// The files: the image, and the layer's own.
    pub fn files(&self) -> [&File; 2] {
        [&self.base, &self.upper]
    }

    fn has(&self, cluster: u64) -> bool {
        let byte = usize::try_from(cluster / 8).ok();
        let byte = byte.and_then(|at| self.present.get(at));
        byte.is_some_and(|byte| byte & (1 << (cluster % 8)) != 0)
    }

    fn set(&mut self, cluster: u64, present: bool) -> io::Result<()> {
        let index = (cluster / 8) as usize;
        let Some(byte) = self.present.get_mut(index) else {
            return Ok(());
        };
        let bit = 1 << (cluster % 8);
        if (*byte & bit != 0) == present {
            return Ok(());
        }
        *byte ^= bit;
        self.used = if present {
            self.used.saturating_add(1)
        } else {
            self.used.saturating_sub(1)
        };
        self.unsaved = match self.unsaved {
            None => Some((index, index)),
            Some((first, last)) => Some((first.min(index), last.max(index))),
        };
        if self.deferred { Ok(()) } else { self.save() }
    }

    /// Writes what changed of the bitmap.
    fn save(&mut self) -> io::Result<()> {
        if let Some((first, last)) = self.unsaved
            && let Some(changed) = self.present.get(first..=last)
        {
            let at = Places::of(self.len).bitmap_at.saturating_add(first as u64);
            write(&self.upper, changed, at)?;
        }
        self.unsaved = None;
        Ok(())
    }

    /// Whether the cluster at `offset` is in the layer, and for how many bytes, `most` at most, that stays so.
    fn run(&self, offset: u64, most: u64) -> (bool, u64) {
        let here = self.has(offset / CLUSTER);
        let mut len = left_in_cluster(offset);
        while len < most && self.has(offset.saturating_add(len) / CLUSTER) == here {
            len = len.saturating_add(CLUSTER);
        }
        (here, len.min(most))
    }

    /// Fills the guest's buffers.
    ///
    /// # Errors
    /// What the host says.
    pub fn read(&self, pieces: &mut IoVecBuffer, span: Span<'_>, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < span.len {
            let at = offset.saturating_add(done);
            let (here, len) = self.run(at, span.len.saturating_sub(done));
            let file = if here { &self.upper } else { &self.base };
            let mut part = span.part(done, len).fill(pieces, Permissions::Write)?;
            transfer(&mut part, at, |part, at| part.read_at(file.as_fd(), at))?;
            done = done.saturating_add(len);
        }
        Ok(())
    }

    /// Writes the guest's bytes to the layer.
    ///
    /// # Errors
    /// What the host says; `StorageFull` when the layer may hold no more.
    pub fn write(
        &mut self,
        pieces: &mut IoVecBuffer,
        span: Span<'_>,
        offset: u64,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < span.len {
            let at = offset.saturating_add(done);
            let (here, mut len) = self.run(at, span.len.saturating_sub(done));
            if !here {
                len = len.min(left_in_cluster(at));
                self.prepare(at, len)?;
            }
            let mut part = span.part(done, len).fill(pieces, Permissions::Read)?;
            transfer(&mut part, at, |part, at| {
                part.write_at(self.upper.as_fd(), at)
            })?;
            if !here {
                self.set(at / CLUSTER, true)?;
            }
            done = done.saturating_add(len);
        }
        Ok(())
    }

    /// Makes the cluster of `offset` one that the layer can have: what `len` bytes there do not overwrite
    /// comes from the image.
    fn prepare(&mut self, offset: u64, len: u64) -> io::Result<()> {
        if self.used >= self.most {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let (start, end) = self.cluster(offset);
        if offset > start || offset.saturating_add(len) < end {
            self.copy_up(start, end)?;
        }
        Ok(())
    }

    /// Where the cluster of `offset` begins and ends; the disk's last one may be shorter.
    fn cluster(&self, offset: u64) -> (u64, u64) {
        let end = offset.saturating_add(left_in_cluster(offset));
        (end.saturating_sub(CLUSTER), end.min(self.len))
    }

    fn copy_up(&mut self, start: u64, end: u64) -> io::Result<()> {
        let len = end.saturating_sub(start) as usize;
        let bytes = self.bounce.get_mut(..len).unwrap_or_default();
        read(&self.base, bytes, start)?;
        write(&self.upper, bytes, start)
    }

    /// Lets go of the clusters that lie wholly in `len` bytes from `offset` on: the image shows again.
    ///
    /// # Errors
    /// What the host says.
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let (first, last) = self.cluster(at);
            if first >= offset && last <= end && self.has(first / CLUSTER) {
                self.set(first / CLUSTER, false)?;
                punch(&self.upper, first, CLUSTER)?;
            }
            at = last;
        }
        Ok(())
    }

    /// Makes `len` bytes from `offset` on zeros.
    ///
    /// # Errors
    /// As for [`Layer::write`].
    pub fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let (first, last) = self.cluster(at);
            let to = last.min(end);
            let here = self.has(first / CLUSTER);
            if !here {
                self.prepare(at, to.saturating_sub(at))?;
            }
            if at == first && to == last {
                punch(&self.upper, first, CLUSTER)?;
            } else {
                let zeros = to.saturating_sub(at) as usize;
                let zeros = self.bounce.get_mut(..zeros).unwrap_or_default();
                zeros.fill(0);
                write(&self.upper, zeros, at)?;
            }
            if !here {
                self.set(first / CLUSTER, true)?;
            }
            at = to;
        }
        Ok(())
    }

    /// All that was written is on the host's disk afterwards, and found again.
    ///
    /// # Errors
    /// What the host says.
    pub fn flush(&mut self) -> io::Result<()> {
        self.upper.sync_data()?;
        if self.unsaved.is_some() {
            self.save()?;
            self.upper.sync_data()?;
        }
        Ok(())
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        // The machine ends in order: what the guest wrote is found again.
        let _ = self.save();
    }
}

fn left_in_cluster(offset: u64) -> u64 {
    CLUSTER.saturating_sub(offset % CLUSTER)
}

/// Takes `len` bytes out of the file; they read as zeros.
fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    loop {
        // Both lie in a file.
        match fallocate(file, how, offset as i64, len as i64) {
            Err(Errno::EINTR) => {}
            Err(Errno::EOPNOTSUPP) => return write(file, &vec![0; len as usize], offset),
            result => return Ok(result?),
        }
    }
}

/// Fills `bytes` from `offset` on. These calls and no others are in the device thread's policy.
fn read(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match preadv(file, &mut [IoSliceMut::new(bytes)], offset as i64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                bytes = bytes.get_mut(count..).unwrap_or_default();
                offset = offset.saturating_add(count as u64);
            }
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn write(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match pwritev(file, &[IoSlice::new(bytes)], offset as i64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                bytes = bytes.get(count..).unwrap_or_default();
                offset = offset.saturating_add(count as u64);
            }
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "layer_tests.rs"]
mod tests;

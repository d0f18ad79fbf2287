//! The disk behind the device: serves checked requests, one after the other.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use log::log;
use vm_memory::Permissions;

use super::discard::{Kind, Range};
use super::layer::Layer;
use super::request::{Abilities, HEADER_LEN, Request};
use super::work::Work;
use super::{ID_LEN, S_IOERR};
use crate::memory::GuestMemory;
use crate::memory::iovec::{IoVecBuffer, IoVecs, Segment};
use crate::metrics::fields::BlockMetrics;
use crate::virtio::chain::Chain;
use crate::virtio::device::LogBudget;

/// Where the bytes are.
#[derive(Debug)]
pub enum Store {
    /// In one file.
    File(Arc<File>),
    /// In a shared image and a private layer.
    Layered(Box<Layer>),
}

/// A part of a chain's buffers.
#[derive(Clone, Copy)]
pub struct Span<'a> {
    memory: &'a GuestMemory,
    segments: &'a [Segment],
    skip: u64,
    /// Its length in bytes.
    pub len: u64,
}

impl<'a> Span<'a> {
    /// `len` bytes of `segments` behind the first `skip`.
    pub fn new(memory: &'a GuestMemory, segments: &'a [Segment], skip: u64, len: u64) -> Self {
        Self {
            memory,
            segments,
            skip,
            len,
        }
    }

    /// `len` bytes of it from `from` on.
    pub fn part(self, from: u64, len: u64) -> Self {
        let skip = self.skip.saturating_add(from);
        Self { skip, len, ..self }
    }

    /// The span as what a system call takes.
    ///
    /// # Errors
    /// When it is not guest memory.
    pub fn fill<'b>(
        self,
        pieces: &'b mut IoVecBuffer,
        access: Permissions,
    ) -> io::Result<IoVecs<'b>>
    where
        'a: 'b,
    {
        pieces
            .fill(self.memory, self.segments, self.skip, self.len, access)
            .map_err(io::Error::other)
    }
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    /// What GET_ID answers.
    pub id: [u8; ID_LEN],
    /// What it takes.
    pub abilities: Abilities,
    /// Where its bytes are.
    pub store: Store,
    /// How much was said of what failed.
    pub failures: LogBudget,
    /// What it counts.
    pub metrics: Arc<BlockMetrics>,
}

impl Disk {
    /// Serves a request, which has `room` bytes before its status: the bytes written there, or the status of
    /// a failure.
    pub fn answer(
        &mut self,
        pieces: &mut IoVecBuffer,
        memory: &GuestMemory,
        chain: &Chain,
        room: u64,
    ) -> Result<u64, u8> {
        let request = self.parse(memory, chain, room)?;
        let work = Work::begin(&request);
        let written = match request {
            Request::Read { len, .. } => len,
            Request::Id => ID_LEN as u64,
            _ => 0,
        };
        self.perform(request, pieces, memory, chain)
            .map_err(|error| self.failed(&error))?;
        work.end(&self.metrics);
        Ok(written)
    }

    /// The request in `chain`, checked.
    ///
    /// # Errors
    /// The status of a request that is not served.
    pub fn parse(&self, memory: &GuestMemory, chain: &Chain, room: u64) -> Result<Request, u8> {
        let request = Request::parse(memory, chain, room, self.abilities);
        request.inspect_err(|_| self.metrics.invalid_reqs_count.inc())
    }

    fn perform(
        &mut self,
        request: Request,
        pieces: &mut IoVecBuffer,
        memory: &GuestMemory,
        chain: &Chain,
    ) -> io::Result<()> {
        match request {
            Request::Read { offset, len } => {
                let span = Span::new(memory, chain.writable(), 0, len);
                self.store.read(pieces, span, offset)
            }
            Request::Write { offset, len } => {
                let span = Span::new(memory, chain.readable(), HEADER_LEN, len);
                self.store.write(pieces, span, offset)
            }
            Request::Flush => self.store.flush(),
            Request::Id => chain
                .write_at(memory, 0, &self.id)
                .map_err(io::Error::other),
            Request::Deallocate { kind, ranges } => ranges
                .into_iter()
                .try_for_each(|range| self.store.deallocate(range, kind)),
        }
    }

    /// The status of a request that the host refused.
    pub fn failed(&mut self, error: &io::Error) -> u8 {
        self.metrics.execute_fails.inc();
        let hint = match (&self.store, error.kind()) {
            (Store::Layered(_), io::ErrorKind::StorageFull) => {
                " (the drive's layer holds all that it may: `copy_on_write.size_mib`)"
            }
            _ => "",
        };
        log!(
            self.failures.level(),
            "block: the host refused a request: {error}{hint}"
        );
        S_IOERR
    }
}

impl Store {
    fn read(&self, pieces: &mut IoVecBuffer, span: Span<'_>, offset: u64) -> io::Result<()> {
        match self {
            Self::File(file) => {
                let mut data = span.fill(pieces, Permissions::Write)?;
                transfer(&mut data, offset, |data, at| data.read_at(file.as_fd(), at))
            }
            Self::Layered(layer) => layer.read(pieces, span, offset),
        }
    }

    fn write(&mut self, pieces: &mut IoVecBuffer, span: Span<'_>, offset: u64) -> io::Result<()> {
        match self {
            Self::File(file) => {
                let mut data = span.fill(pieces, Permissions::Read)?;
                transfer(&mut data, offset, |data, at| {
                    data.write_at(file.as_fd(), at)
                })
            }
            Self::Layered(layer) => layer.write(pieces, span, offset),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::File(file) => file.sync_data(),
            Self::Layered(layer) => layer.flush(),
        }
    }

    fn deallocate(&mut self, range: Range, kind: Kind) -> io::Result<()> {
        let (offset, len) = range.place();
        match (self, kind) {
            (Self::File(file), kind) => range.apply(kind, file),
            (Self::Layered(layer), Kind::Discard) => layer.discard(offset, len),
            (Self::Layered(layer), Kind::Zeroes) => layer.zero(offset, len),
        }
    }
}

/// Moves all of `data`, by as many calls as the host needs.
///
/// # Errors
/// What the host says; `UnexpectedEof` when the file became shorter than the disk.
pub fn transfer(
    data: &mut IoVecs<'_>,
    offset: u64,
    step: impl Fn(&IoVecs<'_>, i64) -> io::Result<u64>,
) -> io::Result<()> {
    // An offset in a disk fits an i64.
    let mut offset = offset as i64;
    while !data.is_empty() {
        match step(data, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                data.advance(count);
                offset = offset.saturating_add_unsigned(count);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

//! The block device (virtio 1.2, section 5.2): a file or block device of the host as a disk.

mod discard;
mod lock;

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::sync::Arc;

use log::{log, warn};
use thiserror::Error;
use vm_memory::Permissions;

use self::discard::{Kind, RANGE_LEN, Range};
use self::lock::Lock;
use super::chain::{self, Chain};
use super::config_space::ConfigSpace;
use super::device::{
    self, DeviceIo, DeviceType, Event, LogBudget, Queues, Traits, VirtioDevice, states,
};
use super::queue::{Progress, QueueStates, Verdict};
use super::rate_limiter::{LimiterOptions, RateLimiter};
use super::update::{Answer, Update, UpdateError};
use crate::memory::GuestMemory;
use crate::memory::iovec::{IoVecBuffer, IoVecs};

const QUEUE_SIZES: &[u16] = &[256];
/// Requests served before the other devices get their turn.
const BUDGET: usize = 16;
/// Bytes after which they get it earlier. One request more than that is moved at most.
const BUDGET_BYTES: u64 = 8 << 20;
const SECTOR: u64 = 512;

/// Feature bits (section 5.2.3).
const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Most data buffers in a request: the queue's size less header and status.
const SEG_MAX: u32 = 254;
/// Most bytes in one of them. With [`SEG_MAX`] it bounds how long one request takes.
const SIZE_MAX: u32 = 256 << 10;
const MAX_TRANSFER: u64 = SEG_MAX as u64 * SIZE_MAX as u64;

/// Request types (section 5.2.6).
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Length of the answer to GET_ID.
const ID_LEN: usize = 20;
/// Type, a reserved word, and the sector.
const HEADER_LEN: u64 = 16;
const STATUS_LEN: u64 = 1;
/// Of the configuration (section 5.2.4), what lies between `seg_max` and `max_discard_sectors`: geometry,
/// block size, topology, write-back, queues. Features that are not offered govern them all.
const UNUSED_CONFIG: [u8; 20] = [0; 20];

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// What a flush means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    /// The guest is told that there is no cache: fast, and data of a guest that believes it can be
    /// lost when the *host* crashes.
    #[default]
    Unsafe,
    /// The guest is told of the host's page cache; a flush reaches the disk (fdatasync(2)).
    Writeback,
}

/// A drive.
#[derive(Debug)]
pub struct BlockOptions {
    /// What the guest sees as the serial number; its first 20 bytes.
    pub id: String,
    /// A regular file or a block device, open for reading, and for writing unless `read_only`.
    pub file: File,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What a flush means.
    pub cache: CacheType,
    /// Whether the guest may give parts of it back to the host, where the host can take them.
    pub discard: bool,
    /// How much it may be used: bytes that are read or written, and requests.
    pub limits: LimiterOptions,
}

/// Why a drive could not be made.
#[derive(Debug, Error)]
pub enum Error {
    /// The file is a directory, a pipe, a socket...
    #[error("drive {id}: neither a regular file nor a block device")]
    WrongKind {
        /// The drive.
        id: String,
    },
    /// The file's size or kind cannot be found out.
    #[error("drive {id}: cannot find its size: {source}")]
    Size {
        /// The drive.
        id: String,
        /// What the host said.
        source: io::Error,
    },
    /// Another machine uses it.
    #[error(
        "drive {id}: another machine uses its image{}: an image has one writer or any number of readers",
        if *.read_only { ", and may write to it" } else { "" }
    )]
    InUse {
        /// Its id.
        id: String,
        /// Whether this machine would only read it.
        read_only: bool,
    },
    /// It cannot be locked.
    #[error("drive {id}: cannot lock its image: {source}")]
    Lock {
        /// Its id.
        id: String,
        /// What the host says.
        source: io::Error,
    },
}

/// The block device.
pub struct Block {
    disk: Disk,
    limiter: RateLimiter,
    running: Option<(Queues, DeviceIo)>,
    pieces: IoVecBuffer,
}

struct Disk {
    id: [u8; ID_LEN],
    file: File,
    read_only: bool,
    cache: CacheType,
    sectors: u64,
    /// Whether discard and write-zeroes are offered.
    discard: bool,
    failures: LogBudget,
}

impl Block {
    /// A disk as large as the file is now; a last piece of less than a sector is left out.
    ///
    /// # Errors
    /// When the file is of a kind that is no disk, or its size cannot be found out.
    pub fn new(options: BlockOptions) -> Result<Self, Error> {
        let BlockOptions {
            id,
            mut file,
            read_only,
            cache,
            discard,
            limits,
        } = options;
        let size = |source| Error::Size {
            id: id.clone(),
            source,
        };
        let kind = file.metadata().map_err(size)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::WrongKind { id });
        }
        match lock::take(&file, read_only) {
            Ok(Lock::Taken) => {}
            Ok(Lock::InUse) => return Err(Error::InUse { id, read_only }),
            Ok(Lock::Unsupported) => {
                warn!(
                    "drive {id}: its file system has no locks, nothing keeps a second machine out"
                );
            }
            Err(source) => return Err(Error::Lock { id, source }),
        }
        // Unlike the metadata, the end of a block device is its size.
        let len = file.seek(SeekFrom::End(0)).map_err(size)?;
        if !len.is_multiple_of(SECTOR) {
            warn!(
                "drive {id}: {len} bytes are no whole sectors, the guest does not see the last {}",
                len % SECTOR
            );
        }
        let mut serial = [0; ID_LEN];
        for (to, from) in serial.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Ok(Self {
            disk: Disk {
                id: serial,
                read_only,
                cache,
                sectors: len / SECTOR,
                discard: discard && !read_only && discard::is_possible(&file, len),
                file,
                failures: LogBudget::default(),
            },
            limiter: RateLimiter::new(limits),
            running: None,
            pieces: IoVecBuffer::default(),
        })
    }
}

impl VirtioDevice for Block {
    fn traits(&self) -> Traits {
        let mut features = F_SIZE_MAX | F_SEG_MAX;
        if self.disk.read_only {
            features |= F_RO;
        }
        if self.disk.cache == CacheType::Writeback {
            features |= F_FLUSH;
        }
        if self.disk.discard {
            features |= F_DISCARD | F_WRITE_ZEROES;
        }
        Traits {
            device_type: DeviceType::Block,
            features,
            queue_sizes: QUEUE_SIZES,
        }
    }

    /// struct virtio_blk_config up to seg_max (section 5.2.4).
    fn config(&self) -> Arc<ConfigSpace> {
        let config = [
            &self.disk.sectors.to_le_bytes()[..],
            &SIZE_MAX.to_le_bytes(),
            &SEG_MAX.to_le_bytes(),
            &UNUSED_CONFIG,
            &discard::MAX_DISCARD.to_le_bytes(),
            &discard::MAX_RANGES.to_le_bytes(),
            // Any sector may begin a range.
            &1u32.to_le_bytes(),
            &discard::MAX_ZEROES.to_le_bytes(),
            &discard::MAX_RANGES.to_le_bytes(),
            // Zeros may take no room, if the guest says so.
            &[1, 0, 0, 0],
        ];
        ConfigSpace::new(config.concat())
    }

    fn start(&mut self, queues: Queues, _: u64, io: DeviceIo) -> Result<(), device::Error> {
        self.running = Some((queues, io));
        Ok(())
    }

    /// Requests are served one by one while `handle` runs, so none is in flight here.
    fn stop(&mut self) -> QueueStates {
        self.running
            .take()
            .map(|(queues, _)| states(&queues))
            .unwrap_or_default()
    }

    fn handle(&mut self, _: Event) -> Result<Progress, device::Error> {
        let Some(([Some(queue), ..], io)) = &mut self.running else {
            return Ok(Progress::Done);
        };
        let mut bytes: u64 = 0;
        let progress = queue.process(&io.memory, io.signal.as_ref(), BUDGET, |chain| {
            if let Some(at) = self.limiter.wait() {
                return Ok(Verdict::Later(at));
            }
            let written = self.disk.serve(&mut self.pieces, &io.memory, chain)?;
            // Less than 4 GiB.
            let len = chain.readable_len() + chain.writable_len();
            self.limiter
                .spend(len.saturating_sub(HEADER_LEN + STATUS_LEN));
            bytes = bytes.saturating_add(len);
            Ok(if bytes < BUDGET_BYTES {
                Verdict::Used(written)
            } else {
                Verdict::Enough(written)
            })
        })?;
        Ok(progress)
    }

    fn update(&mut self, update: Update) -> Result<Answer, UpdateError> {
        match update {
            Update::Limits(limits) => self.limiter.update(limits),
        }
        Ok(Answer::Done)
    }
}

impl Disk {
    /// Serves a request and returns how many bytes of the chain it wrote, the status byte included.
    fn serve(
        &mut self,
        pieces: &mut IoVecBuffer,
        memory: &GuestMemory,
        chain: &Chain,
    ) -> Result<u32, chain::Error> {
        // Without a status byte there is no way to report anything: the queue is broken.
        let room = chain
            .writable_len()
            .checked_sub(1)
            .ok_or(chain::Error::TooShort { head: chain.head() })?;
        let (status, written) = match self.answer(pieces, memory, chain, room) {
            Ok(written) => (S_OK, written),
            Err(status) => (status, 0),
        };
        chain.write_at(memory, room, &[status])?;
        // `written` is at most `MAX_TRANSFER`.
        Ok(written as u32 + 1)
    }

    /// The bytes written before the status byte, or the status of a failure.
    fn answer(
        &mut self,
        pieces: &mut IoVecBuffer,
        memory: &GuestMemory,
        chain: &Chain,
        room: u64,
    ) -> Result<u64, u8> {
        let mut header = [0; HEADER_LEN as usize];
        chain.read_at(memory, 0, &mut header).map_err(|_| S_IOERR)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            T_IN => {
                let offset = self.place(sector, room)?;
                let mut data = pieces
                    .fill(memory, chain.writable(), 0, room, Permissions::Write)
                    .map_err(|_| S_IOERR)?;
                transfer(&mut data, offset, |data, at| {
                    data.read_at(self.file.as_fd(), at)
                })
                .map_err(|error| self.failed(&error))?;
                Ok(room)
            }
            T_OUT if self.read_only => Err(S_IOERR),
            T_OUT => {
                let len = chain.readable_len().saturating_sub(HEADER_LEN);
                let offset = self.place(sector, len)?;
                let mut data = pieces
                    .fill(memory, chain.readable(), HEADER_LEN, len, Permissions::Read)
                    .map_err(|_| S_IOERR)?;
                transfer(&mut data, offset, |data, at| {
                    data.write_at(self.file.as_fd(), at)
                })
                .map_err(|error| self.failed(&error))?;
                Ok(0)
            }
            T_FLUSH if self.cache == CacheType::Writeback => {
                self.file.sync_data().map_err(|error| self.failed(&error))?;
                Ok(0)
            }
            T_GET_ID if room >= ID_LEN as u64 => {
                chain.write_at(memory, 0, &self.id).map_err(|_| S_IOERR)?;
                Ok(ID_LEN as u64)
            }
            T_GET_ID => Err(S_IOERR),
            T_DISCARD if self.discard => self.deallocate(memory, chain, Kind::Discard),
            T_WRITE_ZEROES if self.discard => self.deallocate(memory, chain, Kind::Zeroes),
            _ => Err(S_UNSUPP),
        }
    }

    /// Discards or zeroes the ranges that a request lists. All of them are checked before any is
    /// touched.
    fn deallocate(&mut self, memory: &GuestMemory, chain: &Chain, kind: Kind) -> Result<u64, u8> {
        const MOST: usize = discard::MAX_RANGES as usize * RANGE_LEN;
        let len = chain.readable_len().saturating_sub(HEADER_LEN);
        let len = usize::try_from(len).map_err(|_| S_IOERR)?;
        let mut list = [0; MOST];
        let list = list.get_mut(..len).ok_or(S_IOERR)?;
        chain
            .read_at(memory, HEADER_LEN, list)
            .map_err(|_| S_IOERR)?;
        let (ranges, rest) = list.as_chunks::<RANGE_LEN>();
        if ranges.is_empty() || !rest.is_empty() {
            return Err(S_IOERR);
        }
        let ranges = ranges.iter();
        let ranges: Vec<Range> = ranges
            .map(|range| Range::parse(*range, kind, self.sectors))
            .collect::<Result<_, _>>()?;
        for range in ranges {
            range
                .apply(kind, &self.file)
                .map_err(|error| self.failed(&error))?;
        }
        Ok(0)
    }

    fn failed(&mut self, error: &io::Error) -> u8 {
        log!(
            self.failures.level(),
            "block: the host refused a request: {error}"
        );
        S_IOERR
    }

    /// Where `len` bytes at `sector` lie in the file, if they are whole sectors of the disk.
    fn place(&self, sector: u64, len: u64) -> Result<i64, u8> {
        let end = sector.checked_add(len / SECTOR).ok_or(S_IOERR)?;
        if !len.is_multiple_of(SECTOR) || len > MAX_TRANSFER || end > self.sectors {
            return Err(S_IOERR);
        }
        sector
            .checked_mul(SECTOR)
            .and_then(|offset| i64::try_from(offset).ok())
            .ok_or(S_IOERR)
    }
}

/// Moves all of `data`, by as many calls as the host needs.
fn transfer(
    data: &mut IoVecs<'_>,
    mut offset: i64,
    step: impl Fn(&IoVecs<'_>, i64) -> io::Result<u64>,
) -> io::Result<()> {
    while !data.is_empty() {
        match step(data, offset) {
            // The file became shorter than the disk.
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

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;

//! The block device (virtio 1.2, section 5.2): a file or block device of the host as a disk.

mod discard;
mod disk;
mod image;
mod layer;
pub(in crate::virtio) mod lock;
mod options;
mod request;
mod ring;
mod work;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, info};
use vm_memory::Bytes as _;

use self::disk::{Disk, Store};
use self::image::Image;
pub use self::layer::Error as LayerError;
use self::layer::Layer;
pub use self::options::{BlockOptions, CacheType, Engine, Error, LayerOptions};
use self::request::{Abilities, HEADER_LEN, Request};
use self::ring::{Job, Ring, Ticket};
use self::work::Work;
use super::chain::{self, Chain};
use super::config_space::ConfigSpace;
use super::device::{
    self, DeviceIo, DeviceType, Event, LogBudget, Queues, Traits, VirtioDevice, states,
};
use super::queue::{self, Progress, QueueStates, Verdict};
use super::rate_limiter::RateLimiter;
use super::update::{Answer, Update, UpdateError};
use crate::event_loop::EventSet;
use crate::memory::GuestMemory;
use crate::memory::iovec::IoVecBuffer;
use crate::metrics::Source;

/// Most queues of a drive.
pub const MAX_QUEUES: u16 = 8;
const QUEUE_SIZES: &[u16] = &[256; MAX_QUEUES as usize];
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
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Most data buffers in a request: the queue's size less header and status.
const SEG_MAX: u32 = 254;
/// Most bytes in one of them. With [`SEG_MAX`] it bounds how long one request takes.
const SIZE_MAX: u32 = 256 << 10;
const MAX_TRANSFER: u64 = SEG_MAX as u64 * SIZE_MAX as u64;

/// Length of the answer to GET_ID.
const ID_LEN: usize = 20;
const STATUS_LEN: u64 = 1;
/// Of the configuration (section 5.2.4), what lies between `seg_max` and `num_queues`: geometry, block size,
/// topology, write-back. Features that are not offered govern them all.
const UNUSED_CONFIG: [u8; 18] = [0; 18];
/// The only descriptor of its own that a drive watches: the ring's.
const RING_KEY: u32 = 0;
/// When to try again what the host had no memory for.
const PATIENCE: Duration = Duration::from_millis(1);

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// The block device.
pub struct Block {
    id: String,
    disk: Disk,
    config: Arc<ConfigSpace>,
    /// Whether discard and write-zeroes are offered.
    discard: bool,
    queues: u16,
    ring: Option<Ring>,
    limiter: RateLimiter,
    running: Option<(Queues, DeviceIo)>,
    pieces: IoVecBuffer,
    /// Queues with chains that the ring had no room for: one bit each.
    starved: u32,
}

impl Block {
    /// A disk as large as the file is now; a last piece of less than a sector is left out.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(options: BlockOptions) -> Result<Self, Error> {
        let id = options.id;
        let base_only_read = options.read_only || options.layer.is_some();
        let image = Image::take(&id, options.file, base_only_read)?;
        let mut can_discard = image.can_discard;
        let mut ring = None;
        let store = match options.layer {
            None => {
                let file = Arc::new(image.file);
                ring = make_ring(&id, options.engine, &file)?;
                Store::File(file)
            }
            Some(_) if options.engine == Engine::Async => {
                let what = "which needs `io_engine` Sync";
                return Err(Error::Layered { id, what });
            }
            Some(layer) => {
                let upper = Image::take(&id, layer.file, false)?;
                can_discard = upper.can_discard;
                let len = image.sectors.saturating_mul(SECTOR);
                let deferred = options.cache == CacheType::Writeback;
                let layer = Layer::open(image.file, upper.file, len, layer.most, deferred);
                let layer = layer.map_err(|source| Error::Layer {
                    id: id.clone(),
                    source,
                })?;
                Store::Layered(Box::new(layer))
            }
        };
        let queues = options.queues.clamp(1, MAX_QUEUES);
        let discard = options.discard && can_discard && !options.read_only;
        Ok(Self {
            disk: Disk {
                id: serial(&id),
                abilities: Abilities {
                    sectors: image.sectors,
                    read_only: options.read_only,
                    flush: options.cache == CacheType::Writeback,
                    discard,
                },
                store,
                failures: LogBudget::default(),
                metrics: Arc::default(),
            },
            id,
            config: ConfigSpace::new(config(image.sectors, queues)),
            discard,
            queues,
            ring,
            limiter: RateLimiter::new(options.limits),
            running: None,
            pieces: IoVecBuffer::default(),
            starved: 0,
        })
    }

    /// Serves what a queue has, a bounded amount of it.
    fn process(&mut self, index: u16) -> Result<Progress, device::Error> {
        let Some((queues, io)) = &mut self.running else {
            return Ok(Progress::Done);
        };
        let Some(Some(queue)) = queues.get_mut(usize::from(index)) else {
            return Ok(Progress::Done);
        };
        let metrics = Arc::clone(&self.disk.metrics);
        metrics.queue_event_count.inc();
        let mut bytes: u64 = 0;
        let mut progress = queue.process(&io.memory, io.signal.as_ref(), BUDGET, |chain| {
            if let Some(at) = self.limiter.wait() {
                metrics.rate_limiter_throttled_events.inc();
                return Ok(Verdict::Later(at));
            }
            if self.ring.as_ref().is_some_and(|ring| !ring.has_room()) {
                metrics.io_engine_throttled_events.inc();
                self.starved |= 1 << index;
                return Ok(Verdict::Keep);
            }
            let written = match &mut self.ring {
                Some(ring) => begin(&mut self.disk, ring, index, &io.memory, chain)?,
                None => Some(serve(&mut self.disk, &mut self.pieces, &io.memory, chain)?),
            };
            // Less than 4 GiB.
            let len = chain.readable_len() + chain.writable_len();
            self.limiter
                .spend(len.saturating_sub(HEADER_LEN + STATUS_LEN));
            bytes = bytes.saturating_add(len);
            Ok(match (written, bytes < BUDGET_BYTES) {
                (Some(written), true) => Verdict::Used(written),
                (Some(written), false) => Verdict::Enough(written),
                (None, true) => Verdict::Taken,
                (None, false) => Verdict::TakenEnough,
            })
        })?;
        if let Some(ring) = &mut self.ring {
            progress = progress.or(submit(ring));
            // What the page cache has is there already.
            progress = progress.or(reap(ring, &mut self.disk, queues, io)?);
        }
        Ok(progress)
    }

    /// Completes what the ring has done, and goes on with what waited for room in it.
    fn ring_is_ready(&mut self) -> Result<Progress, device::Error> {
        let mut progress = match (&mut self.ring, &mut self.running) {
            (Some(ring), Some((queues, io))) => reap(ring, &mut self.disk, queues, io)?,
            _ => return Ok(Progress::Done),
        };
        let starved = std::mem::take(&mut self.starved);
        for index in (0..self.queues).filter(|index| starved & (1 << index) != 0) {
            let more = self.process(index)?;
            if more != Progress::Done {
                self.starved |= 1 << index;
            }
            progress = progress.or(more);
        }
        Ok(progress)
    }

    /// Waits for what is in flight. The driver learns of it unless it broke its queues.
    fn drain(&mut self) {
        let (Some(ring), Some((queues, io))) = (&mut self.ring, &mut self.running) else {
            return;
        };
        let (disk, memory) = (&mut self.disk, &io.memory);
        ring.drain(|ticket, result| {
            // A driver that broke its queue resets the device.
            let _ = complete(disk, queues, memory, ticket, result);
        });
        for queue in queues.iter_mut().flatten() {
            let _ = queue.signal(memory, io.signal.as_ref());
        }
    }

    /// Has `file` in the place of the one that it was, from the next request on. Requests that are being
    /// served end first. The driver is told of another size.
    fn replace(&mut self, file: File) -> Result<(), Error> {
        let Store::File(old) = &self.disk.store else {
            let (id, what) = (self.id.clone(), "and its image cannot be replaced");
            return Err(Error::Layered { id, what });
        };
        let old = Arc::clone(old);
        let read_only = self.disk.abilities.read_only;
        let image = Image::take_instead(&self.id, &old, file, read_only)?;
        let new = Arc::new(image.file);
        self.drain();
        if let Some(ring) = &mut self.ring {
            if let Some((_, io)) = &self.running {
                ring.start(io.memory.clone());
            }
            if let Err(source) = ring.replace(Arc::clone(&new)) {
                image::give_back(&self.id, &new, &old, read_only);
                return Err(Error::Ring {
                    id: self.id.clone(),
                    source,
                });
            }
        }
        image::give_back(&self.id, &old, &new, read_only);
        let abilities = &mut self.disk.abilities;
        abilities.discard = self.discard && image.can_discard;
        self.disk.store = Store::File(new);
        if abilities.sectors != image.sectors {
            abilities.sectors = image.sectors;
            self.config.set(0, &image.sectors.to_le_bytes());
            if let Some((_, io)) = &self.running {
                io.signal.config_changed();
            }
        }
        Ok(())
    }
}

fn make_ring(id: &str, engine: Engine, file: &Arc<File>) -> Result<Option<Ring>, Error> {
    if engine == Engine::Sync {
        return Ok(None);
    }
    match (engine, Ring::new(Arc::clone(file))) {
        (_, Ok(ring)) => Ok(Some(ring)),
        (Engine::Sync | Engine::Auto, Err(error)) => {
            info!(
                "drive {id}: the host gives no io_uring ({error}), so it is served synchronously"
            );
            Ok(None)
        }
        (Engine::Async, Err(source)) => Err(Error::Ring {
            id: id.to_owned(),
            source,
        }),
    }
}

/// struct virtio_blk_config up to write_zeroes_may_unmap (section 5.2.4).
fn config(sectors: u64, queues: u16) -> Vec<u8> {
    [
        &sectors.to_le_bytes()[..],
        &SIZE_MAX.to_le_bytes(),
        &SEG_MAX.to_le_bytes(),
        &UNUSED_CONFIG,
        &queues.to_le_bytes(),
        &discard::MAX_DISCARD.to_le_bytes(),
        &discard::MAX_RANGES.to_le_bytes(),
        // Any sector may begin a range.
        &1u32.to_le_bytes(),
        &discard::MAX_ZEROES.to_le_bytes(),
        &discard::MAX_RANGES.to_le_bytes(),
        // Zeros may take no room, if the guest says so.
        &[1, 0, 0, 0],
    ]
    .concat()
}

/// The answer to GET_ID.
fn serial(id: &str) -> [u8; ID_LEN] {
    let mut serial = [0; ID_LEN];
    for (to, from) in serial.iter_mut().zip(id.bytes()) {
        *to = from;
    }
    serial
}

impl VirtioDevice for Block {
    fn traits(&self) -> Traits {
        let abilities = self.disk.abilities;
        let mut features = F_SIZE_MAX | F_SEG_MAX;
        if abilities.read_only {
            features |= F_RO;
        }
        if abilities.flush {
            features |= F_FLUSH;
        }
        if self.queues > 1 {
            features |= F_MQ;
        }
        if self.discard {
            features |= F_DISCARD | F_WRITE_ZEROES;
        }
        Traits {
            device_type: DeviceType::Block,
            features,
            queue_sizes: QUEUE_SIZES
                .get(..usize::from(self.queues))
                .unwrap_or_default(),
        }
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, queues: Queues, _: u64, io: DeviceIo) -> Result<(), device::Error> {
        if let Some(ring) = &mut self.ring {
            io.events.watch(ring.completed(), RING_KEY, EventSet::IN)?;
            ring.start(io.memory.clone());
        }
        self.starved = 0;
        self.running = Some((queues, io));
        Ok(())
    }

    /// What the ring has in flight ends first: the guest's memory is nobody's afterwards.
    fn stop(&mut self) -> QueueStates {
        self.drain();
        let Some((queues, io)) = self.running.take() else {
            return QueueStates::default();
        };
        if let Some(ring) = &self.ring {
            io.events.unwatch(ring.completed());
        }
        states(&queues)
    }

    fn hold(&mut self) -> Option<QueueStates> {
        self.drain();
        let (queues, io) = self.running.as_ref()?;
        if let Some(ring) = &mut self.ring {
            ring.start(io.memory.clone());
        }
        Some(states(queues))
    }

    fn handle(&mut self, event: Event) -> Result<Progress, device::Error> {
        match event {
            Event::Queue(index) => self.process(index),
            Event::Ready { .. } => self.ring_is_ready(),
        }
    }

    fn metrics(&self) -> Option<Source> {
        let metrics = Arc::clone(&self.disk.metrics);
        Some(Source::device("block", self.id.clone(), metrics))
    }

    fn retire(&mut self) {
        let files = match &self.disk.store {
            Store::File(file) => [Some(file.as_ref()), None],
            Store::Layered(layer) => layer.files().map(Some),
        };
        for file in files.into_iter().flatten() {
            if let Err(error) = lock::release(file) {
                debug!("drive {}: its lock stays: {error}", self.id);
            }
        }
    }

    fn update(&mut self, update: Update) -> Result<Answer, UpdateError> {
        match update {
            Update::Limits(limits) => self.limiter.update(limits),
            Update::File(file) => {
                let replaced = self.replace(file);
                replaced.inspect_err(|_| self.disk.metrics.update_fails.inc())?;
            }
            other => return Err(UpdateError::NotThisDevice(other.name())),
        }
        self.disk.metrics.update_count.inc();
        Ok(Answer::Done)
    }
}

/// Serves a request and returns how many bytes of the chain it wrote, the status byte included.
fn serve(
    disk: &mut Disk,
    pieces: &mut IoVecBuffer,
    memory: &GuestMemory,
    chain: &Chain,
) -> Result<u32, chain::Error> {
    let room = room(chain)?;
    let answer = disk.answer(pieces, memory, chain, room);
    end(memory, chain, room, answer)
}

/// Room for data in a chain. Without a status byte there is no way to report anything: the queue is broken.
fn room(chain: &Chain) -> Result<u64, chain::Error> {
    let room = chain.writable_len().checked_sub(STATUS_LEN);
    room.ok_or(chain::Error::TooShort { head: chain.head() })
}

fn end(
    memory: &GuestMemory,
    chain: &Chain,
    room: u64,
    answer: Result<u64, u8>,
) -> Result<u32, chain::Error> {
    let (status, written) = match answer {
        Ok(written) => (S_OK, written),
        Err(status) => (status, 0),
    };
    chain.write_at(memory, room, &[status])?;
    // `written` is at most `MAX_TRANSFER`.
    Ok(written as u32 + 1)
}

/// Puts a request in the ring, or answers it at once: then how many bytes of the chain were written.
fn begin(
    disk: &mut Disk,
    ring: &mut Ring,
    queue: u16,
    memory: &GuestMemory,
    chain: &Chain,
) -> Result<Option<u32>, chain::Error> {
    let room = room(chain)?;
    let status = chain
        .writable_address(room)
        .ok_or(chain::Error::TooShort { head: chain.head() })?;
    let request = match disk.parse(memory, chain, room) {
        Err(status) => return end(memory, chain, room, Err(status)).map(Some),
        Ok(request) => request,
    };
    let mut ticket = Ticket {
        queue,
        head: chain.head(),
        status,
        written: 0,
        work: Work::begin(&request),
    };
    let job = match request {
        Request::Id => {
            let answer = chain.write_at(memory, 0, &disk.id);
            let answer = answer.map(|()| ID_LEN as u64).map_err(|_| S_IOERR);
            return end(memory, chain, room, answer).map(Some);
        }
        Request::Read { offset, len } => {
            // At most `MAX_TRANSFER`.
            ticket.written = len as u32;
            Job::Read {
                segments: chain.writable(),
                offset,
                len,
            }
        }
        Request::Write { offset, len } => Job::Write {
            segments: chain.readable(),
            skip: HEADER_LEN,
            offset,
            len,
        },
        Request::Flush => Job::Sync,
        Request::Deallocate { kind, ranges } => Job::Deallocate { kind, ranges },
    };
    match ring.push(job, ticket) {
        Ok(()) => Ok(None),
        Err(_) => end(memory, chain, room, Err(S_IOERR)).map(Some),
    }
}

/// Hands to the kernel what was put in the ring.
fn submit(ring: &Ring) -> Progress {
    match ring.submit() {
        Ok(()) => Progress::Done,
        // It is short of memory: what was put in the ring stays there.
        Err(_) => Progress::Later(Instant::now() + PATIENCE),
    }
}

/// Completes what the ring has done.
fn reap(
    ring: &mut Ring,
    disk: &mut Disk,
    queues: &mut Queues,
    io: &DeviceIo,
) -> Result<Progress, device::Error> {
    let mut result = Ok(());
    let again = ring.reap(|ticket, outcome| {
        let completed = complete(disk, queues, &io.memory, ticket, outcome);
        if result.is_ok() {
            result = completed;
        }
    });
    result?;
    for queue in queues.iter_mut().flatten() {
        queue.signal(&io.memory, io.signal.as_ref())?;
    }
    Ok(if again { submit(ring) } else { Progress::Done })
}

/// Tells the driver how a request of the ring ended.
fn complete(
    disk: &mut Disk,
    queues: &mut Queues,
    memory: &GuestMemory,
    ticket: Ticket,
    result: io::Result<()>,
) -> Result<(), queue::Error> {
    let (status, written) = match result {
        Ok(()) => {
            ticket.work.end(&disk.metrics);
            (S_OK, ticket.written)
        }
        Err(error) => (disk.failed(&error), 0),
    };
    // The address was checked when the chain was taken, and guest memory does not go away.
    let _ = memory.write_obj(status, ticket.status);
    match queues.get_mut(usize::from(ticket.queue)) {
        Some(Some(queue)) => queue.complete(memory, ticket.head, written.saturating_add(1)),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod engine_tests;
#[cfg(test)]
mod rewrite_tests;
#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;

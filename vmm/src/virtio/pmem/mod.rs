//! Persistent memory (virtio 1.2, section 5.19): a file in the guest's address space.
//!
//! The guest reads and writes the memory itself; the device only says where it is, and flushes. The
//! memory is not part of the [`GuestMemory`](crate::memory::GuestMemory) that devices see: a queue or
//! a buffer in it is refused as one outside memory is, so that nothing in this process ever touches it.

mod file;

use std::fs::File;
use std::io;
use std::sync::Arc;

use log::log;
use thiserror::Error;

use super::chain::{self, Chain};
use super::config_space::ConfigSpace;
use super::device::{
    self, DeviceIo, DeviceType, Event, LogBudget, Queues, Traits, VirtioDevice, states,
};
use super::queue::{Progress, QueueStates, Verdict};
use super::rate_limiter::{LimiterOptions, RateLimiter};
use super::update::{Answer, Update, UpdateError};
use crate::memory::GuestMemory;
use crate::memory::file_mapping::{self, FileMapping};
use crate::metrics::Source;
use crate::metrics::fields::PmemMetrics;

pub use file::PmemFile;

const QUEUE_SIZES: &[u16] = &[64];
/// Requests served before the other devices get their turn; one flush serves them all.
const BUDGET: usize = 64;

/// VIRTIO_PMEM_REQ_TYPE_FLUSH (section 5.19.6).
const FLUSH: u32 = 0;
/// Of the answer: done, or not.
const DONE: u32 = 0;
const FAILED: u32 = u32::MAX;

/// A persistent memory device to be.
#[derive(Debug)]
pub struct PmemOptions {
    /// Its name, for messages.
    pub id: String,
    /// A regular file or a block device, open for reading, and for writing unless `read_only`.
    pub file: File,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// How often it may be flushed: a flush counts as many bytes as the file has.
    pub limits: LimiterOptions,
}

/// Why there is no persistent memory.
#[derive(Debug, Error)]
pub enum Error {
    /// The file is a directory, a pipe, a socket...
    #[error("pmem {id}: neither a regular file nor a block device")]
    WrongKind {
        /// Its id.
        id: String,
    },
    /// The file's size or kind cannot be found out.
    #[error("pmem {id}: cannot find its size: {source}")]
    Size {
        /// Its id.
        id: String,
        /// What the host said.
        source: io::Error,
    },
    /// Another machine uses it.
    #[error(
        "pmem {id}: another machine uses its file{}: a file has one writer or any number of readers",
        if *.read_only { ", and may write to it" } else { "" }
    )]
    InUse {
        /// Its id.
        id: String,
        /// Whether this machine would only read it.
        read_only: bool,
    },
    /// It cannot be locked.
    #[error("pmem {id}: cannot lock its file: {source}")]
    Lock {
        /// Its id.
        id: String,
        /// What the host says.
        source: io::Error,
    },
    /// It cannot be mapped.
    #[error("pmem {id}: {source}")]
    Map {
        /// Its id.
        id: String,
        /// Why.
        source: file_mapping::Error,
    },
}

/// The device.
pub struct Pmem {
    file: Arc<PmemFile>,
    address: u64,
    read_only: bool,
    config: Arc<ConfigSpace>,
    limiter: RateLimiter,
    running: Option<(Queues, DeviceIo)>,
    failures: LogBudget,
    metrics: Arc<PmemMetrics>,
}

impl Pmem {
    /// Locks and maps the file. The device is one once it has a place: [`Pmem::at`].
    ///
    /// # Errors
    /// See [`Error`].
    pub fn map(options: PmemOptions) -> Result<(Unplaced, Arc<FileMapping>), Error> {
        let PmemOptions {
            id,
            file,
            read_only,
            limits,
        } = options;
        let file = PmemFile::take(id, file, read_only)?;
        Self::map_taken(&Arc::new(file), read_only, limits)
    }

    /// The same with a file that has been taken: by the thread that may lock it.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn map_taken(
        file: &Arc<PmemFile>,
        read_only: bool,
        limits: LimiterOptions,
    ) -> Result<(Unplaced, Arc<FileMapping>), Error> {
        let mapping =
            FileMapping::new(file.file(), file.len(), read_only).map_err(|source| Error::Map {
                id: file.id().to_owned(),
                source,
            })?;
        let unplaced = Unplaced {
            file: Arc::clone(file),
            read_only,
            size: mapping.size(),
            limits,
        };
        Ok((unplaced, Arc::new(mapping)))
    }

    /// What it maps, to be looked at when the guest cannot go on.
    pub fn file(&self) -> &Arc<PmemFile> {
        &self.file
    }

    /// Where its memory is in the guest's address space.
    pub fn address(&self) -> u64 {
        self.address
    }

    fn flush(&mut self) -> u32 {
        // A guest that only reads has written nothing.
        if self.read_only {
            return DONE;
        }
        match self.file.flush() {
            Ok(()) => DONE,
            Err(error) => {
                self.metrics.event_fails.inc();
                log!(
                    self.failures.level(),
                    "pmem {}: the host refused a flush: {error}",
                    self.file.id()
                );
                FAILED
            }
        }
    }
}

/// A device without a place in the guest's address space.
pub struct Unplaced {
    file: Arc<PmemFile>,
    read_only: bool,
    size: u64,
    limits: LimiterOptions,
}

impl Unplaced {
    /// The device whose memory is mapped at `address`.
    pub fn at(self, address: u64) -> Pmem {
        // struct virtio_pmem_config (section 5.19.4).
        let config = [address.to_le_bytes(), self.size.to_le_bytes()].concat();
        Pmem {
            file: self.file,
            address,
            read_only: self.read_only,
            config: ConfigSpace::new(config),
            limiter: RateLimiter::new(self.limits),
            running: None,
            failures: LogBudget::default(),
            metrics: Arc::default(),
        }
    }
}

impl VirtioDevice for Pmem {
    fn traits(&self) -> Traits {
        Traits {
            device_type: DeviceType::Pmem,
            features: 0,
            queue_sizes: QUEUE_SIZES,
        }
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
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

    fn hold(&mut self) -> Option<QueueStates> {
        self.running.as_ref().map(|(queues, _)| states(queues))
    }

    fn handle(&mut self, _: Event) -> Result<Progress, device::Error> {
        // Out of the way of `flush`, which takes all of the device.
        let Some((mut queues, io)) = self.running.take() else {
            return Ok(Progress::Done);
        };
        let result = match &mut queues {
            [Some(queue), ..] => {
                self.metrics.queue_event_count.inc();
                let mut flushed = None;
                queue.process(&io.memory, io.signal.as_ref(), BUDGET, |chain| {
                    self.serve(&io.memory, chain, &mut flushed)
                })
            }
            _ => Ok(Progress::Done),
        };
        self.running = Some((queues, io));
        Ok(result?)
    }

    fn metrics(&self) -> Option<Source> {
        let id = self.file.id().to_owned();
        Some(Source::device("pmem", id, self.metrics.clone()))
    }

    fn retire(&mut self) {
        self.file.release();
    }

    fn update(&mut self, update: Update) -> Result<Answer, UpdateError> {
        match update {
            Update::Limits(limits) => self.limiter.update(limits),
            other => return Err(UpdateError::NotThisDevice(other.name())),
        }
        Ok(Answer::Done)
    }
}

impl Pmem {
    /// Answers one request. All that came before a flush began are served by it: `flushed` is its result.
    fn serve(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        flushed: &mut Option<u32>,
    ) -> Result<Verdict, chain::Error> {
        let mut request = [0; 4];
        let understood =
            chain.read_at(memory, 0, &mut request).is_ok() && u32::from_le_bytes(request) == FLUSH;
        let answer = match flushed {
            _ if !understood => FAILED,
            Some(result) => *result,
            None => {
                if let Some(at) = self.limiter.wait() {
                    self.metrics.rate_limiter_throttled_events.inc();
                    return Ok(Verdict::Later(at));
                }
                self.limiter.spend(self.file.len());
                *flushed.insert(self.flush())
            }
        };
        // Without room for it there is no way to answer anything: the queue is broken.
        chain.write_at(memory, 0, &answer.to_le_bytes())?;
        Ok(Verdict::Used(4))
    }
}

#[cfg(test)]
#[path = "pmem_tests.rs"]
mod tests;

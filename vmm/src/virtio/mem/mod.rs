//! The memory device (virtio 1.2, section 5.15): memory that comes and goes while the guest runs.
//!
//! The host says how much it wants to be plugged in, and the driver plugs and unplugs blocks until
//! that is so. What an unplugged block is to the guest: see [`crate::memory::hotplug`].

mod request;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use log::log;
use thiserror::Error;

use self::request::{Answer, Request};
use super::chain::{self, Chain};
use super::config_space::ConfigSpace;
use super::device::{
    self, DeviceIo, DeviceType, Event, LogBudget, Queues, Traits, VirtioDevice, states,
};
use super::queue::{Progress, QueueStates, Verdict};
use super::update::{self, Update, UpdateError};
use crate::memory::GuestMemory;
use crate::memory::hotplug::{HotplugRegion, State};
use crate::metrics::fields::MemoryHotplugMetrics;
use crate::metrics::{Latency, Source};

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (section 5.15.3): unplugged memory is not to be touched.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

const QUEUE_SIZES: &[u16] = &[128];
/// Requests served before the other devices get their turn. One of them takes time in proportion to
/// the memory that it takes from the guest.
const BUDGET: usize = 16;

/// In the configuration space (section 5.15.4): the size of a block, a node, padding, the region's
/// address, its size and how much of it may be used, then these.
const PLUGGED_OFFSET: usize = 40;
const REQUESTED_OFFSET: usize = 48;

/// A memory device.
#[derive(Debug)]
pub struct MemOptions {
    /// Where memory is plugged in.
    pub region: Arc<HotplugRegion>,
    /// How much the guest should plug in as soon as it can, in MiB.
    pub requested_size_mib: u32,
}

/// What the operator asks of a memory device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Have so much plugged in, in MiB.
    Resize(u32),
    /// Tell how things are.
    Report,
}

/// How a memory device is, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// How much could be plugged in.
    pub total_size: u64,
    /// The size of a block.
    pub block_size: u64,
    /// How much is plugged in.
    pub plugged_size: u64,
    /// How much should be.
    pub requested_size: u64,
}

/// Why a memory device was not made or not changed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// More than there is room for.
    #[error("cannot plug {wanted} MiB in: there is room for {total}")]
    TooLarge {
        /// How much was wanted, in MiB.
        wanted: u32,
        /// How much there can be, in MiB.
        total: u64,
    },
    /// Not whole blocks.
    #[error("cannot plug {wanted} MiB in: it comes in blocks of {block}")]
    Misaligned {
        /// How much was wanted, in MiB.
        wanted: u32,
        /// The size of a block, in MiB.
        block: u64,
    },
}

/// The memory device.
pub struct Mem {
    blocks: Blocks,
    running: Option<(Queues, DeviceIo)>,
}

struct Blocks {
    region: Arc<HotplugRegion>,
    requested: u64,
    config: Arc<ConfigSpace>,
    failures: LogBudget,
    metrics: Arc<MemoryHotplugMetrics>,
}

impl Mem {
    /// A device with nothing plugged in.
    ///
    /// # Errors
    /// When more should be than can.
    pub fn new(options: MemOptions) -> Result<Self, Error> {
        let region = options.region;
        let mut config = Vec::new();
        // Everything in the region may be used: what is plugged in is bounded by what is requested.
        let (size, none) = (region.len(), 0);
        for field in [
            region.block_size(),
            none,
            region.start(),
            size,
            size,
            none,
            none,
        ] {
            config.extend_from_slice(&field.to_le_bytes());
        }
        let mut blocks = Blocks {
            region,
            requested: 0,
            config: ConfigSpace::new(config),
            failures: LogBudget::default(),
            metrics: Arc::default(),
        };
        blocks.resize(options.requested_size_mib)?;
        Ok(Self {
            blocks,
            running: None,
        })
    }
}

impl VirtioDevice for Mem {
    fn traits(&self) -> Traits {
        Traits {
            device_type: DeviceType::Mem,
            features: F_UNPLUGGED_INACCESSIBLE,
            queue_sizes: QUEUE_SIZES,
        }
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.blocks.config)
    }

    fn start(&mut self, queues: Queues, _: u64, io: DeviceIo) -> Result<(), device::Error> {
        self.running = Some((queues, io));
        Ok(())
    }

    /// What is plugged in stays so, as section 5.15.5 wants it of a reset: it is the guest's memory.
    fn stop(&mut self) -> QueueStates {
        let running = self.running.take();
        running
            .map(|(queues, _)| states(&queues))
            .unwrap_or_default()
    }

    fn hold(&mut self) -> Option<QueueStates> {
        self.running.as_ref().map(|(queues, _)| states(queues))
    }

    fn obstacle(&self) -> Option<&'static str> {
        Some("memory that is plugged in is not saved yet")
    }

    fn handle(&mut self, _: Event) -> Result<Progress, device::Error> {
        let Some(([Some(queue), ..], io)) = &mut self.running else {
            return Ok(Progress::Done);
        };
        let blocks = &mut self.blocks;
        blocks.metrics.queue_event_count.inc();
        let progress = queue.process(&io.memory, io.signal.as_ref(), BUDGET, |chain| {
            blocks.serve(&io.memory, chain).map(Verdict::Used)
        });
        if progress.is_err() {
            blocks.metrics.queue_event_fails.inc();
        }
        Ok(progress?)
    }

    fn metrics(&self) -> Option<Source> {
        Some(Source::new("memory_hotplug", self.blocks.metrics.clone()))
    }

    fn update(&mut self, update: Update) -> Result<update::Answer, UpdateError> {
        match update {
            Update::Mem(Command::Resize(mib)) => {
                self.blocks.resize(mib)?;
                // A driver that comes later reads it anyway.
                if let Some((_, io)) = &self.running {
                    io.signal.config_changed();
                }
                Ok(update::Answer::Done)
            }
            Update::Mem(Command::Report) => Ok(update::Answer::Mem(self.blocks.status())),
            other => Err(UpdateError::NotThisDevice(other.name())),
        }
    }
}

impl Blocks {
    fn status(&self) -> Status {
        Status {
            total_size: self.region.len(),
            block_size: self.region.block_size(),
            plugged_size: self.region.plugged_size(),
            requested_size: self.requested,
        }
    }

    fn resize(&mut self, mib: u32) -> Result<(), Error> {
        let size = u64::from(mib) << 20;
        if size > self.region.len() {
            return Err(Error::TooLarge {
                wanted: mib,
                total: self.region.len() >> 20,
            });
        }
        if !size.is_multiple_of(self.region.block_size()) {
            return Err(Error::Misaligned {
                wanted: mib,
                block: self.region.block_size() >> 20,
            });
        }
        self.requested = size;
        self.config.set(REQUESTED_OFFSET, &size.to_le_bytes());
        Ok(())
    }

    /// Serves a request, and says how many bytes the answer has.
    fn serve(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<u32, chain::Error> {
        let mut bytes = [0; request::LEN];
        let request = match chain.read_at(memory, 0, &mut bytes) {
            Ok(()) => Request::parse(&bytes),
            Err(_) => None,
        };
        let answer = request.map_or(Answer::Error, |request| self.answer(request));
        // Without room for the answer the queue is broken.
        chain.write_at(memory, 0, &answer.bytes())?;
        Ok(request::ANSWER_LEN as u32)
    }

    fn answer(&mut self, request: Request) -> Answer {
        let start = Instant::now();
        let answer = match request {
            Request::Plug { address, blocks } => self.plug(address, blocks),
            Request::Unplug { address, blocks } => self.unplug(address, blocks),
            Request::UnplugAll => self.unplug_all(),
            Request::State { address, blocks } => self.state(address, blocks),
        };
        self.count(request, answer, start);
        let plugged = self.region.plugged_size();
        self.config.set(PLUGGED_OFFSET, &plugged.to_le_bytes());
        answer
    }

    fn plug(&mut self, address: u64, count: u16) -> Answer {
        let Some(blocks) = self.region.blocks(address, count) else {
            return Answer::Error;
        };
        if self.region.state(blocks.clone()) != State::Unplugged {
            return Answer::Error;
        }
        // Neither is more than the region's size.
        let more = u64::from(count) * self.region.block_size();
        if self.region.plugged_size().saturating_add(more) > self.requested {
            return Answer::Nack;
        }
        match self.region.plug(blocks) {
            Ok(()) => Answer::Ack(0),
            Err(error) => self.busy("plug memory in", &error),
        }
    }

    fn unplug(&mut self, address: u64, count: u16) -> Answer {
        let Some(blocks) = self.region.blocks(address, count) else {
            return Answer::Error;
        };
        if self.region.state(blocks.clone()) != State::Plugged {
            return Answer::Error;
        }
        match self.region.unplug(blocks) {
            Ok(()) => Answer::Ack(0),
            Err(error) => self.busy("take memory away", &error),
        }
    }

    fn unplug_all(&mut self) -> Answer {
        match self.region.unplug(self.region.all()) {
            Ok(()) => Answer::Ack(0),
            Err(error) => self.busy("take all memory away", &error),
        }
    }

    fn state(&self, address: u64, count: u16) -> Answer {
        let Some(blocks) = self.region.blocks(address, count) else {
            return Answer::Error;
        };
        Answer::Ack(match self.region.state(blocks) {
            State::Plugged => 0,
            State::Unplugged => 1,
            State::Mixed => 2,
        })
    }

    fn busy(&mut self, what: &str, error: &io::Error) -> Answer {
        log!(
            self.failures.level(),
            "memory device: the host does not let us {what}: {error}"
        );
        Answer::Busy
    }

    fn count(&self, request: Request, answer: Answer, start: Instant) {
        let metrics = &*self.metrics;
        let bytes = |blocks: u16| u64::from(blocks).saturating_mul(self.region.block_size());
        let done = matches!(answer, Answer::Ack(_));
        let (count, fails, time): (_, _, &Latency) = match request {
            Request::Plug { blocks, .. } => {
                if done {
                    metrics.plug_bytes.add(bytes(blocks));
                }
                (&metrics.plug_count, &metrics.plug_fails, &metrics.plug_agg)
            }
            Request::Unplug { blocks, .. } => {
                if done {
                    metrics.unplug_bytes.add(bytes(blocks));
                }
                (
                    &metrics.unplug_count,
                    &metrics.unplug_fails,
                    &metrics.unplug_agg,
                )
            }
            Request::UnplugAll => (
                &metrics.unplug_all_count,
                &metrics.unplug_all_fails,
                &metrics.unplug_all_agg,
            ),
            Request::State { .. } => (
                &metrics.state_count,
                &metrics.state_fails,
                &metrics.state_agg,
            ),
        };
        count.inc();
        if !done {
            fails.inc();
        }
        time.record(start);
    }
}

#[cfg(test)]
#[path = "mem_tests.rs"]
mod tests;

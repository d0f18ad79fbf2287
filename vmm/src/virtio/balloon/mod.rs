//! The memory balloon (virtio 1.2, section 5.5): the guest gives memory back to the host.
//!
//! | module | what |
//! |---|---|
//! | `pages` | pages that go into the balloon |
//! | `statistics` | what the guest tells of its memory |
//! | `hinting` | free pages, listed once on command |
//!
//! Whatever the guest lists is a range of its own memory that it wants to lose, or none at all; the
//! worst that a lie does is to the liar. A page that comes out of the balloon needs nothing: the
//! guest touches it, and the host gives a new one.

mod hinting;
mod pages;
mod statistics;

use std::sync::Arc;
use std::time::{Duration, Instant};

use log::log;
use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;

use self::hinting::Hinting;
pub use self::hinting::Status as HintingStatus;
use self::statistics::Poll;
pub use self::statistics::Statistics;
use super::chain::{self, Chain};
use super::config_space::ConfigSpace;
use super::device::{
    self, DeviceIo, DeviceType, Event, LogBudget, Queues, RestoreError, Traits, VirtioDevice,
    states,
};
use super::queue::{Progress, QueueStates, Signal, Verdict};
use super::update::{Answer, Update, UpdateError};
use crate::memory::GuestMemory;
use crate::memory::release::{PAGE, release};
use crate::metrics::fields::BalloonMetrics;
use crate::metrics::{Counter, Source};

/// Feature bits (section 5.5.3).
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_FREE_PAGE_HINT: u64 = 1 << 3;
const F_REPORTING: u64 = 1 << 5;

const QUEUE_SIZES: &[u16] = &[256; 5];
/// Chains served before the other devices get their turn.
const BUDGET: usize = 16;
/// Bytes given back after which they get it earlier. One chain more than that is at most.
const BUDGET_BYTES: u64 = 64 << 20;
/// Most bytes given back for one chain of ranges: more than Linux reports at once, 32 blocks of 4 MiB. Those beyond
/// stay with the guest, which is allowed. A chain may hold nearly 4 GiB, which takes the host a good part of a second.
const CHAIN_BYTES: u64 = 256 << 20;
const PAGES_PER_MIB: u32 = 256;

/// In the configuration space (section 5.5.4): `num_pages`, then `actual`, which the driver writes,
/// then the command of free-page hinting.
const ACTUAL_OFFSET: usize = 4;
const CONFIG_LEN: usize = 12;

/// A balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonOptions {
    /// How large it should be, in MiB.
    pub amount_mib: u32,
    /// Whether the guest takes pages out of it before it runs out of memory.
    pub deflate_on_oom: bool,
    /// How often the guest tells of its memory, in seconds; 0 is never.
    pub stats_polling_interval_s: u16,
    /// Whether the guest lists its free pages on command.
    pub free_page_hinting: bool,
    /// Whether the guest gives its free pages back all the time.
    pub free_page_reporting: bool,
}

/// What the operator asks of a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Be so large, in MiB.
    Resize(u32),
    /// Ask for statistics every so many seconds, beginning now.
    StatisticsInterval(u16),
    /// Have the guest list its free pages.
    StartHinting {
        /// Whether it may use them again once it has listed all.
        acknowledge_on_stop: bool,
    },
    /// Let it use them again.
    StopHinting,
    /// Tell how things are.
    Report,
}

/// How a balloon is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// As it was made, with the size and the interval that are wanted now.
    pub options: BalloonOptions,
    /// Pages of 4 KiB that should be in it.
    pub target_pages: u32,
    /// Pages that are in it, as the driver says.
    pub actual_pages: u32,
    /// What the guest told of its memory; `None` where it is never asked.
    pub statistics: Option<Statistics>,
    /// Where free-page hinting stands; `None` where there is none.
    pub hinting: Option<HintingStatus>,
}

/// Why a balloon was not made or not changed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// More pages than 32 bits count.
    #[error("a balloon of {0} MiB is too large: use at most {max}", max = u32::MAX / PAGES_PER_MIB)]
    TooLarge(u32),
    /// There are none.
    #[error(
        "the balloon has no statistics: give it a `stats_polling_interval_s` before the machine starts"
    )]
    NoStatistics,
    /// They go on for ever.
    #[error(
        "statistics cannot be turned on or off while the machine runs: `stats_polling_interval_s` stays 0 or stays above"
    )]
    StatisticsSwitch,
    /// There is none.
    #[error(
        "the balloon has no free-page hinting: give it `free_page_hinting` before the machine starts"
    )]
    NoHinting,
    /// There is no driver that could do it.
    #[error("no driver of the guest uses the balloon")]
    NotRunning,
}

/// What a queue is for. Those of features that the driver does not take are not there: the next
/// one has its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

impl Role {
    /// That of the queue with this number.
    fn of(queue: u16, features: u64) -> Option<Self> {
        let roles = [
            (Self::Inflate, true),
            (Self::Deflate, true),
            (Self::Statistics, features & F_STATS_VQ != 0),
            (Self::Hinting, features & F_FREE_PAGE_HINT != 0),
            (Self::Reporting, features & F_REPORTING != 0),
        ];
        let mut used = roles.into_iter().filter(|(_, used)| *used);
        used.nth(queue.into()).map(|(role, _)| role)
    }
}

/// The balloon device.
pub struct Balloon {
    options: BalloonOptions,
    features: u64,
    config: Arc<ConfigSpace>,
    statistics: Poll,
    hinting: Hinting,
    running: Option<Running>,
    failures: LogBudget,
    metrics: Arc<BalloonMetrics>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    actual: u32,
}

struct Running {
    queues: Queues,
    features: u64,
    io: DeviceIo,
}

impl Balloon {
    /// A balloon that is empty, and should be as large as `options` say.
    ///
    /// # Errors
    /// When that is too large.
    pub fn new(options: BalloonOptions) -> Result<Self, Error> {
        let offered = [
            (F_STATS_VQ, options.stats_polling_interval_s > 0),
            (F_DEFLATE_ON_OOM, options.deflate_on_oom),
            (F_FREE_PAGE_HINT, options.free_page_hinting),
            (F_REPORTING, options.free_page_reporting),
        ];
        let features = offered
            .into_iter()
            .filter(|(_, offered)| *offered)
            .fold(0, |all, (feature, _)| all | feature);
        let writable = ACTUAL_OFFSET..ACTUAL_OFFSET + 4;
        let config = ConfigSpace::with_writable(vec![0; CONFIG_LEN], writable);
        config.set(0, &pages(options.amount_mib)?.to_le_bytes());
        Ok(Self {
            features,
            statistics: Poll::new(seconds(options.stats_polling_interval_s)),
            hinting: Hinting::new(Arc::clone(&config)),
            config,
            options,
            running: None,
            failures: LogBudget::default(),
            metrics: Arc::default(),
        })
    }

    fn resize(&mut self, amount_mib: u32) -> Result<(), Error> {
        self.config.set(0, &pages(amount_mib)?.to_le_bytes());
        self.options.amount_mib = amount_mib;
        // A driver that comes later reads it anyway.
        if let Some(running) = &self.running {
            running.io.signal.config_changed();
        }
        Ok(())
    }

    fn set_interval(&mut self, interval: u16) -> Result<(), Error> {
        let before = self.options.stats_polling_interval_s;
        if (before == 0) != (interval == 0) {
            return Err(Error::StatisticsSwitch);
        }
        if before != interval {
            self.options.stats_polling_interval_s = interval;
            self.statistics
                .set_interval(seconds(interval), Instant::now());
        }
        Ok(())
    }

    /// Commands the guest's driver, if there is one that can.
    fn hint(&mut self, command: impl FnOnce(&mut Hinting, &dyn Signal)) -> Result<(), Error> {
        if !self.options.free_page_hinting {
            return Err(Error::NoHinting);
        }
        match &self.running {
            Some(running) if running.features & F_FREE_PAGE_HINT != 0 => {
                command(&mut self.hinting, running.io.signal.as_ref());
                Ok(())
            }
            _ => Err(Error::NotRunning),
        }
    }

    fn status(&self) -> Status {
        let options = self.options;
        Status {
            options,
            target_pages: self.config.u32_at(0),
            actual_pages: self.config.u32_at(ACTUAL_OFFSET as u64),
            statistics: (options.stats_polling_interval_s > 0).then(|| self.statistics.latest()),
            hinting: options.free_page_hinting.then(|| self.hinting.status()),
        }
    }
}

fn pages(mib: u32) -> Result<u32, Error> {
    mib.checked_mul(PAGES_PER_MIB).ok_or(Error::TooLarge(mib))
}

fn seconds(count: u16) -> Duration {
    Duration::from_secs(count.into())
}

impl VirtioDevice for Balloon {
    fn traits(&self) -> Traits {
        let queues = [F_STATS_VQ, F_FREE_PAGE_HINT, F_REPORTING]
            .into_iter()
            .filter(|feature| self.features & feature != 0)
            .count()
            .saturating_add(2);
        Traits {
            device_type: DeviceType::Balloon,
            features: self.features,
            queue_sizes: QUEUE_SIZES.get(..queues).unwrap_or(QUEUE_SIZES),
        }
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, queues: Queues, features: u64, io: DeviceIo) -> Result<(), device::Error> {
        self.running = Some(Running {
            queues,
            features,
            io,
        });
        Ok(())
    }

    /// The statistics buffer that the device keeps is one that it has not taken from its ring yet: so
    /// nothing is in flight.
    fn stop(&mut self) -> QueueStates {
        self.statistics.stop();
        self.hinting.reset();
        let running = self.running.take();
        running.map(|r| states(&r.queues)).unwrap_or_default()
    }

    /// The statistics buffer that the device keeps is one that it has not taken from its ring yet.
    fn hold(&mut self) -> Option<QueueStates> {
        self.running.as_ref().map(|running| states(&running.queues))
    }

    /// What the driver says that it has put in. Its run of hints is over on another machine.
    fn save(&self) -> Value {
        json!({ "actual": self.config.u32_at(ACTUAL_OFFSET as u64) })
    }

    fn restore(&mut self, saved: &Value) -> Result<(), RestoreError> {
        let Saved { actual } = Saved::deserialize(saved)?;
        self.config.set(ACTUAL_OFFSET, &actual.to_le_bytes());
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Result<Progress, device::Error> {
        let (Event::Queue(index), Some(running)) = (event, &mut self.running) else {
            return Ok(Progress::Done);
        };
        let io = &running.io;
        let queue = running.queues.get_mut(usize::from(index));
        let (Some(Some(queue)), Some(role)) = (queue, Role::of(index, running.features)) else {
            return Ok(Progress::Done);
        };
        let signal = io.signal.as_ref();
        let mut giver = Giver {
            memory: &io.memory,
            failures: &mut self.failures,
            bytes: 0,
        };
        let metrics = &self.metrics;
        let reports = [
            &metrics.free_page_report_count,
            &metrics.free_page_report_freed,
            &metrics.free_page_report_fails,
        ];
        let hints = [
            &metrics.free_page_hint_count,
            &metrics.free_page_hint_freed,
            &metrics.free_page_hint_fails,
        ];
        let progress = queue.process(&io.memory, signal, BUDGET, |chain| {
            match role {
                Role::Inflate => {
                    metrics.inflate_count.inc();
                    giver.inflate(chain)?;
                }
                Role::Deflate => metrics.deflate_count.inc(),
                Role::Reporting => giver.give_ranges(chain, reports),
                Role::Hinting => {
                    if let Some(command) = command(&io.memory, chain)? {
                        self.hinting.take(command, signal);
                    }
                    if self.hinting.accepts_pages() {
                        giver.give_ranges(chain, hints);
                    }
                }
                Role::Statistics => {
                    let served = self.statistics.serve(&io.memory, chain, Instant::now());
                    match served {
                        Ok(Verdict::Used(_)) => metrics.stats_updates_count.inc(),
                        Ok(_) => {}
                        Err(_) => metrics.stats_update_fails.inc(),
                    }
                    return served;
                }
            }
            Ok(if giver.bytes < BUDGET_BYTES {
                Verdict::Used(0)
            } else {
                Verdict::Enough(0)
            })
        });
        if progress.is_err() {
            metrics.event_fails.inc();
        }
        Ok(progress?)
    }

    fn metrics(&self) -> Option<Source> {
        Some(Source::new("balloon", self.metrics.clone()))
    }

    fn update(&mut self, update: Update) -> Result<Answer, UpdateError> {
        let Update::Balloon(command) = update else {
            return Err(UpdateError::NotThisDevice(update.name()));
        };
        match command {
            Command::Resize(amount_mib) => self.resize(amount_mib)?,
            Command::StatisticsInterval(seconds) => self.set_interval(seconds)?,
            Command::StartHinting {
                acknowledge_on_stop,
            } => self.hint(|hinting, signal| hinting.start(acknowledge_on_stop, signal))?,
            Command::StopHinting => self.hint(Hinting::done)?,
            Command::Report => return Ok(Answer::Balloon(Box::new(self.status()))),
        }
        Ok(Answer::Done)
    }
}

/// The driver's command in a chain of the hinting queue, if it is one.
fn command(memory: &GuestMemory, chain: &Chain) -> Result<Option<u32>, chain::Error> {
    let mut bytes = [0; 4];
    if chain.readable_len() != bytes.len() as u64 {
        return Ok(None);
    }
    chain.read_at(memory, 0, &mut bytes)?;
    Ok(Some(u32::from_le_bytes(bytes)))
}

/// Gives the host memory, and counts it.
struct Giver<'a> {
    memory: &'a GuestMemory,
    failures: &'a mut LogBudget,
    bytes: u64,
}

impl Giver<'_> {
    /// Gives the pages that a chain lists by number.
    fn inflate(&mut self, chain: &Chain) -> Result<(), chain::Error> {
        let mut list = [0; pages::MAX_LIST_LEN];
        let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
        let len = len.min(list.len());
        let list = list.get_mut(..len).unwrap_or_default();
        chain.read_at(self.memory, 0, list)?;
        pages::runs(list, |start, len| {
            self.give(start, len);
        });
        Ok(())
    }

    /// Gives the buffers that a chain has for the device to write to, up to [`CHAIN_BYTES`] of them. Counts the
    /// ranges, the bytes and the ranges that the host did not take.
    fn give_ranges(&mut self, chain: &Chain, [ranges, bytes, fails]: [&Counter; 3]) {
        let mut left = CHAIN_BYTES;
        for segment in chain.writable() {
            ranges.inc();
            match self.give(segment.address.0, left.min(segment.len.into())) {
                Some(count) => {
                    left = left.saturating_sub(count);
                    bytes.add(count);
                }
                None => fails.inc(),
            }
        }
    }

    /// Gives a range, and says how many bytes that were; `None` if the host does not take them. The
    /// guest knows no difference.
    fn give(&mut self, start: u64, len: u64) -> Option<u64> {
        match release(self.memory, start, len) {
            Ok(count) => {
                self.bytes = self.bytes.saturating_add(count);
                Some(count)
            }
            Err(error) => {
                log!(self.failures.level(), "balloon: {error}");
                None
            }
        }
    }
}

// A page of the device is one of the host.
const _: () = assert!(PAGE as u32 * PAGES_PER_MIB == 1 << 20);

#[cfg(test)]
#[path = "balloon_tests.rs"]
mod tests;

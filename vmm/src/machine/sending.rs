//! Sends a machine to another VMM ([`moving`](super::moving)): the part of the helper's thread. Between two rounds it waits for
//! the control thread, which alone can have the devices rest, and says then what they have written.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::{
    Bytes as _, GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::moving::{Error, Limits, Offer, Phase, Way, Wire};
use super::state::{MachineState, sections};
use crate::kvm::StateReader;
use crate::memory::touched::{Untouched, may_hold_data};
use crate::memory::{DirtyPages, GuestMemory, dirty};
use crate::snapshot::memory::{Error as MemoryError, PAGE, Written};
use crate::snapshot::stream::{Kind, VERSION};
use crate::snapshot::{SnapshotId, format, writer};

/// Most pages of a frame.
const AT_ONCE: usize = 32;
/// Bytes of the state in a frame.
const STATE_AT_ONCE: usize = 256 << 10;
/// What stopping, building and starting take besides the memory, in microseconds: no more than a guess, for the decision alone.
const BESIDES: u64 = 12_000;
/// Pages that are looked at at once.
const WINDOW: u64 = 16384;

/// A bit for each page, for each region: bit 0 of the first word is the first page.
pub(super) type Bitmaps = Vec<Vec<u64>>;

/// What the thread is told of a machine that is to go.
pub struct Departure {
    /// To the other end.
    pub socket: UnixStream,
    /// What is offered.
    pub offer: Offer,
    /// How.
    pub limits: Limits,
    /// How far it is.
    pub way: Arc<Way>,
    /// What this process has written until now, as far as it was kept.
    pub(super) written: Bitmaps,
}

/// What the control thread says between rounds.
pub(super) enum Word {
    /// These are the pages that this process has written since the last time: go on.
    Round(Bitmaps),
    /// The guest stands still. This is the machine, and what was written until then.
    Stopped(Box<MachineState>, Bitmaps),
    /// It stays.
    Stay,
}

/// Adds the bits of `more`.
pub(super) fn add(pages: &mut Bitmaps, more: &[Vec<u64>]) {
    pages.resize_with(more.len().max(pages.len()), Vec::new);
    for (pages, more) in pages.iter_mut().zip(more) {
        pages.resize(more.len().max(pages.len()), 0);
        for (word, more) in pages.iter_mut().zip(more) {
            *word |= more;
        }
    }
}

fn count(pages: &[Vec<u64>]) -> u64 {
    let words = pages.iter().flatten();
    words.fold(0, |sum, word| sum.saturating_add(word.count_ones().into()))
}

/// Whether so many pages can be sent while the guest may stand still.
fn fits(pages: u64, bytes_per_second: u64, limits: Limits) -> bool {
    let bytes = u128::from(pages.saturating_mul(PAGE));
    let rate = u128::from(bytes_per_second.max(1));
    let micros = bytes.saturating_mul(1_000_000) / rate;
    micros.saturating_add(BESIDES.into()) <= u128::from(limits.downtime_ms).saturating_mul(1000)
}

/// A machine on its way.
pub(super) struct Sending<'a> {
    pub(super) reader: &'a StateReader,
    pub(super) memory: &'a GuestMemory,
    pub(super) untouched: Untouched,
    pub(super) way: &'a Way,
    pub(super) wire: Wire,
    pub(super) limits: Limits,
    /// What goes on in the rest of the process has a right to know what was taken from the logs.
    pub(super) taken: &'a mut dyn FnMut(&[Vec<u64>]),
}

impl Sending<'_> {
    /// Sends it. `wait` gets the control thread's next word.
    pub(super) fn run(
        &mut self,
        offer: &Offer,
        mut wait: impl FnMut() -> Result<Word, Error>,
    ) -> Result<Written, Error> {
        let offer = serde_json::to_vec(offer)?;
        self.wire.send(Kind::Offer, VERSION, &offer)?;
        self.wire.flush()?;
        self.wire.expect(Kind::Accepted, "its consent")?;
        self.way.update(|progress| progress.phase = Phase::Copying);
        // What was written before is in what is there now.
        let log = self.reader.dirty_log(self.memory)?;
        (self.taken)(&log);
        let mut pages = self.used()?;
        for round in 1.. {
            let rate = self.round(round, &pages)?;
            self.way.announce(Phase::WantsRound);
            pages = match wait()? {
                Word::Round(ours) => self.written(ours)?,
                Word::Stopped(_, ours) => {
                    (self.taken)(&ours);
                    return Err(Error::Cancelled);
                }
                Word::Stay => return Err(Error::Cancelled),
            };
            let left = count(&pages);
            self.way.update(|progress| {
                progress.phase = Phase::Copying;
                progress.left_pages = left;
            });
            if fits(left, rate, self.limits) {
                break;
            }
            if round >= self.limits.max_rounds {
                let rate = rate / 1_000_000;
                let rounds = round;
                return Err(Error::TooFast { rounds, left, rate });
            }
        }
        let stop = Instant::now();
        self.way.announce(Phase::WantsStop);
        match wait()? {
            Word::Stopped(machine, ours) => {
                add(&mut pages, &self.written(ours)?);
                self.finish(*machine, &pages, stop)
            }
            Word::Round(ours) => {
                (self.taken)(&ours);
                Err(Error::Cancelled)
            }
            Word::Stay => Err(Error::Cancelled),
        }
    }

    /// What was written since the last time, by this process, which says so, and by the guest.
    fn written(&mut self, ours: Bitmaps) -> Result<Bitmaps, Error> {
        // Taken is taken, whatever KVM says.
        (self.taken)(&ours);
        let log = self.reader.dirty_log(self.memory)?;
        (self.taken)(&log);
        let mut pages = ours;
        add(&mut pages, &log);
        Ok(pages)
    }

    /// The pages that may hold something.
    fn used(&self) -> Result<Bitmaps, Error> {
        let mut all = Bitmaps::new();
        for region in self.memory.iter() {
            let mut words = Vec::new();
            let pages = region.len() / PAGE;
            let mut first = 0_u64;
            while first < pages {
                let count = WINDOW.min(pages.saturating_sub(first));
                let mut used = vec![0; count as usize];
                let asked = may_hold_data(region, first, &mut used, self.untouched);
                asked.map_err(|source| MemoryError::Touched {
                    start: region.start_addr().0,
                    source,
                })?;
                words.extend(used.chunks(64).map(|pages| {
                    let bits = pages.iter().zip(0_u32..);
                    bits.fold(0_u64, |word, (used, bit)| {
                        word | (u64::from(*used & 1)).wrapping_shl(bit)
                    })
                }));
                first = first.saturating_add(count);
            }
            all.push(words);
        }
        Ok(all)
    }

    /// Sends these pages, and says how fast that went, in bytes a second.
    fn round(&mut self, round: u32, pages: &[Vec<u64>]) -> Result<u64, Error> {
        let start = Instant::now();
        let sent = self.pages(pages, round > 1)?;
        let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let bytes = sent.saturating_mul(PAGE);
        // Of a handful of pages no speed can be told: as if it had been a MiB.
        let rate = bytes.max(1 << 20).saturating_mul(1_000_000) / micros.max(1);
        self.way.update(|progress| {
            progress.round = round;
            progress.bytes_per_second = rate;
        });
        Ok(rate)
    }

    /// Sends pages, those of zeroes too if the other end may have something else there, and says how many.
    fn pages(&mut self, pages: &[Vec<u64>], zeroes: bool) -> Result<u64, Error> {
        let mut sent = 0_u64;
        let mut before = 0_u64;
        for (region, words) in self.memory.iter().zip(pages) {
            let mut run = Run::default();
            let all = region.len() / PAGE;
            for (first, word) in (0_u64..all).step_by(64).zip(words) {
                if *word == 0 {
                    continue;
                }
                if self.way.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                for number in dirty::numbers(first, *word).filter(|number| *number < all) {
                    let mut page = [0; PAGE as usize];
                    read(region, number, &mut page)?;
                    let number = number.saturating_add(before);
                    if page != [0; PAGE as usize] {
                        sent = sent.saturating_add(1);
                        run.add(number, &page, &mut self.wire)?;
                    } else if zeroes {
                        run.end(&mut self.wire)?;
                        let one = 1_u64.to_le_bytes();
                        self.wire.send(Kind::Zeroes, number, &one)?;
                    }
                }
            }
            run.end(&mut self.wire)?;
            before = before.saturating_add(all);
        }
        self.wire.flush()?;
        self.way.update(|progress| {
            progress.sent_pages = progress.sent_pages.saturating_add(sent);
        });
        Ok(sent)
    }

    /// The guest stands still, since `stop`: sends what is left, and has it run at the other end.
    fn finish(
        &mut self,
        mut machine: MachineState,
        pages: &[Vec<u64>],
        stop: Instant,
    ) -> Result<Written, Error> {
        self.wire.hurry();
        let sent = self.pages(pages, true)?;
        machine.memory = writer::regions(self.memory);
        let sections = sections(&machine, &self.reader.vcpus()?, &self.reader.vm()?)?;
        // No file has it, but the state has to have one.
        let id = SnapshotId::from_bytes([0; 16]);
        let state = format::encode(id, &sections)?;
        for (part, place) in state
            .chunks(STATE_AT_ONCE)
            .zip((0..).step_by(STATE_AT_ONCE))
        {
            self.wire.send(Kind::State, place, part)?;
        }
        self.wire.send(Kind::Build, state.len() as u64, &[])?;
        self.wire.flush()?;
        self.wire.expect(Kind::Built, "word that it is built")?;
        self.way.update(|progress| progress.phase = Phase::Built);
        if self.way.is_cancelled() {
            return Err(Error::Cancelled);
        }
        // Who carries the bytes may tell of it, and can ask nobody any more.
        let mut progress = self.way.progress();
        progress.downtime_us = u64::try_from(stop.elapsed().as_micros()).ok();
        let progress = serde_json::to_vec(&progress)?;
        // Whatever happens from here on: the guest does not go on in this process.
        let gone = |error| Error::Unknown(Box::new(error));
        self.wire.send(Kind::Go, 0, &progress).map_err(gone)?;
        self.wire.flush().map_err(gone)?;
        self.wire
            .expect(Kind::Running, "word that it runs")
            .map_err(gone)?;
        Ok(Written {
            ram: machine
                .memory
                .iter()
                .fold(0, |sum, (_, len)| len.saturating_add(sum)),
            pages: sent,
        })
    }
}

/// Pages that follow each other, on their way into a frame.
#[derive(Default)]
struct Run {
    first: u64,
    bytes: Vec<u8>,
}

impl Run {
    fn add(&mut self, number: u64, page: &[u8], wire: &mut Wire) -> Result<(), Error> {
        let pages = self.bytes.len() / PAGE as usize;
        if pages >= AT_ONCE || number != self.first.saturating_add(pages as u64) {
            self.end(wire)?;
        }
        if self.bytes.is_empty() {
            self.first = number;
        }
        self.bytes.extend_from_slice(page);
        Ok(())
    }

    fn end(&mut self, wire: &mut Wire) -> Result<(), Error> {
        if !self.bytes.is_empty() {
            wire.send(Kind::Pages, self.first, &self.bytes)?;
            self.bytes.clear();
        }
        Ok(())
    }
}

fn read(
    region: &GuestRegionMmap<DirtyPages>,
    number: u64,
    page: &mut [u8],
) -> Result<(), MemoryError> {
    let at = number.saturating_mul(PAGE);
    region
        .read_slice(page, MemoryRegionAddress(at))
        .map_err(|source| MemoryError::Guest {
            address: region.start_addr().0.saturating_add(at),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_fits_into_the_standstill_that_was_asked_for() {
        let limits = |downtime_ms| Limits {
            downtime_ms,
            max_rounds: 9,
        };
        // 1,000 pages at 1 GB/s are 4 ms.
        assert!(fits(1000, 1_000_000_000, limits(17)));
        assert!(!fits(1000, 1_000_000_000, limits(16)));
        assert!(!fits(0, 1, limits(0)));
        assert!(!fits(u64::MAX, 0, limits(u32::MAX)));
    }

    #[test]
    fn bits_are_added_and_counted() {
        let mut pages = vec![vec![1]];
        add(&mut pages, &[vec![4, 2], vec![8]]);
        assert_eq!(pages, [vec![5, 2], vec![8]]);
        assert_eq!(count(&pages), 4);
    }
}

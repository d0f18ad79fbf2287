//! What the guest tells of its memory (virtio 1.2, section 5.5.6.3).
//!
//! The driver offers one buffer of statistics, which the device keeps until it wants newer ones: the
//! driver then fills the buffer again.

use std::time::{Duration, Instant};

use crate::memory::GuestMemory;
use crate::virtio::chain::{self, Chain};
use crate::virtio::queue::Verdict;

/// What each tag is called in the API, by tag; the last six since Linux 6.12.
const NAMES: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kill",
    "alloc_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
];
/// A tag in two bytes and a value in eight.
const ENTRY_LEN: usize = 10;
/// Most entries looked at in a buffer: there may be tags that are not known here.
const MAX_ENTRIES: usize = 64;

/// The latest values; a tag that the guest never told is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics([Option<u64>; NAMES.len()]);

impl Statistics {
    /// Name and value of each that there is. Sizes are in bytes.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let pairs = NAMES.into_iter().zip(self.0);
        pairs.filter_map(|(name, value)| Some((name, value?)))
    }

    /// Takes over the little-endian entries in `buffer`; what is left at its end is none.
    fn take(&mut self, buffer: &[u8]) {
        for [t0, t1, value @ ..] in buffer.as_chunks::<ENTRY_LEN>().0 {
            let tag = u16::from_le_bytes([*t0, *t1]);
            if let Some(place) = self.0.get_mut(usize::from(tag)) {
                *place = Some(u64::from_le_bytes(*value));
            }
        }
    }
}

/// The statistics queue's device side.
#[derive(Debug)]
pub struct Poll {
    interval: Duration,
    /// When the buffer goes back to the driver; `None` as long as there is none.
    due: Option<Instant>,
    latest: Statistics,
}

impl Poll {
    /// Asks the driver every `interval`.
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
            due: None,
            latest: Statistics::default(),
        }
    }

    /// What the driver told last.
    pub fn latest(&self) -> Statistics {
        self.latest
    }

    /// Asks every `interval` from now on, and for the first time at once.
    pub fn set_interval(&mut self, interval: Duration, now: Instant) {
        self.interval = interval;
        self.due = self.due.map(|_| now);
    }

    /// Forgets the buffer; it is the driver's again.
    pub fn stop(&mut self) {
        self.due = None;
    }

    /// Reads the driver's buffer, and keeps it until it is time for newer values.
    ///
    /// # Errors
    /// When the buffer cannot be read.
    pub fn serve(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        now: Instant,
    ) -> Result<Verdict, chain::Error> {
        if self.due.is_some_and(|due| due <= now) {
            self.due = None;
            return Ok(Verdict::Used(0));
        }
        let mut buffer = [0; ENTRY_LEN * MAX_ENTRIES];
        let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
        let len = len.min(buffer.len());
        let buffer = buffer.get_mut(..len).unwrap_or_default();
        chain.read_at(memory, 0, buffer)?;
        self.latest.take(buffer);
        // A day is far beyond the longest interval, and within what a clock can count.
        let next = || now.checked_add(self.interval).unwrap_or(now);
        Ok(Verdict::Later(*self.due.get_or_insert_with(next)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn takes_known_tags_and_keeps_what_is_not_told_again() {
        let mut statistics = Statistics::default();
        assert_eq!(statistics.iter().count(), 0);
        statistics.take(&[entry(4, 100), entry(15, 7), entry(16, 1), entry(0xffff, 2)].concat());
        statistics.take(&[entry(4, u64::MAX), entry(0, 3), vec![5, 0, 1]].concat());
        let all: Vec<_> = statistics.iter().collect();
        assert_eq!(
            all,
            [
                ("swap_in", 3),
                ("free_memory", u64::MAX),
                ("direct_reclaim", 7)
            ]
        );
    }
}

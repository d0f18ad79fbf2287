//! A limit for each place in the source that logs, so that a guest which makes the same thing
//! happen over and over does not fill the host's disk.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use log::{Level, Record};

/// A place may log so many lines in each [`WINDOW_MS`].
const BURST: u32 = 10;
/// The same for levels that are on only while somebody looks for something.
const DEBUG_BURST: u32 = 1000;
const WINDOW_MS: u64 = 5000;
/// Places that are told apart, many more than there are; the rest share the last slot.
const SLOTS: usize = 512;
/// How far from its slot a place is looked for.
const REACH: usize = 8;

/// What becomes of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is written, after so many of the same place were not.
    Admitted {
        /// How many.
        suppressed: u64,
    },
    /// It is not written.
    Suppressed,
}

/// Remembers how often each place has logged. Without locks: threads that log the same thing at the
/// same moment may let a line more through, or count one too few.
pub struct Limiter {
    start: Instant,
    slots: Box<[Slot]>,
}

#[derive(Default)]
struct Slot {
    /// Which place; 0 for none yet.
    key: AtomicU64,
    /// When its window began, in milliseconds since the log's start.
    since: AtomicU64,
    lines: AtomicU32,
    suppressed: AtomicU64,
}

impl Limiter {
    /// Nothing logged yet.
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
        }
    }

    /// Counts a line and says whether it is written.
    pub fn admit(&self, record: &Record<'_>) -> Verdict {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.admit_at(record, now)
    }

    fn admit_at(&self, record: &Record<'_>, now: u64) -> Verdict {
        let burst = if record.level() <= Level::Info {
            BURST
        } else {
            DEBUG_BURST
        };
        let Some(slot) = self.slot(key(record)) else {
            return Verdict::Admitted { suppressed: 0 };
        };
        let order = Ordering::Relaxed;
        let since = slot.since.load(order);
        if now.saturating_sub(since) >= WINDOW_MS {
            slot.since.store(now, order);
            slot.lines.store(1, order);
            let suppressed = slot.suppressed.swap(0, order);
            return Verdict::Admitted { suppressed };
        }
        let more = |lines: u32| (lines < burst).then_some(lines.saturating_add(1));
        if slot.lines.fetch_update(order, order, more).is_ok() {
            Verdict::Admitted { suppressed: 0 }
        } else {
            slot.suppressed.fetch_add(1, order);
            Verdict::Suppressed
        }
    }

    fn slot(&self, key: u64) -> Option<&Slot> {
        let at = usize::try_from(key).unwrap_or_default() % SLOTS;
        let near = (at..at.saturating_add(REACH)).filter_map(|at| self.slots.get(at));
        for slot in near {
            let order = Ordering::Relaxed;
            match slot.key.compare_exchange(0, key, order, order) {
                Ok(_) => return Some(slot),
                Err(found) if found == key => return Some(slot),
                Err(_) => {}
            }
        }
        self.slots.last()
    }
}

/// A place in the source as a number, never 0 (FNV-1a).
fn key(record: &Record<'_>) -> u64 {
    let file = record.file().unwrap_or_default().bytes();
    let line = record.line().unwrap_or_default().to_le_bytes();
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    file.chain(line).fold(0xcbf2_9ce4_8422_2325, hash).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(line: u32, level: Level) -> Record<'static> {
        Record::builder()
            .file(Some("vmm/src/some.rs"))
            .line(Some(line))
            .level(level)
            .build()
    }

    fn admitted(limiter: &Limiter, record: &Record<'_>, now: u64, times: u64) -> u64 {
        let admitted = |_: &u64| limiter.admit_at(record, now) != Verdict::Suppressed;
        (0..times).filter(admitted).count() as u64
    }

    #[test]
    fn a_place_is_held_back_and_says_so_later() {
        let limiter = Limiter::new();
        let (here, there) = (record(1, Level::Warn), record(2, Level::Warn));
        assert_eq!(admitted(&limiter, &here, 10, 100), 10);
        assert_eq!(admitted(&limiter, &there, 10, 5), 5, "another place");
        let next = limiter.admit_at(&here, 5010);
        assert_eq!(next, Verdict::Admitted { suppressed: 90 });
        let next = limiter.admit_at(&here, 5011);
        assert_eq!(next, Verdict::Admitted { suppressed: 0 });
        assert_eq!(admitted(&limiter, &here, 5012, 100), 8);
    }

    #[test]
    fn who_debugs_sees_more() {
        let limiter = Limiter::new();
        let debug = record(1, Level::Debug);
        assert_eq!(admitted(&limiter, &debug, 0, 2000), 1000);
    }

    #[test]
    fn more_places_than_slots_share_one() {
        let limiter = Limiter::new();
        for line in 0..5000 {
            limiter.admit_at(&record(line, Level::Error), 0);
        }
        let shared = admitted(&limiter, &record(60_000, Level::Error), 1, 20);
        assert_eq!(shared, 0);
    }
}

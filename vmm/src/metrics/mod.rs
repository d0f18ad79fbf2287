//! Metrics: what every part of the machine counts, and one JSON line of it a minute.
//!
//! A counter is one relaxed atomic in a structure that its owner holds by `Arc`; nothing is global.
//! Whoever counts says under which name by a [`Source`], and the control thread's [`Reporter`] reads
//! them all. What was reported before is the reporter's to remember, so counting is one addition.
//!
//! ```
//! use casemate_vmm::metrics::{Source, fields::EntropyMetrics};
//! use std::sync::Arc;
//!
//! let counters = Arc::new(EntropyMetrics::default());
//! let source = Source::new("entropy", counters.clone());
//! counters.entropy_bytes.add(64);
//! # drop(source);
//! ```

pub mod fields;
mod reporter;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub use reporter::{Api, Options, Reporter};

/// How often a line is written.
pub const INTERVAL: Duration = Duration::from_secs(60);

/// What happens again and again. Each line says how often since the last one.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// None yet; for statics.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// One more.
    pub fn inc(&self) {
        self.add(1);
    }

    /// So many more. It wraps, as differences do too.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// All up to now.
    pub fn total(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A value that each line repeats until it changes.
#[derive(Debug, Default)]
pub struct Value(AtomicU64);

impl Value {
    /// Zero; for statics.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// The new value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How long something takes, in microseconds: shortest and longest ever, and the sum since the last
/// line.
#[derive(Debug, Default)]
pub struct Latency {
    min: AtomicU64,
    max: AtomicU64,
    sum: AtomicU64,
}

impl Latency {
    /// Counts what began at `start` and ends now.
    pub fn record(&self, start: Instant) {
        let elapsed = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.sum.fetch_add(elapsed, Ordering::Relaxed);
        // Zero stands for "none yet", so the shortest one counts as at least 1.
        let elapsed = elapsed.max(1);
        self.max.fetch_max(elapsed, Ordering::Relaxed);
        let min = self.min.load(Ordering::Relaxed);
        if min == 0 || elapsed < min {
            // One counter has one thread, or a lost race costs one sample of a minimum.
            self.min.store(elapsed, Ordering::Relaxed);
        }
    }
}

/// One field as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Of a [`Counter`]: everything up to now.
    Total(u64),
    /// Of a [`Value`].
    Value(u64),
    /// Of a [`Latency`].
    Latency {
        /// Shortest ever; 0 for none yet.
        min: u64,
        /// Longest ever.
        max: u64,
        /// Everything up to now.
        sum: u64,
    },
}

/// What a field can be.
pub trait Field {
    /// What it is now.
    fn read(&self) -> Reading;
}

impl Field for Counter {
    fn read(&self) -> Reading {
        Reading::Total(self.total())
    }
}

impl Field for Value {
    fn read(&self) -> Reading {
        Reading::Value(self.get())
    }
}

impl Field for Latency {
    fn read(&self) -> Reading {
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
        Reading::Latency {
            min: get(&self.min),
            max: get(&self.max),
            sum: get(&self.sum),
        }
    }
}

/// A structure of fields, made by [`counters!`].
pub trait Counters: Send + Sync {
    /// Each field's name and what it is now, always in the same order.
    fn read(&self) -> Vec<(&'static str, Reading)>;
}

/// Makes a structure of public fields that is [`Counters`] and `Default`. A field is a [`Counter`],
/// or what follows its colon.
macro_rules! counters {
    ($($(#[$about:meta])* $name:ident {
        $($(#[$doc:meta])* $field:ident $(: $kind:ty)?,)*
    })*) => {$(
        $(#[$about])*
        #[derive(Debug, Default)]
        pub struct $name {
            $($(#[$doc])* pub $field: counters!(@kind $($kind)?),)*
        }

        impl $crate::metrics::Counters for $name {
            fn read(&self) -> Vec<(&'static str, $crate::metrics::Reading)> {
                vec![$((stringify!($field), $crate::metrics::Field::read(&self.$field)),)*]
            }
        }
    )*};
    (@kind) => { $crate::metrics::Counter };
    (@kind $kind:ty) => { $kind };
}
pub(crate) use counters;

/// Counters and where they stand in a line.
#[derive(Clone)]
pub struct Source {
    group: &'static str,
    id: Option<String>,
    counters: Arc<dyn Counters>,
}

impl Source {
    /// Part of the section `group`, whose fields are the sums of all of its sources.
    pub fn new(group: &'static str, counters: Arc<dyn Counters>) -> Self {
        Self {
            group,
            id: None,
            counters,
        }
    }

    /// A device of which there may be several: it has a section `<group>_<id>` of its own too.
    pub fn device(group: &'static str, id: String, counters: Arc<dyn Counters>) -> Self {
        Self {
            group,
            id: Some(id),
            counters,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    counters! {
        /// For a test.
        Some_ {
            /// Counted.
            first,
            /// Set.
            second: Value,
            /// Timed.
            third: Latency,
        }
    }

    #[test]
    fn fields_say_what_they_are() {
        let some = Some_::default();
        some.first.add(5);
        some.first.inc();
        some.second.set(9);
        let earlier = Instant::now()
            .checked_sub(Duration::from_millis(20))
            .unwrap();
        some.third.record(Instant::now());
        some.third.record(earlier);
        let [first, second, third] = some.read().try_into().unwrap();
        assert_eq!(first, ("first", Reading::Total(6)));
        assert_eq!(second, ("second", Reading::Value(9)));
        let ("third", Reading::Latency { min, max, sum }) = third else {
            panic!("{third:?}")
        };
        assert!(min > 0 && max >= 20_000 && sum >= max && min <= max);
    }
}

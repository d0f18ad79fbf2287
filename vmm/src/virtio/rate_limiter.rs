//! Token buckets: how many bytes, and how many requests, a device may move in a time.
//!
//! A request goes through while both buckets hold anything, and may take more than they hold: the
//! debt is paid before the next one. So requests larger than a bucket pass too, and the rate over
//! time is what was asked for.

use std::time::{Duration, Instant};

/// How large a bucket is and how fast it fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketOptions {
    /// Tokens in a full bucket: bytes or requests.
    pub size: u64,
    /// Tokens there are once, at the start, beyond that.
    pub one_time_burst: u64,
    /// How long an empty bucket takes to fill.
    pub refill_time: Duration,
}

/// What a device may move. Without a bucket it may move all it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimiterOptions {
    /// Bytes.
    pub bandwidth: Option<BucketOptions>,
    /// Requests, packets or frames.
    pub ops: Option<BucketOptions>,
}

/// Changes to a device's limits: a bucket that is given replaces the one there is, full; one that is
/// not stays as it is. A bucket that holds nothing, or fills at once, ends the limit.
pub type LimiterUpdate = LimiterOptions;

/// A device's limits, and how far they are used up.
#[derive(Debug, Default)]
pub struct RateLimiter {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
}

impl RateLimiter {
    /// Full buckets.
    pub fn new(options: LimiterOptions) -> Self {
        let mut limiter = Self::default();
        limiter.update(options);
        limiter
    }

    /// Changes the limits. What they held back is asked again when it was to be, at the latest.
    pub fn update(&mut self, update: LimiterUpdate) {
        let now = Instant::now();
        let buckets = [
            (&mut self.bandwidth, update.bandwidth),
            (&mut self.ops, update.ops),
        ];
        for (bucket, options) in buckets {
            if let Some(options) = options {
                // As in Firecracker: a bucket that holds nothing, or fills at once, limits nothing.
                let limits = options.size > 0 && !options.refill_time.is_zero();
                *bucket = limits.then(|| Bucket::new(options, now));
            }
        }
    }

    /// When the next request may go through; `None` if it may now.
    pub fn wait(&mut self) -> Option<Instant> {
        // No clock is read where nothing is limited.
        if self.bandwidth.is_none() && self.ops.is_none() {
            return None;
        }
        self.wait_at(Instant::now())
    }

    fn wait_at(&mut self, now: Instant) -> Option<Instant> {
        let buckets = [&mut self.bandwidth, &mut self.ops];
        let waits = buckets.into_iter().flatten();
        waits.filter_map(|bucket| bucket.wait_at(now)).max()
    }

    /// One request went through, of so many bytes.
    pub fn spend(&mut self, bytes: u64) {
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.spend(tokens);
            }
        }
    }
}

#[derive(Debug)]
struct Bucket {
    options: BucketOptions,
    burst: u64,
    tokens: u64,
    debt: u64,
    /// The time up to which tokens were added.
    filled: Instant,
}

impl Bucket {
    fn new(options: BucketOptions, now: Instant) -> Self {
        Self {
            options,
            burst: options.one_time_burst,
            tokens: options.size,
            debt: 0,
            filled: now,
        }
    }

    /// When there is something in it; `None` if there is now.
    fn wait_at(&mut self, now: Instant) -> Option<Instant> {
        self.fill(now);
        if self.burst > 0 || self.tokens > 0 {
            return None;
        }
        let missing = u128::from(self.debt).saturating_add(1);
        let nanoseconds = missing
            .saturating_mul(self.options.refill_time.as_nanos())
            // `size` is not zero.
            .div_ceil(self.options.size.max(1).into());
        let wait = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        // A limit of millions of years is none that anybody waits for.
        Some(self.filled.checked_add(wait).unwrap_or(now))
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled);
        let refill = self.options.refill_time.as_nanos().max(1);
        let size = u128::from(self.options.size);
        // Neither factor has more than 95 bits, and the time since the last fill far fewer.
        let new = elapsed.as_nanos().saturating_mul(size) / refill;
        if new == 0 {
            return;
        }
        // Only the time that whole tokens took: what is left of it counts next time.
        let spent = new.saturating_mul(refill).div_ceil(size.max(1));
        let spent = Duration::from_nanos(u64::try_from(spent).unwrap_or(u64::MAX));
        self.filled = self.filled.checked_add(spent).map_or(now, |at| at.min(now));
        let new = u64::try_from(new).unwrap_or(u64::MAX);
        let paid = new.min(self.debt);
        self.debt = self.debt.saturating_sub(paid);
        self.tokens = self
            .tokens
            .saturating_add(new.saturating_sub(paid))
            .min(self.options.size);
    }

    fn spend(&mut self, tokens: u64) {
        let mut left = tokens;
        for store in [&mut self.burst, &mut self.tokens] {
            let part = left.min(*store);
            *store = store.saturating_sub(part);
            left = left.saturating_sub(part);
        }
        self.debt = self.debt.saturating_add(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucket(size: u64, one_time_burst: u64, milliseconds: u64) -> Option<BucketOptions> {
        Some(BucketOptions {
            size,
            one_time_burst,
            refill_time: Duration::from_millis(milliseconds),
        })
    }

    fn limiter(bandwidth: Option<BucketOptions>, ops: Option<BucketOptions>) -> RateLimiter {
        RateLimiter::new(LimiterOptions { bandwidth, ops })
    }

    /// Requests of `bytes` that go through within `time`, each as soon as it may.
    fn moved(mut limiter: RateLimiter, bytes: u64, time: Duration) -> u64 {
        let start = Instant::now();
        let (mut now, mut count) = (start, 0);
        while now <= start + time && count < 1_000_000 {
            match limiter.wait_at(now) {
                Some(at) => {
                    assert!(at > now, "it waits for the past");
                    now = at;
                }
                None => {
                    limiter.spend(bytes);
                    count += 1;
                }
            }
        }
        count
    }

    #[test]
    fn without_buckets_nothing_waits() {
        let mut free = RateLimiter::default();
        free.spend(u64::MAX);
        assert_eq!(free.wait(), None);
        for useless in [bucket(0, 5, 100), bucket(5, 5, 0)] {
            let mut free = limiter(useless, useless);
            free.spend(u64::MAX);
            assert_eq!(free.wait(), None);
        }
    }

    #[test]
    fn the_burst_comes_once_and_the_rest_at_its_rate() {
        let second = Duration::from_secs(1);
        let ops = |burst| limiter(None, bucket(100, burst, 100));
        // A full bucket at the start, then 1000 a second.
        assert_eq!(moved(ops(0), 1, second), 100 + 1000);
        assert_eq!(moved(ops(50), 1, second), 50 + 100 + 1000);
        assert_eq!(moved(ops(0), 1, second * 10), 100 + 10_000);
    }

    #[test]
    fn requests_larger_than_the_bucket_pass_at_the_same_rate() {
        // 1 MB/s, asked in pieces of ten buckets.
        let bytes = limiter(bucket(10_000, 0, 10), None);
        let count = moved(bytes, 100_000, Duration::from_secs(10));
        assert!((100..=102).contains(&count), "{count}");
    }

    #[test]
    fn the_stricter_bucket_decides() {
        let both = || limiter(bucket(1000, 0, 1000), bucket(10, 0, 1000));
        let ten_seconds = Duration::from_secs(10);
        assert_eq!(moved(both(), 1, ten_seconds), 110, "ten requests a second");
        let count = moved(both(), 500, ten_seconds);
        assert!((22..=23).contains(&count), "{count}: 1000 bytes a second");
    }

    #[test]
    fn time_that_passes_in_small_steps_is_not_lost() {
        let mut one = limiter(None, bucket(3, 0, 1000));
        let mut now = Instant::now();
        let start = now;
        let mut count = 0;
        while now < start + Duration::from_secs(100) {
            if one.wait_at(now).is_none() {
                one.spend(1);
                count += 1;
            }
            now += Duration::from_millis(1);
        }
        assert!((302..=303).contains(&count), "{count}");
    }

    proptest! {
        #[test]
        fn never_panics_and_never_gives_more_than_was_asked_for(
            size in 1..u64::MAX, burst in any::<u64>(), refill in 1..u64::MAX,
            steps in prop::collection::vec((any::<u64>(), 0..u64::MAX / 4), 1..20),
        ) {
            let mut limiter = limiter(bucket(size, burst, refill), bucket(size, burst, refill));
            let mut now = Instant::now();
            for (bytes, nanoseconds) in steps {
                if let Some(at) = limiter.wait_at(now) {
                    prop_assert!(at >= now);
                }
                limiter.spend(bytes);
                now = now.checked_add(Duration::from_nanos(nanoseconds)).unwrap_or(now);
                for bucket in [&limiter.bandwidth, &limiter.ops].into_iter().flatten() {
                    prop_assert!(bucket.tokens <= size && bucket.filled <= now);
                    prop_assert!(bucket.tokens == 0 || bucket.debt == 0);
                }
            }
        }
    }
}

//! `rate_limiter` objects, in Firecracker's schema.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::virtio::rate_limiter::{BucketOptions, LimiterOptions};

/// A device's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// In bytes.
    pub bandwidth: Option<TokenBucket>,
    /// In requests or frames.
    pub ops: Option<TokenBucket>,
}

/// One limit: `size` tokens every `refill_time`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens; 0 limits nothing.
    pub size: u64,
    /// Tokens there are once, at the start, beyond that.
    pub one_time_burst: Option<u64>,
    /// Milliseconds; 0 limits nothing.
    pub refill_time: u64,
}

impl From<RateLimiter> for LimiterOptions {
    fn from(limiter: RateLimiter) -> Self {
        Self {
            bandwidth: limiter.bandwidth.map(Into::into),
            ops: limiter.ops.map(Into::into),
        }
    }
}

impl From<TokenBucket> for BucketOptions {
    fn from(bucket: TokenBucket) -> Self {
        Self {
            size: bucket.size,
            one_time_burst: bucket.one_time_burst.unwrap_or_default(),
            refill_time: Duration::from_millis(bucket.refill_time),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_firecracker_reads() {
        let read = |text| serde_json::from_str::<RateLimiter>(text).map(LimiterOptions::from);
        let limits = read(
            r#"{"bandwidth":{"size":1000,"one_time_burst":5,"refill_time":100},
                "ops":{"size":7,"refill_time":1000}}"#,
        );
        let bucket = |size, one_time_burst, milliseconds| {
            Some(BucketOptions {
                size,
                one_time_burst,
                refill_time: Duration::from_millis(milliseconds),
            })
        };
        let expected = LimiterOptions {
            bandwidth: bucket(1000, 5, 100),
            ops: bucket(7, 0, 1000),
        };
        assert_eq!(limits.unwrap(), expected);
        assert_eq!(read("{}").unwrap(), LimiterOptions::default());
        for wrong in [
            r#"{"ops":{"size":7}}"#,
            r#"{"ops":{"size":-7,"refill_time":1000}}"#,
            r#"{"ops":{"size":7,"refill_time":1000,"burst":1}}"#,
            r#"{"iops":{}}"#,
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}

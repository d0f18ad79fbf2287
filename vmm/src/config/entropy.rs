//! `entropy`: the source of random numbers.

use serde::{Deserialize, Serialize};

use super::RateLimiter;

/// The entropy device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// How much the guest may take.
    pub rate_limiter: Option<RateLimiter>,
}

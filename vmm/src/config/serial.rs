//! `serial`: where the first serial port's output goes.

use serde::{Deserialize, Serialize};

use super::TokenBucket;

/// The first serial port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file or pipe; standard output without it.
    pub serial_out_path: Option<String>,
    /// How many bytes the guest may write.
    pub rate_limiter: Option<TokenBucket>,
}

impl Serial {
    /// What of it this VMM does not do yet.
    pub(super) fn unsupported(&self) -> Option<&'static str> {
        Some("serial")
    }
}

//! `serial`: where the first serial port's output goes.

use serde::{Deserialize, Serialize};

use super::TokenBucket;

/// The first serial port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file or pipe; standard output without it.
    pub serial_out_path: Option<String>,
    /// How many bytes the guest may write; more are dropped.
    pub rate_limiter: Option<TokenBucket>,
}

impl Serial {
    /// What the file or pipe is called in errors.
    pub const WHAT: &'static str = "output of the serial port";

    /// The file or pipe, if there is one.
    pub fn output(&self) -> Option<&str> {
        self.serial_out_path.as_deref()
    }
}

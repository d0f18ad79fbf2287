//! `pmem`: persistent memory, backed by files.

use serde::{Deserialize, Serialize};

use super::{Error, RateLimiter, check_path};

/// A persistent memory device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Its name, unique among such devices.
    pub id: String,
    /// The file.
    pub path_on_host: String,
    /// Whether the kernel's root file system is on it.
    #[serde(default)]
    pub root_device: bool,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
    /// How often the guest may flush it.
    pub rate_limiter: Option<RateLimiter>,
}

impl Pmem {
    pub(super) fn check(&self) -> Result<(), Error> {
        check_path("pmem[].path_on_host", &self.path_on_host)
    }
}

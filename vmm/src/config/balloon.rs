//! `balloon`: memory that the guest gives back.

use serde::{Deserialize, Serialize};

use crate::virtio::BalloonOptions;

/// The balloon device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// How much the guest shall give back, in MiB; no more than it has.
    pub amount_mib: u32,
    /// Whether the guest takes memory back before it kills a process for want of it.
    pub deflate_on_oom: bool,
    /// Seconds between two statistics; 0 for none.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Whether the guest tells on request which pages are free.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest tells by itself which pages become free.
    #[serde(default)]
    pub free_page_reporting: bool,
}

impl From<&Balloon> for BalloonOptions {
    fn from(config: &Balloon) -> Self {
        Self {
            amount_mib: config.amount_mib,
            deflate_on_oom: config.deflate_on_oom,
            stats_polling_interval_s: config.stats_polling_interval_s,
            free_page_hinting: config.free_page_hinting,
            free_page_reporting: config.free_page_reporting,
        }
    }
}

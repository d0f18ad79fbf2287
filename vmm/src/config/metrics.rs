//! `metrics`: the VMM's counters.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Where metrics go.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file or pipe.
    pub metrics_path: String,
    /// Whether each line has the machine's id.
    #[serde(default)]
    pub emit_id: bool,
    /// What else each line has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}

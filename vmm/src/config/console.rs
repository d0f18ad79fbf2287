//! `console`: a virtio console on standard input and output. Ours.

use serde::{Deserialize, Serialize};

/// The virtio console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Console {}

//! `fs` (ours): shared directories, each with a vhost-user back-end.

use serde::{Deserialize, Serialize};

use super::{Error, check_path, range};

/// Longest tag in bytes (virtio 1.2, section 5.11.4).
const MAX_TAG: usize = 36;

/// A shared directory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Fs {
    /// The name by which the guest mounts it (`mount -t virtiofs TAG /mnt`), unique among them.
    pub tag: String,
    /// The socket of the back-end.
    pub socket: String,
}

impl Fs {
    pub(super) fn check(&self) -> Result<(), Error> {
        let fits = |c: char| c.is_ascii_graphic();
        if self.tag.is_empty() || self.tag.len() > MAX_TAG || !self.tag.chars().all(fits) {
            return range(
                "fs[].tag",
                format_args!("{:.80?}", self.tag),
                "use 1 to 36 letters, digits and signs",
            );
        }
        check_path("fs[].socket", &self.socket)
    }
}

//! `drives`: block devices.

use serde::{Deserialize, Serialize};

use super::{Error, MAX_MEMORY_MIB, RateLimiter, check_backend, check_path, range};

/// Most queues of a block device.
pub const MAX_DRIVE_QUEUES: u16 = 8;

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name, unique among drives; also its serial number in the guest.
    pub drive_id: String,
    /// The partition that holds the root file system.
    pub partuuid: Option<String>,
    /// Whether the kernel's root file system is on it.
    #[serde(default)]
    pub is_root_device: bool,
    /// When writes are on the disk.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub is_read_only: bool,
    /// The image: a regular file or a block device. Either this or `socket`.
    pub path_on_host: Option<String>,
    /// How much the guest may use it.
    pub rate_limiter: Option<RateLimiter>,
    /// How the image is read and written.
    pub io_engine: Option<IoEngine>,
    /// The socket of a vhost-user back-end. Either this or `path_on_host`.
    pub socket: Option<String>,
    /// Whether the guest may give blocks back to the host.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub discard: bool,
    /// Number of queues, 1 to [`MAX_DRIVE_QUEUES`]; one without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Where the guest's writes go; the image itself is then only read, and can be shared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy_on_write: Option<CopyOnWrite>,
}

/// A private layer over a shared image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CopyOnWrite {
    /// The file that takes what the guest writes.
    pub path_on_host: String,
    /// How much of it, in MiB; a guest that writes more gets I/O errors.
    pub size_mib: u64,
}

/// When a block device's writes are on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum CacheType {
    /// A flush does nothing, and none is offered to the guest.
    #[default]
    Unsafe,
    /// A guest's flush is an `fdatasync`.
    Writeback,
}

/// How an image is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum IoEngine {
    /// One call after the other.
    #[default]
    Sync,
    /// By io_uring; refused where the host has none.
    Async,
    /// Ours: `Async` where the host has io_uring, else `Sync`.
    Auto,
}

fn yes() -> bool {
    true
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde calls"
)]
fn is_yes(value: &bool) -> bool {
    *value
}

impl Drive {
    pub(super) fn check(&self) -> Result<(), Error> {
        check_backend(
            ("drives[].path_on_host", self.path_on_host.as_deref()),
            ("drives[].socket", self.socket.as_deref()),
            "each drive has either this or `socket`",
        )?;
        if self.socket.is_some()
            && (self.is_read_only || self.rate_limiter.is_some() || self.io_engine.is_some())
        {
            return range(
                "drives[].socket",
                format_args!("{:?}", self.socket),
                "`is_read_only`, `rate_limiter` and `io_engine` are the back-end's: remove them",
            );
        }
        if let Some(uuid) = &self.partuuid {
            let fits = |c: char| c.is_ascii_hexdigit() || c == '-';
            if uuid.is_empty() || uuid.len() > 36 || !uuid.chars().all(fits) {
                return range(
                    "drives[].partuuid",
                    format_args!("{uuid:?}"),
                    "use a partition's UUID: hexadecimal digits and hyphens",
                );
            }
        }
        let queues = self.queues.unwrap_or(1);
        if !(1..=MAX_DRIVE_QUEUES).contains(&queues) {
            return range("drives[].queues", queues, "use 1 to 8");
        }
        match &self.copy_on_write {
            Some(layer) => self.check_layer(layer),
            None => Ok(()),
        }
    }

    fn check_layer(&self, layer: &CopyOnWrite) -> Result<(), Error> {
        check_path("drives[].copy_on_write.path_on_host", &layer.path_on_host)?;
        if !(1..=MAX_MEMORY_MIB).contains(&layer.size_mib) {
            return range(
                "drives[].copy_on_write.size_mib",
                layer.size_mib,
                "use 1 or more (MiB), at most 16777216",
            );
        }
        if self.is_read_only || self.socket.is_some() {
            return range(
                "drives[].copy_on_write",
                format_args!("{:?}", layer.path_on_host),
                "it goes neither with `is_read_only` nor with `socket`: remove one of the two",
            );
        }
        Ok(())
    }
}

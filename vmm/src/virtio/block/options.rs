//! What a drive is made from, and why it may not be.

use std::fs::File;
use std::io;

use thiserror::Error;

use super::LayerError;
use crate::virtio::rate_limiter::LimiterOptions;

/// What a flush means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    /// The guest is told that there is no cache: fast, and data of a guest that believes it can be
    /// lost when the *host* crashes.
    #[default]
    Unsafe,
    /// The guest is told of the host's page cache; a flush reaches the disk (fdatasync(2)).
    Writeback,
}

/// How requests are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// One after the other, by the thread of the device.
    #[default]
    Sync,
    /// By the kernel, many at a time, over io_uring.
    Async,
    /// `Async` where the host has io_uring, else `Sync`.
    Auto,
}

/// What a machine writes to a shared image, kept apart.
#[derive(Debug)]
pub struct LayerOptions {
    /// Where it is kept: a file of the length that [`LayerError::TooShort`] tells, open for reading and writing.
    pub file: File,
    /// How many bytes of the disk it may hold.
    pub most: u64,
}

/// A drive.
#[derive(Debug)]
pub struct BlockOptions {
    /// What the guest sees as the serial number; its first 20 bytes.
    pub id: String,
    /// A regular file or a block device, open for reading, and for writing unless `read_only`.
    pub file: File,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Where writes go instead of the file, if they do; the file is only read then.
    pub layer: Option<LayerOptions>,
    /// How many queues it has, 1 to [`MAX_QUEUES`](super::MAX_QUEUES).
    pub queues: u16,
    /// How requests are served.
    pub engine: Engine,
    /// What a flush means.
    pub cache: CacheType,
    /// Whether the guest may give parts of it back to the host, where the host can take them.
    pub discard: bool,
    /// How much it may be used: bytes that are read or written, and requests.
    pub limits: LimiterOptions,
}

/// Why a drive could not be made.
#[derive(Debug, Error)]
pub enum Error {
    /// The file is a directory, a pipe, a socket...
    #[error("drive {id}: neither a regular file nor a block device")]
    WrongKind {
        /// The drive.
        id: String,
    },
    /// The file's size or kind cannot be found out.
    #[error("drive {id}: cannot find its size: {source}")]
    Size {
        /// The drive.
        id: String,
        /// What the host said.
        source: io::Error,
    },
    /// Another machine uses it.
    #[error(
        "drive {id}: another machine uses its image{}: an image has one writer or any number of readers",
        if *.read_only { ", and may write to it" } else { "" }
    )]
    InUse {
        /// Its id.
        id: String,
        /// Whether this machine would only read it.
        read_only: bool,
    },
    /// It cannot be locked.
    #[error("drive {id}: cannot lock its image: {source}")]
    Lock {
        /// Its id.
        id: String,
        /// What the host says.
        source: io::Error,
    },
    /// The layer cannot be used.
    #[error("drive {id}: {source}")]
    Layer {
        /// Its id.
        id: String,
        /// Why.
        source: LayerError,
    },
    /// Only one file can be replaced, or served by a ring.
    #[error("drive {id}: it has a layer (`copy_on_write`), {what}")]
    Layered {
        /// Its id.
        id: String,
        /// What does not go together with that.
        what: &'static str,
    },
    /// No io_uring.
    #[error(
        "drive {id}: the host gives no io_uring: {source}; use `io_engine` Sync or Auto, or allow it \
         (sysctl kernel.io_uring_disabled)"
    )]
    Ring {
        /// Its id.
        id: String,
        /// What the host said.
        source: io::Error,
    },
}

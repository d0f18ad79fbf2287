//! Disks and shared directories, from their config.

use std::fs::File;
use std::os::unix::net::UnixStream;

use super::{Error, limits};
use crate::config::{CacheType, Config, Drive, IoEngine};
use crate::resources::DriveBackend;
use crate::virtio::vhost_user::Kind;
use crate::virtio::{self, Block, BlockOptions, VhostUser, VhostUserOptions, VirtioDevice, block};

/// The device of a drive.
pub fn device(drive: &Drive, backend: DriveBackend) -> Result<Box<dyn VirtioDevice>, Error> {
    Ok(match backend {
        DriveBackend::Image { image, layer } => {
            Box::new(Block::new(block_options(drive, image, layer))?)
        }
        DriveBackend::Socket(socket) => Box::new(VhostUser::new(VhostUserOptions {
            id: drive.drive_id.clone(),
            socket,
            kind: Kind::Block {
                queues: drive.queues.unwrap_or(1),
            },
        })?),
    })
}

/// The devices of shared directories.
pub fn directories(
    config: &Config,
    sockets: Vec<UnixStream>,
) -> Result<Vec<Box<dyn VirtioDevice>>, Error> {
    let devices = config.fs.iter().zip(sockets).map(|(fs, socket)| {
        let options = VhostUserOptions {
            id: fs.tag.clone(),
            socket,
            kind: Kind::Fs {
                tag: fs.tag.clone(),
            },
        };
        Ok(Box::new(VhostUser::new(options)?) as Box<dyn VirtioDevice>)
    });
    devices.collect()
}

fn block_options(drive: &Drive, image: File, layer: Option<File>) -> BlockOptions {
    let layer = layer.zip(drive.copy_on_write.as_ref());
    BlockOptions {
        id: drive.drive_id.clone(),
        file: image,
        read_only: drive.is_read_only,
        layer: layer.map(|(file, layer)| block::LayerOptions {
            file,
            // Bounded by the config's check.
            most: layer.size_mib.saturating_mul(1 << 20),
        }),
        queues: drive.queues.unwrap_or(1),
        engine: match drive.io_engine.unwrap_or_default() {
            IoEngine::Sync => block::Engine::Sync,
            IoEngine::Async => block::Engine::Async,
            IoEngine::Auto => block::Engine::Auto,
        },
        cache: match drive.cache_type {
            CacheType::Unsafe => virtio::CacheType::Unsafe,
            CacheType::Writeback => virtio::CacheType::Writeback,
        },
        discard: drive.discard,
        limits: limits(drive.rate_limiter),
    }
}

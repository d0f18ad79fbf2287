//! Files of drives, taps of network cards, and connections to what serves either or shared directories.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use casemate_broker::Kind;

use super::{Error, Source, open};
use crate::config::{Drive, NetworkInterface};

/// What a block device works with.
pub enum DriveBackend {
    /// A file.
    Image {
        /// The file.
        image: File,
        /// What takes its writes, if not the image.
        layer: Option<File>,
    },
    /// Another process.
    Socket(UnixStream),
}

const LAYER: &str = "layer of a drive";

/// The name of a drive's image, and whether it is written to.
fn image_of(drive: &Drive) -> (&str, bool) {
    // A drive with neither image nor socket has been refused.
    let path = drive.path_on_host.as_deref().unwrap_or_default();
    (path, !drive.is_read_only && drive.copy_on_write.is_none())
}

/// What a network card works with.
pub enum CardBackend {
    /// The queues of a tap.
    Taps(Vec<Arc<File>>),
    /// Another process.
    Socket(UnixStream),
}

impl Source {
    pub(super) fn card(&mut self, card: &NetworkInterface) -> Result<CardBackend, Error> {
        if let Some(socket) = &card.socket {
            return Ok(CardBackend::Socket(self.back_end(socket)?));
        }
        // A card with neither has been refused.
        let tap = card.host_dev_name.as_deref().unwrap_or_default();
        Ok(CardBackend::Taps(self.taps(tap, card.queues)?))
    }

    /// Connected to a vhost-user back-end.
    pub(super) fn back_end(&mut self, name: &str) -> Result<UnixStream, Error> {
        self.connection("vhost-user back-end", name)
    }

    /// Connected to another process, for what `what` says.
    pub(super) fn connection(
        &mut self,
        what: &'static str,
        name: &str,
    ) -> Result<UnixStream, Error> {
        match self {
            Self::Direct => UnixStream::connect(name).map_err(|source| open(what, name, source)),
            Self::Jailed(jail) => jail.take(what, name, Kind::Stream).map(UnixStream::from),
            Self::Served(served) => served.connection(what, name),
        }
    }

    /// The files of a drive, after the start: see [`Served::file_later`](super::Served::file_later).
    ///
    /// # Errors
    /// When one of them cannot be had.
    pub fn drive_later(&mut self, drive: &Drive) -> Result<DriveBackend, Error> {
        let (path, write) = image_of(drive);
        let image = self.file_later("drive", path, write)?;
        let layer = drive.copy_on_write.as_ref();
        let layer = layer.map(|layer| self.file_later(LAYER, &layer.path_on_host, true));
        let layer = layer.transpose()?;
        Ok(DriveBackend::Image { image, layer })
    }

    pub(super) fn drive(&mut self, drive: &Drive) -> Result<DriveBackend, Error> {
        if let Some(socket) = &drive.socket {
            return Ok(DriveBackend::Socket(self.back_end(socket)?));
        }
        let (path, write) = image_of(drive);
        let image = self.file("drive", path, write)?;
        let layer = drive.copy_on_write.as_ref();
        let layer = layer.map(|layer| self.file(LAYER, &layer.path_on_host, true));
        let layer = layer.transpose()?;
        Ok(DriveBackend::Image { image, layer })
    }
}

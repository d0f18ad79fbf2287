//! The network cards of a machine, and the metadata service that some of them lead to.

use std::fs::File;
use std::sync::Arc;

use super::{Error, limits};
use crate::config::{Config, MmdsConfig, MmdsVersion, NetworkInterface};
use crate::metrics::Source;
use crate::mmds::{self, Service, ServiceOptions, Stack, Store};
use crate::resources::CardBackend;
use crate::virtio::vhost_user::Kind;
use crate::virtio::{Net, NetOptions, VhostUser, VhostUserOptions, VirtioDevice, net};

/// What a driver sends that was not told an MTU.
const USUAL_MTU: u16 = 1500;

/// The metadata service, and the names of the cards that lead to it; none without the service.
#[derive(Clone, Default)]
pub struct Metadata {
    service: Option<Arc<Service>>,
    cards: Vec<String>,
}

impl Metadata {
    /// That of `config`.
    ///
    /// # Errors
    /// When the host gives no random bytes.
    pub fn new(config: &Config, store: &Arc<Store>) -> Result<Self, Error> {
        let Some(mmds) = &config.mmds_config else {
            return Ok(Self::default());
        };
        Ok(Self {
            service: Some(service(mmds, store)?),
            cards: mmds.network_interfaces.clone(),
        })
    }

    /// What the service counts.
    pub fn metrics(&self) -> Option<Source> {
        self.service.as_deref().map(Service::metrics)
    }

    /// What this card has of it.
    fn stack(&self, card: &NetworkInterface) -> Result<Option<Stack>, Error> {
        let leads_there = self.cards.contains(&card.iface_id);
        let mtu = card.mtu.unwrap_or(USUAL_MTU);
        let stack = |service: &Arc<Service>| Stack::new(Arc::clone(service), mtu);
        let service = self.service.as_ref().filter(|_| leads_there);
        service.map(stack).transpose().map_err(Error::Metadata)
    }
}

/// The cards of `config`, each on its tap's queues or with its back-end.
///
/// # Errors
/// When a tap is not as it must be, or the host gives no random bytes.
pub fn cards(
    config: &Config,
    backends: Vec<CardBackend>,
    metadata: &Metadata,
) -> Result<Vec<Box<dyn VirtioDevice>>, Error> {
    let cards = config.network_interfaces.iter().zip(backends);
    cards
        .map(
            |(network, backend)| -> Result<Box<dyn VirtioDevice>, Error> {
                Ok(match backend {
                    CardBackend::Taps(taps) => Box::new(card(network, taps, metadata, Net::new)?),
                    CardBackend::Socket(socket) => Box::new(VhostUser::new(VhostUserOptions {
                        id: network.iface_id.clone(),
                        socket,
                        kind: Kind::Net {
                            mac: network.guest_mac.map(|mac| mac.0),
                            mtu: network.mtu,
                        },
                    })?),
                })
            },
        )
        .collect()
}

/// A card on its tap's queues, made by `make`.
///
/// # Errors
/// As [`cards`].
pub fn card(
    network: &NetworkInterface,
    taps: Vec<Arc<File>>,
    metadata: &Metadata,
    make: fn(NetOptions) -> Result<Net, net::Error>,
) -> Result<Net, Error> {
    let card = make(NetOptions {
        id: network.iface_id.clone(),
        taps,
        mac: network.guest_mac.map(|mac| mac.0),
        mtu: network.mtu,
        rx_limits: limits(network.rx_rate_limiter),
        tx_limits: limits(network.tx_rate_limiter),
        mmds: metadata.stack(network)?,
    });
    card.map_err(|source| Error::Net {
        id: network.iface_id.clone(),
        source,
    })
}

fn service(config: &MmdsConfig, store: &Arc<Store>) -> Result<Arc<Service>, Error> {
    let options = ServiceOptions {
        store: Arc::clone(store),
        address: config.ipv4_address.unwrap_or(mmds::DEFAULT_ADDRESS),
        version: match config.version {
            MmdsVersion::V1 => mmds::Version::V1,
            MmdsVersion::V2 => mmds::Version::V2,
        },
        imds_compat: config.imds_compat,
    };
    Service::new(options).map(Arc::new).map_err(Error::Metadata)
}

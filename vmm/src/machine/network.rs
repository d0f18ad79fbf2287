//! The network cards of a machine, and the metadata service that some of them lead to.

use std::fs::File;
use std::sync::Arc;

use super::{Error, limits};
use crate::config::{Config, MmdsConfig, MmdsVersion};
use crate::metrics::Source;
use crate::mmds::{self, Service, ServiceOptions, Stack, Store};
use crate::virtio::{Net, NetOptions};

/// What a driver sends that was not told an MTU.
const USUAL_MTU: u16 = 1500;

/// The cards of `config`, each on its tap's queues. What the metadata service counts joins `metrics`.
///
/// # Errors
/// When a tap is not as it must be, or the host gives no random bytes.
pub fn cards(
    config: &Config,
    taps: Vec<Vec<File>>,
    metadata: &Arc<Store>,
    metrics: &mut Vec<Source>,
) -> Result<Vec<Net>, Error> {
    let mmds = config.mmds_config.as_ref();
    let service = mmds.map(|mmds| service(mmds, metadata)).transpose()?;
    metrics.extend(service.as_deref().map(Service::metrics));
    let mut cards = Vec::with_capacity(taps.len());
    for (network, taps) in config.network_interfaces.iter().zip(taps) {
        let leads_there =
            mmds.is_some_and(|mmds| mmds.network_interfaces.contains(&network.iface_id));
        let stack = |service: &Arc<Service>| {
            let mtu = network.mtu.unwrap_or(USUAL_MTU);
            Stack::new(Arc::clone(service), mtu).map_err(Error::Metadata)
        };
        let card = Net::new(NetOptions {
            id: network.iface_id.clone(),
            taps,
            mac: network.guest_mac.map(|mac| mac.0),
            mtu: network.mtu,
            rx_limits: limits(network.rx_rate_limiter),
            tx_limits: limits(network.tx_rate_limiter),
            mmds: service
                .as_ref()
                .filter(|_| leads_there)
                .map(stack)
                .transpose()?,
        });
        cards.push(card.map_err(|source| Error::Net {
            id: network.iface_id.clone(),
            source,
        })?);
    }
    Ok(cards)
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

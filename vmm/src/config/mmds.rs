//! `mmds-config`: the metadata service.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::{Error, NetworkInterface, range};
use crate::mmds::is_address_allowed;

/// The metadata service.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// How guests ask.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The network cards on which it answers; at least one.
    pub network_interfaces: Vec<String>,
    /// Its address, a link-local one; 169.254.169.254 without it.
    pub ipv4_address: Option<Ipv4Addr>,
    /// Whether it answers as EC2's service does, whatever the guest asks to accept.
    #[serde(default)]
    pub imds_compat: bool,
}

/// How guests ask for metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum MmdsVersion {
    /// By a GET.
    #[default]
    V1,
    /// By a GET with a token.
    V2,
}

impl MmdsConfig {
    /// What a card with a back-end sends does not pass this process, so the service is not there.
    fn check_passing(&self, cards: &[NetworkInterface]) -> Result<(), Error> {
        let mut elsewhere = cards.iter().filter(|card| card.socket.is_some());
        match elsewhere.find(|card| self.network_interfaces.contains(&card.iface_id)) {
            Some(card) => range(
                "mmds-config.network_interfaces",
                format_args!("{:.80?}", card.iface_id),
                "this card has a vhost-user back-end: name one with a tap",
            ),
            None => Ok(()),
        }
    }

    pub(super) fn check(&self, cards: &[NetworkInterface]) -> Result<(), Error> {
        let refused = |address: &Ipv4Addr| !is_address_allowed(*address);
        if let Some(address) = self.ipv4_address.filter(refused) {
            return range(
                "mmds-config.ipv4_address",
                address,
                "use a link-local address, 169.254.1.0 to 169.254.254.255",
            );
        }
        if self.network_interfaces.is_empty() {
            return range(
                "mmds-config.network_interfaces",
                "empty",
                "name at least one network card",
            );
        }
        let unknown = |id: &&String| !cards.iter().any(|card| card.iface_id == **id);
        match self.network_interfaces.iter().find(unknown) {
            Some(id) => range(
                "mmds-config.network_interfaces",
                format_args!("{id:.80?}"),
                "there is no network card of that name: configure it first",
            ),
            None => self.check_passing(cards),
        }
    }
}

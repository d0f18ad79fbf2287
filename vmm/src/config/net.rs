//! `network-interfaces`: network cards.

use std::fmt;

use serde::{Deserialize, Serialize, Serializer};

use super::{Error, RateLimiter, check_backend, range};
use crate::virtio::net::MAX_PAIRS;

/// Smallest MTU that a virtio network card may announce (virtio 1.2, section 5.1.4.1).
const MIN_MTU: u16 = 68;

fn one() -> u8 {
    1
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name, unique among network cards.
    pub iface_id: String,
    /// The tap interface behind it. Either this or `socket`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_dev_name: Option<String>,
    /// The socket of a vhost-user back-end. Either this or `host_dev_name`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// Its address; without it the guest chooses.
    pub guest_mac: Option<MacAddress>,
    /// Largest packet in bytes that the guest should send, 68 to 65535.
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to 8: as many descriptors of the tap, which then has several queues.
    #[serde(default = "one")]
    pub queues: u8,
    /// How much the guest may receive.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// How much the guest may send.
    pub tx_rate_limiter: Option<RateLimiter>,
}

impl NetworkInterface {
    pub(super) fn check(&self) -> Result<(), Error> {
        check_backend(
            (
                "network-interfaces[].host_dev_name",
                self.host_dev_name.as_deref(),
            ),
            ("network-interfaces[].socket", self.socket.as_deref()),
            "each card has either this or `socket`",
        )?;
        let limited = self.rx_rate_limiter.is_some() || self.tx_rate_limiter.is_some();
        if self.socket.is_some() && (limited || self.queues != 1) {
            return range(
                "network-interfaces[].socket",
                format_args!("{:?}", self.socket),
                "such a card has one pair of queues, and no rate limiter but its back-end's",
            );
        }
        if !(1..=MAX_PAIRS).contains(&usize::from(self.queues)) {
            return range("network-interfaces[].queues", self.queues, "use 1 to 8");
        }
        match self.mtu.filter(|mtu| *mtu < MIN_MTU) {
            Some(mtu) => range("network-interfaces[].mtu", mtu, "use 68 to 65535"),
            None => Ok(()),
        }
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct MacAddress(pub [u8; 6]);

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:.80?} is not a MAC address such as 06:00:ac:10:00:02");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2);
            let part = part.filter(|part| part.bytes().all(|c| c.is_ascii_hexdigit()));
            *byte = part
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(wrong)?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        if bytes[0] & 1 != 0 {
            return Err(format!(
                "{text:?} is a group address: the first byte of a card's own address is even"
            ));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

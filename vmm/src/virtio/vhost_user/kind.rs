//! What kinds of devices back-ends can be, and what the guest is offered of each.

use super::connection::{Connection, Error, Request};
use super::{CONFIG, MAX_QUEUES, MQ};
use crate::virtio::device::DeviceType;
use crate::virtio::net::{F_MAC, F_MTU, OFFLOADS};

/// Of a block device (virtio 1.2, section 5.2.3): what a back-end may offer to the guest. Its
/// configuration is read once, so nothing that the driver could write.
pub(super) const BLOCK_FEATURES: u64 =
    1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | BLOCK_MQ | 1 << 13 | 1 << 14;
pub(super) const BLOCK_MQ: u64 = 1 << 12;
/// Length of struct virtio_blk_config up to the fields of write-zeroes, and where its number of queues is.
const BLOCK_CONFIG: u32 = 60;
const BLOCK_QUEUES: usize = 34;
/// Longest name of a shared directory (section 5.11.4).
pub const TAG_LEN: usize = 36;

/// What a back-end is.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A disk with up to so many queues.
    Block {
        /// 1 to [`MAX_QUEUES`]; the back-end may have fewer.
        queues: u16,
    },
    /// A shared directory, which the guest mounts by this name.
    Fs {
        /// 1 to [`TAG_LEN`] bytes.
        tag: String,
    },
    /// A network card with one pair of queues.
    Net {
        /// Its address; without one the guest makes one up.
        mac: Option<[u8; 6]>,
        /// Largest packet in bytes that the guest should send, without the Ethernet header.
        mtu: Option<u16>,
    },
}

/// What the guest is offered.
pub(super) struct Offer {
    pub device_type: DeviceType,
    pub features: u64,
    /// Those that are this process's to keep: the back-end is not told of them.
    pub own_features: u64,
    pub config: Vec<u8>,
    pub queues: u16,
}

impl Kind {
    /// What the guest is offered, given the back-end's features of the device and of the protocol; none if it has no
    /// configuration and must have.
    pub(super) fn offer(
        self,
        connection: &Connection,
        features: u64,
        protocol: u64,
    ) -> Result<Option<Offer>, Error> {
        Ok(Some(match self {
            Self::Block { .. } if protocol & CONFIG == 0 => return Ok(None),
            Self::Block { queues } => {
                let mut count = 1;
                if queues > 1 && protocol & MQ != 0 {
                    let most = connection.ask_u64(Request::GetQueueNum)?;
                    count = u16::try_from(most).unwrap_or(MAX_QUEUES).clamp(1, queues);
                }
                let mut config = get_config(connection, BLOCK_CONFIG)?;
                if let Some(field) = config.get_mut(BLOCK_QUEUES..BLOCK_QUEUES + 2) {
                    field.copy_from_slice(&count.to_le_bytes());
                }
                let mut features = features & BLOCK_FEATURES;
                if count == 1 {
                    features &= !BLOCK_MQ;
                }
                Offer {
                    device_type: DeviceType::Block,
                    features,
                    own_features: 0,
                    config,
                    queues: count,
                }
            }
            Self::Fs { tag } => {
                let mut config = vec![0; TAG_LEN];
                for (to, from) in config.iter_mut().zip(tag.bytes()) {
                    *to = from;
                }
                // One queue for requests, beside the one for urgent ones.
                config.extend(1_u32.to_le_bytes());
                Offer {
                    device_type: DeviceType::Fs,
                    features: 0,
                    own_features: 0,
                    config,
                    queues: 2,
                }
            }
            Self::Net { mac, mtu } => {
                let mut own_features = 0;
                if mac.is_some() {
                    own_features |= F_MAC;
                }
                if mtu.is_some() {
                    own_features |= F_MTU;
                }
                // Neither a control queue nor a link that comes and goes: nobody here would serve them.
                let features = features & OFFLOADS | own_features;
                Offer {
                    device_type: DeviceType::Net,
                    features,
                    own_features,
                    config: crate::virtio::net::config(mac, 1, mtu),
                    queues: 2,
                }
            }
        }))
    }
}

/// The first `len` bytes of the device's configuration.
fn get_config(connection: &Connection, len: u32) -> Result<Vec<u8>, Error> {
    let mut message: Vec<u8> = [0, len, 0].map(u32::to_le_bytes).concat();
    let head = message.clone();
    message.resize(message.len().saturating_add(len as usize), 0);
    let mut answer = message.clone();
    connection.ask(Request::GetConfig, &message, &mut answer)?;
    match answer.split_at_checked(head.len()) {
        // Offset and length; the flags mean nothing here.
        Some((there, bytes)) if there.get(..8) == head.get(..8) => Ok(bytes.to_vec()),
        _ => Err(Error::Nonsense(Request::GetConfig)),
    }
}

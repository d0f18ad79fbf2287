//! What the driver asks for (virtio 1.2, section 5.15.6), as it is in memory.

/// Length of a request: type, padding, address, number of blocks, padding.
pub const LEN: usize = 24;
/// Length of an answer: type, padding, state.
pub const ANSWER_LEN: usize = 10;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Plug `blocks` blocks at `address` in.
    Plug {
        /// Guest-physical address of the first one.
        address: u64,
        /// How many.
        blocks: u16,
    },
    /// Take them away.
    Unplug {
        /// Guest-physical address of the first one.
        address: u64,
        /// How many.
        blocks: u16,
    },
    /// Take all away.
    UnplugAll,
    /// Tell whether they are plugged in.
    State {
        /// Guest-physical address of the first one.
        address: u64,
        /// How many.
        blocks: u16,
    },
}

impl Request {
    /// The request in `bytes`, if it is one. What it asks for is unchecked.
    pub fn parse(bytes: &[u8; LEN]) -> Option<Self> {
        let [
            k0,
            k1,
            _,
            _,
            _,
            _,
            _,
            _,
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            b0,
            b1,
            ..,
        ] = *bytes;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let blocks = u16::from_le_bytes([b0, b1]);
        match u16::from_le_bytes([k0, k1]) {
            0 => Some(Self::Plug { address, blocks }),
            1 => Some(Self::Unplug { address, blocks }),
            2 => Some(Self::UnplugAll),
            3 => Some(Self::State { address, blocks }),
            _ => None,
        }
    }
}

/// What the device answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done; with the state that was asked for: 0 plugged in, 1 not, 2 some are.
    Ack(u16),
    /// Not now: that would be more than the host wants.
    Nack,
    /// Not now: the host has no memory.
    Busy,
    /// Never: that makes no sense.
    Error,
}

impl Answer {
    /// As it is in memory.
    pub fn bytes(self) -> [u8; ANSWER_LEN] {
        let (kind, state) = match self {
            Self::Ack(state) => (0, state),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        let [s0, s1] = u16::to_le_bytes(state);
        [kind, 0, 0, 0, 0, 0, 0, 0, s0, s1]
    }
}

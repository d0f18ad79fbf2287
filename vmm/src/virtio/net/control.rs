//! The control queue (virtio 1.2, section 5.1.6.5): how many pairs of queues the driver uses.

use crate::memory::GuestMemory;
use crate::virtio::chain::{self, Chain};

const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const OK: u8 = 0;
const ERR: u8 = 1;

/// Serves a command: `set_pairs` is asked for a number of pairs from 1 to `max`, and says whether it could.
///
/// # Errors
/// When there is no room for the answer.
pub fn serve(
    chain: &Chain,
    memory: &GuestMemory,
    max: u16,
    set_pairs: impl FnOnce(u16) -> bool,
) -> Result<u32, chain::Error> {
    let mut command = [0; 4];
    let understood = chain.read_at(memory, 0, &mut command).is_ok();
    let [class, kind, low, high] = command;
    let pairs = u16::from_le_bytes([low, high]);
    let done = understood
        && (class, kind) == (CLASS_MQ, MQ_VQ_PAIRS_SET)
        && (1..=max).contains(&pairs)
        && set_pairs(pairs);
    let answer = if done { OK } else { ERR };
    chain.write_at(memory, 0, &[answer])?;
    Ok(1)
}

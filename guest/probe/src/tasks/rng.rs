//! `rng`: two requests for random bytes, which must be filled and must differ.

use super::Failure;
use crate::cmdline::Cmdline;
use crate::virtio::{Buffer, Device};

const ENTROPY: u32 = 4;

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let device = Device::find(cmdline, ENTROPY, 0, 0)?;
    let mut queue = device.queue(0, 0)?;
    device.finish()?;
    let mut samples = [[0u8; 64]; 2];
    for sample in &mut samples {
        if queue.call(&[Buffer::into(sample)])? != sample.len() {
            return Err("the buffer was not filled");
        }
        if sample.iter().all(|&byte| byte == 0) {
            return Err("all bytes are zero");
        }
    }
    if samples[0] == samples[1] {
        return Err("two requests gave the same bytes");
    }
    Ok(())
}

//! `net`: sends one frame to announce itself, then echoes `probe.count=N` frames (1 by default) of
//! the experimental Ethertype back to their senders.

use super::Failure;
use crate::cmdline::Cmdline;
use crate::machine::wait_for;
use crate::serial;
use crate::virtio::{Buffer, Device};

const NET: u32 = 1;
const F_MAC: u64 = 1 << 5;
const HEADER: usize = 12;
const FRAME: usize = 2048;
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const MINIMUM: usize = 60;

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let device = Device::find(cmdline, NET, 0, F_MAC)?;
    let mut rx = device.queue(0, 0)?;
    let mut tx = device.queue(1, 1)?;
    device.finish()?;
    let mut mac = [0u8; 6];
    for (offset, byte) in mac.iter_mut().enumerate() {
        *byte = device.config8(offset as u64);
    }
    serial::line(format_args!("probe: mac {mac:02x?}"));

    let mut received = [0u8; HEADER + FRAME];
    let mut sent = [0u8; HEADER + FRAME];
    sent[HEADER..HEADER + 6].fill(0xff);
    sent[HEADER + 6..HEADER + 12].copy_from_slice(&mac);
    sent[HEADER + 12..HEADER + 14].copy_from_slice(&ETHERTYPE);
    sent[HEADER + 14..HEADER + 19].copy_from_slice(b"ready");
    tx.call(&[Buffer::out(&sent[..HEADER + MINIMUM])])?;

    let mut left = cmdline.number("probe.count").unwrap_or(1);
    while left > 0 {
        rx.add(0, &[Buffer::into(&mut received)]);
        rx.kick();
        let mut done = None;
        wait_for(|| {
            done = rx.take();
            done.is_some()
        })?;
        let len = done.map(|(_, len)| len).ok_or("no frame")?;
        let Some(frame) = received.get(HEADER..len) else {
            return Err("a frame without a header, or larger than its buffer");
        };
        // Other traffic of the host's network stack is not ours.
        if frame.get(12..14) != Some(&ETHERTYPE) {
            continue;
        }
        sent[..HEADER].fill(0);
        sent[HEADER..len].copy_from_slice(frame);
        sent[HEADER..HEADER + 6].copy_from_slice(&frame[6..12]);
        sent[HEADER + 6..HEADER + 12].copy_from_slice(&mac);
        tx.call(&[Buffer::out(&sent[..len])])?;
        left -= 1;
    }
    Ok(())
}

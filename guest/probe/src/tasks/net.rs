//! `net`: sends one frame to announce itself, then echoes `probe.count=N` frames (1 by default) of
//! the experimental Ethertype back to their senders. With `probe.pairs=2` it takes two pairs of queues into
//! use by the control queue, and frames from both.

use super::Failure;
use crate::cmdline::Cmdline;
use crate::machine::wait_for;
use crate::serial;
use crate::virtio::{Buffer, Device};

const NET: u32 = 1;
const F_MAC: u64 = 1 << 5;
const F_CTRL_VQ: u64 = 1 << 17;
const F_MQ: u64 = 1 << 22;
const HEADER: usize = 12;
const FRAME: usize = 2048;
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const MINIMUM: usize = 60;

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let pairs = cmdline.number("probe.pairs").unwrap_or(1);
    let wanted = if pairs == 1 {
        F_MAC
    } else {
        F_MAC | F_CTRL_VQ | F_MQ
    };
    let device = Device::find(cmdline, NET, 0, wanted)?;
    let mut rx = device.queue(0, 0)?;
    let mut tx = device.queue(1, 1)?;
    // The second pair's way to the host is not used.
    let mut second = None;
    if pairs == 2 {
        second = Some((
            device.queue(2, 2)?,
            device.queue(3, 3)?,
            device.queue(4, 4)?,
        ));
    }
    device.finish()?;
    if let Some((_, _, control)) = &mut second {
        let mut answer = [0xffu8];
        // Class and command of VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, and two pairs.
        control.call(&[Buffer::out(&[4, 0, 2, 0]), Buffer::into(&mut answer)])?;
        serial::line(format_args!("probe: two pairs: {}", answer[0]));
    }
    let mut mac = [0u8; 6];
    for (offset, byte) in mac.iter_mut().enumerate() {
        *byte = device.config8(offset as u64);
    }
    serial::line(format_args!("probe: mac {mac:02x?}"));

    let mut received = [[0u8; HEADER + FRAME]; 2];
    let [first_frame, second_frame] = &mut received;
    rx.add(0, &[Buffer::into(first_frame)]);
    rx.kick();
    if let Some((rx, ..)) = &mut second {
        rx.add(0, &[Buffer::into(second_frame)]);
        rx.kick();
    }
    let mut sent = [0u8; HEADER + FRAME];
    sent[HEADER..HEADER + 6].fill(0xff);
    sent[HEADER + 6..HEADER + 12].copy_from_slice(&mac);
    sent[HEADER + 12..HEADER + 14].copy_from_slice(&ETHERTYPE);
    sent[HEADER + 14..HEADER + 19].copy_from_slice(b"ready");
    tx.call(&[Buffer::out(&sent[..HEADER + MINIMUM])])?;

    let mut left = cmdline.number("probe.count").unwrap_or(1);
    while left > 0 {
        let mut done = None;
        wait_for(|| {
            done = rx.take().map(|(_, len)| (0, len));
            if let (None, Some((rx, ..))) = (done, &mut second) {
                done = rx.take().map(|(_, len)| (1, len));
            }
            done.is_some()
        })?;
        let (queue, len) = done.ok_or("no frame")?;
        let received = &mut received[queue];
        let Some(frame) = received.get(HEADER..len) else {
            return Err("a frame without a header, or larger than its buffer");
        };
        // Other traffic of the host's network stack is not ours.
        if frame.get(12..14) == Some(&ETHERTYPE) {
            sent[..HEADER].fill(0);
            sent[HEADER..len].copy_from_slice(frame);
            sent[HEADER..HEADER + 6].copy_from_slice(&frame[6..12]);
            sent[HEADER + 6..HEADER + 12].copy_from_slice(&mac);
            left -= 1;
        }
        let is_ours = frame.get(12..14) == Some(&ETHERTYPE);
        let buffer = [Buffer::into(received)];
        match &mut second {
            Some((rx, ..)) if queue == 1 => {
                rx.add(0, &buffer);
                rx.kick();
            }
            _ => {
                rx.add(0, &buffer);
                rx.kick();
            }
        }
        if is_ours {
            tx.call(&[Buffer::out(&sent[..len])])?;
        }
    }
    Ok(())
}

//! `console`: tells its size, says a line on the virtio console, and repeats one that is typed there.
//! With `probe.resize=1` it then waits for another size and tells that. With `probe.flood=N` it says
//! N KiB instead, one letter over and over, and then marks the last sector of the first drive.

use super::{Failure, blk};
use crate::cmdline::Cmdline;
use crate::machine::wait_for;
use crate::serial;
use crate::virtio::{Buffer, Device, Queue};

const CONSOLE: u32 = 3;
const F_SIZE: u64 = 1 << 0;
const CONFIG_CHANGED: u32 = 2;
const LONGEST: usize = 8192;

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let device = Device::find(cmdline, CONSOLE, 0, F_SIZE)?;
    let mut receive = device.queue(0, 0)?;
    let mut transmit = device.queue(1, 1)?;
    device.finish()?;
    if let Some(kib) = cmdline.number("probe.flood") {
        for _ in 0..kib {
            transmit.call(&[Buffer::out(&[b'~'; 1024])])?;
        }
        return blk::mark(cmdline, 2);
    }
    tell_size(&device);
    transmit.call(&[Buffer::out(b"probe: hello, "), Buffer::out(b"console\n")])?;

    let mut line = [0; LONGEST];
    let len = hear_line(&mut receive, &mut line)?;
    let line = line.get(..len).ok_or("size")?;
    transmit.call(&[Buffer::out(b"probe: heard "), Buffer::out(line)])?;

    if cmdline.number("probe.resize") == Some(1) {
        device.take_interrupts();
        // On the console, as the line before: two ways to the same output may cut into each other's lines.
        transmit.call(&[Buffer::out(b"probe: resize me\n")])?;
        wait_for(|| device.take_interrupts() & CONFIG_CHANGED != 0)?;
        tell_size(&device);
    }
    Ok(())
}

/// Reads up to and with a newline.
fn hear_line(receive: &mut Queue, line: &mut [u8]) -> Result<usize, Failure> {
    let mut len = 0;
    while len == 0 || line.get(len - 1) != Some(&b'\n') {
        let mut chunk = [0u8; 100];
        let count = receive.call(&[Buffer::into(&mut chunk)])?;
        let chunk = chunk.get(..count).ok_or("more than there is room for")?;
        let room = line
            .get_mut(len..len + count)
            .ok_or("the line is too long")?;
        room.copy_from_slice(chunk);
        len += count;
    }
    Ok(len)
}

fn tell_size(device: &Device) {
    let size = device.config32(0);
    serial::line(format_args!(
        "probe: {} columns, {} rows",
        size & 0xffff,
        size >> 16
    ));
}

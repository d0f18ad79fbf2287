//! `pmem`: finds the pattern ([`blk`](super::blk)) in the first `probe.len=N` bytes of persistent memory, and zeroes
//! behind them. With `probe.write=1` it also inverts the last word of the pattern and flushes; with `probe.inside=1`
//! it has the device answer there, which is to be refused; with `probe.stay=1` it then reads the last word for good.
//! `probe.device=N` picks one.

use super::Failure;
use super::blk::pattern;
use crate::cmdline::Cmdline;
use crate::machine::wait_for;
use crate::serial;
use crate::virtio::{Buffer, Device};

const PMEM: u32 = 27;
const NEEDS_RESET: u32 = 64;

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let index = cmdline.number("probe.device").unwrap_or(0) as usize;
    let device = Device::find(cmdline, PMEM, index, 0)?;
    let start = device.config64(0);
    let size = device.config64(8);
    serial::line(format_args!("probe: pmem at {start:#x}, {size} bytes"));
    if start < 4 << 30 || start + size > 5 << 30 {
        return Err("the memory is not where the probe can see it");
    }
    let mut queue = device.queue(0, 0)?;
    device.finish()?;

    let len = cmdline.number("probe.len").unwrap_or(size) & !7;
    for offset in (0..size).step_by(8) {
        let expected = if offset < len {
            pattern(offset)
        } else {
            [0; 8]
        };
        if read(start + offset) != u64::from_le_bytes(expected) {
            return Err("the memory does not hold what the file does");
        }
    }
    let last = start + len.checked_sub(8).ok_or("the file is empty")?;
    if cmdline.number("probe.write") == Some(1) {
        let word = read(last);
        write(last, !word);
        if read(last) != !word {
            return Err("the memory does not take a write");
        }
    }
    let mut answer = [7u8; 4];
    queue.call(&[Buffer::out(&[0; 4]), Buffer::into(&mut answer)])?;
    // SAFETY: the device wrote it behind the compiler's back.
    if unsafe { (&raw const answer).read_volatile() } != [0; 4] {
        return Err("the flush failed");
    }
    if cmdline.number("probe.inside") == Some(1) {
        let inside = Buffer::In(start as *mut u8, 4);
        queue.add(0, &[Buffer::out(&[0; 4]), inside]);
        queue.kick();
        wait_for(|| device.status() & NEEDS_RESET != 0)
            .map_err(|_| "the device took a buffer in its own memory")?;
    }
    if cmdline.number("probe.stay") == Some(1) {
        serial::line(format_args!("probe: reading"));
        wait_for(|| read(last) == 0)?;
        return Err("there was something to read all the time");
    }
    Ok(())
}

fn read(address: u64) -> u64 {
    // SAFETY: within the device's memory, which the probe's page tables map.
    unsafe { (address as *const u64).read_volatile() }
}

fn write(address: u64, value: u64) {
    // SAFETY: as in `read`.
    unsafe { (address as *mut u64).write_volatile(value) }
}

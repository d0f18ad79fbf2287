//! `mem`: plugs memory in, uses it as its own and for the device, and gives it back. Each step waits
//! until the test has looked. `probe.mem=write` and `probe.mem=buffer` use memory that is not plugged in.

use super::Failure;
use crate::cmdline::Cmdline;
use crate::machine::map_fifth_gibibyte;
use crate::serial;
use crate::virtio::{Buffer, Device, Queue};

const MEM: u32 = 24;
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;

const PAGE: u64 = 4096;
/// Where the VMM puts the region of a machine with less than 3 GiB: the page tables know.
const START: u64 = 4 << 30;

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let device = Device::find(cmdline, MEM, 0, F_UNPLUGGED_INACCESSIBLE)?;
    let mut queue = device.queue(0, 0)?;
    device.finish()?;
    let config =
        |offset| u64::from(device.config32(offset + 4)) << 32 | u64::from(device.config32(offset));
    let (block, start, requested) = (config(0), config(16), config(48));
    if start != START || requested > 1 << 30 {
        return Err("the region lies elsewhere");
    }
    map_fifth_gibibyte();
    match cmdline.value("probe.mem") {
        Some("write") => {
            // It can be read, and has nothing to tell.
            if word(0) != 0 {
                return Err("unplugged memory held something");
            }
            serial::line(format_args!("probe: writes"));
            set_word(0, 1);
            return Err("unplugged memory could be written to");
        }
        Some("buffer") => {
            serial::line(format_args!("probe: offers a buffer"));
            queue.call(&[Buffer::Out(START as *const u8, 24)])?;
            return Err("the device used unplugged memory");
        }
        _ => {}
    }

    let (blocks, pages) = ((requested / block) as u16, requested / PAGE);
    serial::pause(format_args!("probe: {blocks} blocks requested"))?;
    expect(&mut queue, STATE, START, blocks, (ACK, UNPLUGGED))?;
    expect(&mut queue, PLUG, START, blocks + 1, (NACK, 0))?;
    expect(&mut queue, PLUG, START + 1, blocks, (ERROR, 0))?;
    expect(&mut queue, PLUG, START, blocks, (ACK, 0))?;
    expect(&mut queue, STATE, START, blocks, (ACK, PLUGGED))?;
    if config(40) != requested {
        return Err("the device counts otherwise");
    }
    for page in 0..pages {
        if word(page) != 0 {
            return Err("new memory held something");
        }
        set_word(page, page | 1);
    }
    if (0..pages).any(|page| word(page) != page | 1) {
        return Err("new memory did not keep what was written");
    }
    serial::pause(format_args!("probe: plugged in"))?;

    // The device reads and writes there as in any memory.
    let request = bytes(STATE, START, blocks);
    for (at, byte) in (START..).zip(request) {
        // SAFETY: plugged in, and nobody else's.
        unsafe { (at as *mut u8).write_volatile(byte) };
    }
    let answer = (START + PAGE) as *mut u8;
    queue.call(&[
        Buffer::Out(START as *const u8, request.len()),
        Buffer::In(answer, 10),
    ])?;
    // SAFETY: as above; the device wrote it.
    if unsafe { (answer as *const [u16; 5]).read_volatile() } != [ACK, 0, 0, 0, PLUGGED] {
        return Err("the device did not use a buffer in new memory");
    }

    expect(&mut queue, UNPLUG, START, blocks, (ACK, 0))?;
    expect(&mut queue, STATE, START, blocks, (ACK, UNPLUGGED))?;
    if word(0) != 0 || word(pages - 1) != 0 {
        return Err("unplugged memory still held something");
    }
    serial::pause(format_args!("probe: unplugged"))
}

fn bytes(kind: u16, address: u64, blocks: u16) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

/// Sends a request, and expects type and state of the answer.
fn expect(
    queue: &mut Queue,
    kind: u16,
    address: u64,
    blocks: u16,
    expected: (u16, u16),
) -> Result<(), Failure> {
    let request = bytes(kind, address, blocks);
    let mut answer = [0xffffu16; 5];
    let place = Buffer::In(answer.as_mut_ptr().cast(), 10);
    if queue.call(&[Buffer::out(&request), place])? != 10 {
        return Err("the answer is too short");
    }
    // SAFETY: the device wrote it behind the compiler's back.
    let answer = unsafe { (&raw const answer).read_volatile() };
    if (answer[0], answer[4]) == expected {
        Ok(())
    } else {
        Err("another answer was expected")
    }
}

/// The first word of a page of the region.
fn word(page: u64) -> u64 {
    // SAFETY: mapped by the page tables; nothing else lives there.
    unsafe { ((START + page * PAGE) as *const u64).read_volatile() }
}

fn set_word(page: u64, value: u64) {
    // SAFETY: as in `word`.
    unsafe { ((START + page * PAGE) as *mut u64).write_volatile(value) };
}

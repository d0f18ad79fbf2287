//! `keyboard`: waits to be asked to end, by the power button. With `probe.keys=1` it drives the keyboard, after it has
//! thrown every byte at it, and waits for Ctrl+Alt+Del.

use super::Failure;
use crate::cmdline::Cmdline;
use crate::machine::{I8042_COMMAND, I8042_RESET, inb, outb, read32, wait_for};
use crate::serial;

const DATA: u16 = 0x60;
const OUTPUT_FULL: u8 = 1 << 0;
const WRITE_CONFIGURATION: u8 = 0x60;
/// The keyboard interrupts; no mouse.
const CONFIGURATION: u8 = 1 << 0 | 1 << 5;
const SEND_KEYS: u8 = 0xf4;
const ACKNOWLEDGE: u8 = 0xfa;
/// Ctrl, Alt and Del in scan code set 2.
const KEYS: [u8; 4] = [0x14, 0x11, 0xe0, 0x71];

const EVENTS: u64 = 0xc000_0004;
const POWER_BUTTON: u32 = 1 << 0;

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let keys = cmdline.number("probe.keys") == Some(1);
    if keys {
        throw_everything();
        drain();
        outb(I8042_COMMAND, WRITE_CONFIGURATION);
        outb(DATA, CONFIGURATION);
        outb(DATA, SEND_KEYS);
        if read()? != ACKNOWLEDGE {
            return Err("the keyboard does not obey");
        }
    }
    serial::line(format_args!("probe: listening"));
    if keys {
        for key in KEYS {
            if read()? != key {
                return Err("another key");
            }
        }
        drain();
        if read32(EVENTS) != 0 {
            return Err("the power button, too");
        }
        return Ok(());
    }
    wait_for(|| read32(EVENTS) & POWER_BUTTON != 0)
}

fn read() -> Result<u8, Failure> {
    wait_for(|| inb(I8042_COMMAND) & OUTPUT_FULL != 0)?;
    Ok(inb(DATA))
}

fn drain() {
    while inb(I8042_COMMAND) & OUTPUT_FULL != 0 {
        inb(DATA);
    }
}

/// Each command but the reset, before each byte of a few, and none of the answers read.
fn throw_everything() {
    for command in 0..=u8::MAX {
        for data in [0, 0x5a, SEND_KEYS, 0xed, 0xff] {
            if command != I8042_RESET {
                outb(I8042_COMMAND, command);
            }
            outb(DATA, data);
        }
        outb(DATA, command);
    }
}

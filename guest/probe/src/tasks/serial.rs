//! `serial`: says that it listens, then repeats the line that the host types on COM1.

use super::Failure;
use crate::machine::{inb, wait_for};
use crate::serial;

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = 0x3fd;
const DATA_READY: u8 = 1 << 0;
/// Longer than the port's FIFO, so that the host has to wait for room.
const LONGEST: usize = 1024;

pub fn run() -> Result<(), Failure> {
    serial::line(format_args!("probe: type a line"));
    let mut text = [0; LONGEST];
    for len in 0..LONGEST {
        wait_for(|| inb(LINE_STATUS) & DATA_READY != 0)?;
        let byte = inb(DATA);
        if byte == b'\n' {
            let text = core::str::from_utf8(&text[..len]).map_err(|_| "not UTF-8")?;
            serial::line(format_args!("probe: heard {text}"));
            return Ok(());
        }
        text[len] = byte;
    }
    Err("the line is too long")
}

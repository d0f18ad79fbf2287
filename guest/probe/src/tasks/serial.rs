//! `serial`: says that it listens, then repeats the line that the host types on COM1.

use super::Failure;
use crate::serial;

/// Longer than the port's FIFO, so that the host has to wait for room.
const LONGEST: usize = 1024;

pub fn run() -> Result<(), Failure> {
    serial::line(format_args!("probe: type a line"));
    let mut text = [0; LONGEST];
    for len in 0..LONGEST {
        let byte = serial::byte()?;
        if byte == b'\n' {
            let text = core::str::from_utf8(&text[..len]).map_err(|_| "not UTF-8")?;
            serial::line(format_args!("probe: heard {text}"));
            return Ok(());
        }
        text[len] = byte;
    }
    Err("the line is too long")
}

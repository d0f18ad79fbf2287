//! COM1, byte by byte: the probe's only voice, and how a test tells it to go on.

use core::fmt::{self, Write};

use crate::machine::{inb, outb, wait_for};

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const DATA_READY: u8 = 1 << 0;

struct Com1;

impl Write for Com1 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            outb(COM1, byte);
        }
        Ok(())
    }
}

/// Writes one line.
pub fn line(text: fmt::Arguments<'_>) {
    // Writing to a port cannot fail.
    let _ = Com1.write_fmt(text);
    let _ = Com1.write_str("\n");
}

/// Writes a single byte.
pub fn dot() {
    outb(COM1, b'.');
}

/// The next byte that the host types.
pub fn byte() -> Result<u8, &'static str> {
    wait_for(|| inb(LINE_STATUS) & DATA_READY != 0)?;
    Ok(inb(COM1))
}

/// Writes one line and waits until the host types one.
pub fn pause(text: fmt::Arguments<'_>) -> Result<(), &'static str> {
    line(text);
    while byte()? != b'\n' {}
    Ok(())
}

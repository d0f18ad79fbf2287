//! COM1, written byte by byte: the probe's only voice.

use core::fmt::{self, Write};

use crate::machine::outb;

const COM1: u16 = 0x3f8;

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

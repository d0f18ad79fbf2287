//! `pit`: the i8254's third counter runs, and runs out, as guests calibrate their clocks by it.

use super::Failure;
use crate::machine::{inb, outb, wait_for};

const COUNTER_2: u16 = 0x42;
const COMMAND: u16 = 0x43;
/// Counter 2, both bytes, mode 0: its output rises at the end.
const ONCE: u8 = 0b1011_0000;
/// Holds the count of counter 2 for the next two reads.
const LATCH: u8 = 0b1000_0000;
/// Switches counter 2 on (bit 0) and the speaker (bit 1); reads its output (bit 5).
const SPEAKER: u16 = 0x61;
const GATE: u8 = 1 << 0;
const OUTPUT: u8 = 1 << 5;

pub fn run() -> Result<(), Failure> {
    for gate in [0, GATE] {
        outb(SPEAKER, gate);
        if inb(SPEAKER) & GATE != gate {
            return Err("counter 2 has no switch");
        }
    }
    // The longest time, some 55 ms.
    outb(COMMAND, ONCE);
    outb(COUNTER_2, 0xff);
    outb(COUNTER_2, 0xff);
    if inb(SPEAKER) & OUTPUT != 0 {
        return Err("counter 2 ends before it begins");
    }
    let first = count();
    wait_for(|| count() != first).map_err(|_| "counter 2 does not count")?;
    wait_for(|| inb(SPEAKER) & OUTPUT != 0).map_err(|_| "counter 2 does not end")
}

fn count() -> u16 {
    outb(COMMAND, LATCH);
    let low = inb(COUNTER_2);
    u16::from_le_bytes([low, inb(COUNTER_2)])
}

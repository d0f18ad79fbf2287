//! `dirty`: writes to page after page of 64 MiB, about 100 MB a second of them, and says a dot for every millisecond; for good.

use crate::{machine, serial};

/// Beyond the probe and its stack.
const START: u64 = 16 << 20;
const PAGE: u64 = 4096;
const PAGES: u64 = 16384;
/// In a millisecond: 100 KiB.
const AT_ONCE: u64 = 25;
/// Of the time-stamp counter, at 3 GHz.
const MILLISECOND: u64 = 3_000_000;

pub fn run() -> ! {
    serial::line(format_args!("probe: dirty"));
    let (mut next, mut due) = (0_u64, machine::tsc());
    loop {
        for _ in 0..AT_ONCE {
            let address = START + next % PAGES * PAGE;
            // SAFETY: in the identity map, and nobody else's.
            unsafe { (address as *mut u64).write_volatile(next + 1) };
            next += 1;
        }
        serial::dot();
        due += MILLISECOND;
        while machine::tsc() < due {
            core::hint::spin_loop();
        }
        // What could not be done in time is not made up for.
        due = due.max(machine::tsc());
    }
}

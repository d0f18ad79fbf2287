//! `touch`: fills 8 MiB, then for each line that is typed on COM1 reads the first half of it, counts up the second, and writes to
//! 1 MiB that held nothing; so that a test can see which pages a machine that goes on from a snapshot has to be brought.

use super::Failure;
use crate::serial;

const PAGE: u64 = 4096;
/// Beyond the probe and its stack.
const START: u64 = 16 << 20;
const PAGES: u64 = 2048;
/// Beyond that, with room between.
const FRESH: u64 = 64 << 20;
const FRESH_PAGES: u64 = 256;

pub fn run() -> Result<(), Failure> {
    for page in 0..PAGES {
        set_word(START + page * PAGE, page + 1);
    }
    let mut fresh = None;
    for round in 0u64.. {
        while serial::pause(format_args!("probe: touched {round}")).is_err() {}
        for page in 0..PAGES / 2 {
            if word(START + page * PAGE) != page + 1 {
                return Err("a page that was read is another");
            }
        }
        for page in PAGES / 2..PAGES {
            let address = START + page * PAGE;
            if word(address) != page + 1 + round {
                return Err("a page that was written is another");
            }
            set_word(address, page + 2 + round);
        }
        for page in 0..FRESH_PAGES {
            let address = FRESH + page * PAGE;
            if word(address) != fresh.unwrap_or(0) {
                return Err("a page of zeroes is another");
            }
            set_word(address, round + 1);
        }
        fresh = Some(round + 1);
    }
    Ok(())
}

fn word(address: u64) -> u64 {
    // SAFETY: in the identity map, and nobody else's.
    unsafe { (address as *const u64).read_volatile() }
}

fn set_word(address: u64, value: u64) {
    // SAFETY: as above.
    unsafe { (address as *mut u64).write_volatile(value) }
}

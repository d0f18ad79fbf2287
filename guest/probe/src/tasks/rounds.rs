//! `rounds`: by drivers that stay, again and again, random bytes, a sector of a drive that holds the pattern, and a page of
//! memory that is counted up; so that a machine that is saved and goes on elsewhere has something to go on with.

use super::{Failure, blk};
use crate::cmdline::Cmdline;
use crate::machine;
use crate::serial;
use crate::virtio::{Buffer, Device};

const ENTROPY: u32 = 4;
/// Some 20 ms at 3 GHz.
const PERIOD: u64 = 60_000_000;

static mut PAGE: [u64; 512] = [0; 512];

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let entropy = Device::find(cmdline, ENTROPY, 0, 0)?;
    let mut random = entropy.queue(0, 0)?;
    entropy.finish()?;
    let mut drive = blk::open(cmdline, 1)?;
    let mut before = [0u8; 32];
    for round in 0u64.. {
        let mut bytes = [0u8; 32];
        if random.call(&[Buffer::into(&mut bytes)])? != bytes.len() || bytes == before {
            return Err("the random bytes are none");
        }
        before = bytes;
        drive.check(round % 8)?;
        let page = &raw mut PAGE;
        for at in 0..512 {
            // SAFETY: single-threaded, and within the page.
            let word = unsafe { page.cast::<u64>().add(at) };
            // SAFETY: as above.
            unsafe {
                if word.read_volatile() != round {
                    return Err("the memory is another");
                }
                word.write_volatile(round + 1);
            }
        }
        serial::line(format_args!("probe: round {round}"));
        let start = machine::tsc();
        while machine::tsc().wrapping_sub(start) < PERIOD {
            core::hint::spin_loop();
        }
    }
    Ok(())
}

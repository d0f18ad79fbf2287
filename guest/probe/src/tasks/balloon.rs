//! `balloon`: gives memory to the host by every queue of the balloon, and takes it back. Each step
//! waits until the test has looked.

use super::Failure;
use crate::cmdline::Cmdline;
use crate::machine::wait_for;
use crate::serial;
use crate::virtio::{Buffer, Device, Queue};

const BALLOON: u32 = 5;
const F_STATS_VQ: u64 = 1 << 1;
const F_FREE_PAGE_HINT: u64 = 1 << 3;
const F_REPORTING: u64 = 1 << 5;
const WANTED: u64 = F_STATS_VQ | F_FREE_PAGE_HINT | F_REPORTING;

const PAGE: u64 = 4096;
/// Beyond the probe and its stack.
const START: u64 = 16 << 20;
/// As many as Linux lists at once.
const AT_ONCE: usize = 256;
const FREE_MEMORY: u16 = 4;

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let device = Device::find(cmdline, BALLOON, 0, WANTED)?;
    let offered = device.features();
    let (mut inflate, mut deflate) = (device.queue(0, 0)?, device.queue(1, 1)?);
    // A queue whose feature is not there has no number.
    let mut slot = 2;
    let mut optional = |feature| {
        if offered & feature == 0 {
            return Ok(None);
        }
        slot += 1;
        device.queue(slot - 1, slot as usize - 1).map(Some)
    };
    let mut statistics = optional(F_STATS_VQ)?;
    optional(F_FREE_PAGE_HINT)?;
    let mut reporting = optional(F_REPORTING)?;
    device.finish()?;

    let pages = u64::from(device.config32(0));
    serial::pause(format_args!("probe: balloon wants {pages} pages"))?;
    fill(pages, 1);
    serial::pause(format_args!("probe: filled"))?;

    list(&mut inflate, pages)?;
    device.set_config32(4, pages as u32);
    serial::pause(format_args!("probe: inflated"))?;
    list(&mut deflate, pages)?;
    device.set_config32(4, 0);
    if word(0) != 0 || word(pages - 1) != 0 {
        return Err("a page of the balloon still held what was in it");
    }
    fill(pages, 2);
    serial::pause(format_args!("probe: deflated"))?;

    if let Some(statistics) = &mut statistics {
        tell(statistics)?;
    }
    if let Some(reporting) = &mut reporting {
        let len = (pages * PAGE) as usize;
        reporting.call(&[Buffer::In(START as *mut u8, len)])?;
        serial::pause(format_args!("probe: reported"))?;
        if word(0) != 0 || word(pages - 1) != 0 {
            return Err("a reported page still held what was in it");
        }
    }
    Ok(())
}

/// Lists all pages in a queue.
fn list(queue: &mut Queue, pages: u64) -> Result<(), Failure> {
    let mut numbers = [0u32; AT_ONCE];
    let mut next = 0;
    while next < pages {
        let count = (pages - next).min(AT_ONCE as u64);
        // Backwards, as Linux's allocator hands them out.
        for (place, page) in numbers.iter_mut().zip((next..next + count).rev()) {
            *place = (START / PAGE + page) as u32;
        }
        let list = Buffer::Out(numbers.as_ptr().cast(), count as usize * 4);
        queue.call(&[list])?;
        next += count;
    }
    Ok(())
}

/// Tells of the free memory, and waits until the device asks again, twice.
fn tell(queue: &mut Queue) -> Result<(), Failure> {
    for told in [12_345_u64, 67_890] {
        let mut entry = [0u8; 10];
        entry[..2].copy_from_slice(&FREE_MEMORY.to_le_bytes());
        entry[2..].copy_from_slice(&told.to_le_bytes());
        queue.add(0, &[Buffer::out(&entry)]);
        queue.kick();
        wait_for(|| queue.take().is_some())?;
    }
    serial::line(format_args!("probe: asked for statistics"));
    Ok(())
}

/// Writes to every page.
fn fill(pages: u64, value: u64) {
    for page in 0..pages {
        // SAFETY: memory that nothing else uses, if the test gave the machine as much.
        unsafe { ((START + page * PAGE) as *mut u64).write_volatile(value) };
    }
}

/// The first word of a page.
fn word(page: u64) -> u64 {
    // SAFETY: as in `fill`.
    unsafe { ((START + page * PAGE) as *const u64).read_volatile() }
}

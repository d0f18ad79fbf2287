//! `blk`: reads a drive that holds [`pattern`] and verifies it; with `probe.write=1` also writes
//! the inverted pattern to the last sector, flushes, and reads it back; with `probe.discard=1` discards
//! the first sector, has the second one zeroed, and finds both zero. `probe.drive=N` picks one, and
//! `probe.queue=N` the queue that everything goes through.

use super::Failure;
use crate::cmdline::Cmdline;
use crate::machine::wait_for;
use crate::serial;
use crate::virtio::{Buffer, Device};

const BLOCK: u32 = 2;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const FEATURES: u64 = F_RO | F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
const SECTOR: usize = 512;
const AT_ONCE: usize = 16;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;

/// The eight bytes that belong at `offset` (a multiple of eight) of the drive.
pub fn pattern(offset: u64) -> [u8; 8] {
    (offset ^ 0x5ca1_ab1e_0ddb_a11d).to_le_bytes()
}

pub struct Drive {
    queue: crate::virtio::Queue,
}

/// The first drive, by the ring memory in `slot`.
pub fn open(cmdline: &Cmdline, slot: usize) -> Result<Drive, Failure> {
    let device = Device::find(cmdline, BLOCK, 0, FEATURES)?;
    let queue = device.queue(0, slot)?;
    device.finish()?;
    Ok(Drive { queue })
}

impl Drive {
    /// Reads a sector, which must hold the pattern.
    pub fn check(&mut self, sector: u64) -> Result<(), Failure> {
        let mut data = [0u8; SECTOR];
        if self.request(IN, sector, Some(Buffer::into(&mut data)))? != OK {
            return Err("the drive could not be read");
        }
        let start = sector * SECTOR as u64;
        for (offset, word) in (start..).step_by(8).zip(data.chunks(8)) {
            if word != pattern(offset) {
                return Err("the drive does not hold the pattern");
            }
        }
        Ok(())
    }

    fn request(&mut self, kind: u32, sector: u64, data: Option<Buffer>) -> Result<u8, Failure> {
        let mut header = [0u8; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let mut status = [0xffu8];
        let (head, tail) = (Buffer::out(&header), Buffer::into(&mut status));
        match data {
            Some(data) => self.queue.call(&[head, data, tail])?,
            None => self.queue.call(&[head, tail])?,
        };
        // SAFETY: the device wrote it behind the compiler's back.
        Ok(unsafe { status.as_ptr().read_volatile() })
    }
}

/// Writes to the last sector of the first drive, by the ring memory in `slot`.
pub fn mark(cmdline: &Cmdline, slot: usize) -> Result<(), Failure> {
    let device = Device::find(cmdline, BLOCK, 0, FEATURES)?;
    let queue = device.queue(0, slot)?;
    device.finish()?;
    let sectors = u64::from(device.config32(4)) << 32 | u64::from(device.config32(0));
    let last = sectors.checked_sub(1).ok_or("the drive is empty")?;
    write_and_read_back(&mut Drive { queue }, last, false)
}

/// Has the first drive read as much as it can at once, and does not wait for it.
pub fn leave_in_flight(cmdline: &Cmdline) -> Result<(), Failure> {
    const HEADER: [u8; 16] = [0; 16];
    static mut DATA: [u8; SECTOR * AT_ONCE] = [0; SECTOR * AT_ONCE];
    static mut STATUS: u8 = 0;
    let device = Device::find(cmdline, BLOCK, 0, FEATURES)?;
    let mut queue = device.queue(0, 1)?;
    device.finish()?;
    let data = Buffer::In((&raw mut DATA).cast(), SECTOR * AT_ONCE);
    let status = Buffer::In(&raw mut STATUS, 1);
    for _ in 0..8 {
        queue.add(0, &[Buffer::out(&HEADER), data, status]);
    }
    queue.kick();
    Ok(())
}

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let index = cmdline.number("probe.drive").unwrap_or(0) as usize;
    let device = Device::find(cmdline, BLOCK, index, FEATURES)?;
    let can_discard = device.features() & (F_DISCARD | F_WRITE_ZEROES) != 0;
    let read_only = device.features() & F_RO != 0;
    let queue = cmdline.number("probe.queue").unwrap_or(0) as u32;
    let queue = device.queue(queue, 0)?;
    device.finish()?;
    let mut drive = Drive { queue };
    let sectors = u64::from(device.config32(4)) << 32 | u64::from(device.config32(0));

    let mut id = [0u8; 20];
    if drive.request(GET_ID, 0, Some(Buffer::into(&mut id)))? != OK {
        return Err("get-id failed");
    }
    // It comes a moment after what it tells of.
    wait_for(|| device.take_interrupts() & 1 != 0)
        .map_err(|_| "the request raised no interrupt")?;
    // A device may raise one more than it has to; acknowledged, each stays away.
    wait_for(|| device.take_interrupts() == 0)
        .map_err(|_| "acknowledging the interrupt did nothing")?;
    let text = id.split(|&byte| byte == 0).next().unwrap_or_default();
    let text = core::str::from_utf8(text).unwrap_or("?");
    serial::line(format_args!(
        "probe: drive {text} sectors {sectors} read-only {read_only}"
    ));

    let mut data = [0u8; SECTOR * AT_ONCE];
    let mut sector = 0;
    while sector < sectors {
        let count = (sectors - sector).min(AT_ONCE as u64);
        let part = data.get_mut(..count as usize * SECTOR).ok_or("size")?;
        if drive.request(IN, sector, Some(Buffer::into(part)))? != OK {
            return Err("a read failed");
        }
        for (word, bytes) in part.chunks_exact(8).enumerate() {
            if bytes != pattern(sector * SECTOR as u64 + word as u64 * 8) {
                return Err("a sector does not hold the pattern");
            }
        }
        sector += count;
    }
    let mut one = [0u8; SECTOR];
    if drive.request(IN, sectors, Some(Buffer::into(&mut one)))? != IO_ERROR {
        return Err("a read past the end did not fail");
    }
    if cmdline.number("probe.write") == Some(1) {
        let last = sectors.checked_sub(1).ok_or("the drive is empty")?;
        write_and_read_back(&mut drive, last, read_only)?;
    }
    if cmdline.number("probe.discard") == Some(1) {
        if !can_discard {
            return Err("the drive takes no discard");
        }
        deallocate(&mut drive, DISCARD, 0)?;
        deallocate(&mut drive, WRITE_ZEROES, 1)?;
    }
    Ok(())
}

/// Has one sector discarded or zeroed, and finds it zero.
fn deallocate(drive: &mut Drive, kind: u32, sector: u64) -> Result<(), Failure> {
    let mut range = [0u8; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8] = 1;
    if drive.request(kind, 0, Some(Buffer::out(&range)))? != OK {
        return Err("a discard or write-zeroes failed");
    }
    let mut read = [0xffu8; SECTOR];
    if drive.request(IN, sector, Some(Buffer::into(&mut read)))? != OK || read != [0; SECTOR] {
        return Err("what was given back does not read as zeros");
    }
    Ok(())
}

fn write_and_read_back(drive: &mut Drive, sector: u64, read_only: bool) -> Result<(), Failure> {
    let mut written = [0u8; SECTOR];
    for (word, bytes) in written.chunks_exact_mut(8).enumerate() {
        let at = sector * SECTOR as u64 + word as u64 * 8;
        bytes.copy_from_slice(&(!u64::from_le_bytes(pattern(at))).to_le_bytes());
    }
    let status = drive.request(OUT, sector, Some(Buffer::out(&written)))?;
    if read_only {
        return if status == IO_ERROR {
            Ok(())
        } else {
            Err("a write to a read-only drive did not fail")
        };
    }
    if status != OK {
        return Err("a write failed");
    }
    if drive.request(FLUSH, 0, None)? != OK {
        return Err("flush failed");
    }
    let mut read = [0u8; SECTOR];
    if drive.request(IN, sector, Some(Buffer::into(&mut read)))? != OK || read != written {
        return Err("what was written did not come back");
    }
    Ok(())
}

//! The registers by which vCPUs come and go: what the host wants, and what the guest has let go.
//!
//! Each is 32 bits wide, with one bit for each vCPU; [`MAX_VCPUS`] is 32.
//!
//! | offset | register |
//! |---|---|
//! | 0 | present: which vCPUs there are |
//! | 4 | added: which ones the guest has not been told of; reading clears |
//! | 8 | leaving: which ones the guest is asked to let go; reading clears |
//! | 12 | eject: the guest writes which ones it has let go |
//!
//! Anything else reads as zero and ignores writes. A guest may let go of any vCPU but the first, asked or
//! not. Nothing here stops or starts a thread: the control thread does, told by [`VcpuRegisters::ejected`].

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use super::Line;
use super::acpi::{AcpiRegisters, Event};
use crate::bus::BusDevice;
use crate::config::MAX_VCPUS;

const _: () = assert!(MAX_VCPUS as u32 <= u32::BITS);

const PRESENT: u64 = 0;
const ADDED: u64 = 4;
const LEAVING: u64 = 8;
const EJECT: u64 = 12;
/// The first vCPU: every guest keeps it.
const FIRST: u32 = 1;

/// Why there cannot be so many vCPUs.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{wanted} vCPUs: this machine can have 1 to {most} (`machine-config.max_vcpu_count`)")]
pub struct CountError {
    /// How many were wanted.
    pub wanted: u8,
    /// How many there can be.
    pub most: u8,
}

/// A set of vCPUs, as bits.
pub type VcpuSet = u32;

/// The first `count` vCPUs.
pub fn first(count: u8) -> VcpuSet {
    let absent = u32::BITS.saturating_sub(count.into());
    u32::MAX.checked_shr(absent).unwrap_or(0)
}

/// The registers as plain data.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    present: VcpuSet,
    added: VcpuSet,
    leaving: VcpuSet,
    /// Present, and the guest has read that it shall let them go.
    asked: VcpuSet,
    /// Asked, and wanted again before the guest has let them go: they come back once it has.
    returning: VcpuSet,
}

/// The `count` vCPUs that shall stay or come, where there are those of `staying`: the lowest absent
/// numbers come first, the highest leave first.
fn chosen(staying: VcpuSet, count: u8) -> VcpuSet {
    let mut chosen = staying;
    for _ in staying.count_ones()..count.into() {
        chosen |= 1_u32.checked_shl(chosen.trailing_ones()).unwrap_or(0);
    }
    for _ in u32::from(count)..staying.count_ones() {
        let highest = chosen.checked_ilog2().unwrap_or(0);
        chosen &= !1_u32.checked_shl(highest).unwrap_or(0);
    }
    chosen
}

/// The registers.
pub struct VcpuRegisters {
    most: u8,
    state: Mutex<State>,
    events: Arc<AcpiRegisters>,
    ejected: Line,
}

impl VcpuRegisters {
    /// Registers of a machine with the vCPUs 0 to `count` - 1, that can have `most`. Changes are announced
    /// as [`Event::Vcpus`] of `events`.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new(count: u8, most: u8, events: Arc<AcpiRegisters>) -> io::Result<Self> {
        let state = State {
            present: first(count),
            ..State::default()
        };
        Ok(Self {
            most,
            state: Mutex::new(state),
            events,
            ejected: Line::new()?,
        })
    }

    /// The registers as plain data.
    pub fn save(&self) -> State {
        *self.state()
    }

    /// Becomes what `saved` says. False, with nothing changed, where that has other vCPUs than there can be.
    pub fn restore(&self, saved: State) -> bool {
        let State {
            present,
            added,
            leaving,
            asked,
            returning,
        } = saved;
        let known = (present | added | leaving | asked | returning) & !first(self.most) == 0;
        if known && present & FIRST != 0 {
            *self.state() = saved;
        }
        known && present & FIRST != 0
    }

    /// Which vCPUs there are: the guest may run on them.
    pub fn present(&self) -> VcpuSet {
        self.state().present
    }

    /// Becomes readable when the guest has let go of vCPUs.
    pub fn ejected(&self) -> &EventFd {
        &self.ejected
    }

    /// Adds vCPUs, the lowest absent numbers first, or asks the guest to let go of those with the highest
    /// numbers, until there are `count`. Added ones are present at once; the others leave when the guest
    /// lets them go, if it does. Requests that it has not seen yet are taken back; of one that it has seen and
    /// not obeyed yet, the vCPU comes back as soon as the guest has let it go.
    ///
    /// # Errors
    /// When `count` is 0 or more than there can be.
    pub fn set_count(&self, count: u8) -> Result<(), CountError> {
        if !(1..=self.most).contains(&count) {
            return Err(CountError {
                wanted: count,
                most: self.most,
            });
        }
        {
            let mut state = self.state();
            let chosen = chosen(state.present & !state.asked, count);
            state.leaving = state.present & !chosen;
            state.returning = state.asked & chosen;
            state.added |= chosen & !state.present;
            state.present |= chosen;
            if state.added | state.leaving == 0 {
                return Ok(());
            }
        }
        self.events.raise(Event::Vcpus);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn eject(&self, vcpus: VcpuSet) {
        let (gone, back) = {
            let mut state = self.state();
            let gone = vcpus & state.present & !FIRST;
            let back = gone & state.returning;
            state.present = state.present & !gone | back;
            state.added = state.added & !gone | back;
            state.leaving &= !gone;
            state.asked &= !gone;
            state.returning &= !gone;
            (gone, back)
        };
        if back != 0 {
            self.events.raise(Event::Vcpus);
        }
        if gone != 0 {
            // An eventfd fails only in ways that a new attempt would too.
            let _ = self.ejected.trigger();
        }
    }
}

impl BusDevice for VcpuRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let mut state = self.state();
        let value = match offset {
            PRESENT => state.present,
            ADDED => std::mem::take(&mut state.added),
            LEAVING => {
                let leaving = std::mem::take(&mut state.leaving);
                state.asked |= leaving;
                leaving
            }
            _ => 0,
        };
        *data = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (EJECT, Ok(data)) = (offset, <[u8; 4]>::try_from(data)) {
            self.eject(u32::from_le_bytes(data));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ending::EndSignal;

    fn registers(count: u8, most: u8) -> VcpuRegisters {
        let ends = Arc::new(EndSignal::new().unwrap());
        let events = Arc::new(AcpiRegisters::new(ends).unwrap());
        VcpuRegisters::new(count, most, events).unwrap()
    }

    fn read(registers: &VcpuRegisters, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// What the generic event device's interrupt brings the guest to read.
    fn events(registers: &VcpuRegisters) -> u32 {
        let mut data = [0; 4];
        registers.events.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    fn eject(registers: &VcpuRegisters, vcpus: u32) {
        registers.write(12, &vcpus.to_le_bytes());
    }

    #[test]
    fn adding_is_announced_once() {
        let registers = registers(1, 4);
        assert_eq!((read(&registers, 0), read(&registers, 4)), (1, 0));
        registers.set_count(3).unwrap();
        assert_eq!(events(&registers), 1 << 1);
        assert_eq!(registers.events.interrupt().read().unwrap(), 1);
        assert_eq!(read(&registers, 0), 0b111);
        assert_eq!(read(&registers, 4), 0b110);
        assert_eq!((read(&registers, 4), read(&registers, 8)), (0, 0));
        registers.set_count(3).unwrap();
        assert_eq!(events(&registers), 0, "nothing has changed");
    }

    #[test]
    fn removing_waits_for_the_guest() {
        let registers = registers(4, 4);
        registers.set_count(2).unwrap();
        assert_eq!(events(&registers), 2);
        assert_eq!(read(&registers, 8), 0b1100);
        assert_eq!((read(&registers, 8), registers.present()), (0, 0b1111));
        assert!(registers.ejected().read().is_err(), "nothing has left");
        eject(&registers, 0b1000);
        assert_eq!(registers.ejected().read().unwrap(), 1);
        assert_eq!(registers.present(), 0b0111);
        // The third is still wanted: a new request asks for it again.
        registers.set_count(2).unwrap();
        assert_eq!(read(&registers, 8), 0b0100);
        // And one for more takes it back before the guest has seen it.
        registers.set_count(2).unwrap();
        registers.set_count(3).unwrap();
        assert_eq!((read(&registers, 8), read(&registers, 4)), (0, 0));
    }

    /// Linux takes a CPU offline long before it ejects it.
    #[test]
    fn one_that_is_wanted_again_while_it_leaves_comes_back() {
        let registers = registers(4, 4);
        registers.set_count(2).unwrap();
        assert_eq!(read(&registers, 8), 0b1100);
        eject(&registers, 0b1000);
        registers.set_count(3).unwrap();
        assert_eq!((events(&registers), registers.present()), (2, 0b0111));
        assert_eq!((read(&registers, 4), read(&registers, 8)), (0, 0));
        eject(&registers, 0b0100);
        assert_eq!((events(&registers), registers.present()), (2, 0b0111));
        assert_eq!(read(&registers, 4), 0b0100);
        // Once: what a guest lets go unasked stays away.
        eject(&registers, 0b0100);
        assert_eq!((events(&registers), registers.present()), (0, 0b0011));
    }

    #[test]
    fn gaps_are_filled_first() {
        let registers = registers(4, 32);
        eject(&registers, 0b0110);
        assert_eq!(registers.present(), 0b1001);
        registers.set_count(3).unwrap();
        assert_eq!(read(&registers, 4), 0b0010);
        registers.set_count(32).unwrap();
        assert_eq!(registers.present(), u32::MAX);
        registers.set_count(1).unwrap();
        assert_eq!(read(&registers, 8), !1);
    }

    #[test]
    fn a_count_out_of_range_changes_nothing() {
        let registers = registers(2, 4);
        for wanted in [0, 5, 255] {
            let error = registers.set_count(wanted).unwrap_err();
            assert_eq!((error.wanted, error.most), (wanted, 4));
        }
        assert_eq!((registers.present(), events(&registers)), (0b11, 0));
    }

    #[test]
    fn a_guest_reaches_nothing_else() {
        let registers = registers(2, 4);
        registers.set_count(3).unwrap();
        for offset in [0, 1, 4, 8, 11, 13, 15, 16, u64::MAX] {
            for data in [&[0xff; 4][..], &[0xff], &[], &[0xff; 8]] {
                registers.write(offset, data);
            }
        }
        for data in [&[0xff][..], &[], &[0xff; 3], &[0xff; 8]] {
            registers.write(12, data);
        }
        for (offset, width) in [(4, 1), (4, 2), (4, 8), (5, 4), (12, 4), (u64::MAX, 4)] {
            let mut data = vec![0xff; width];
            registers.read(offset, &mut data);
            assert_eq!(data, vec![0; width], "{width} bytes at {offset}");
        }
        assert_eq!(registers.present(), 0b111);
        assert_eq!(read(&registers, 4), 0b100, "no odd access has cleared it");
        // All at once: the first stays, and those that are not there do not leave.
        eject(&registers, u32::MAX);
        eject(&registers, u32::MAX);
        assert_eq!(registers.present(), 1);
        assert_eq!(registers.ejected().read().unwrap(), 1);
        registers.set_count(4).unwrap();
        assert_eq!(registers.present(), 0b1111);
    }

    #[test]
    fn sets_have_so_many() {
        assert_eq!([0, 1, 5, 32].map(first), [0, 1, 0b1_1111, u32::MAX]);
    }
}

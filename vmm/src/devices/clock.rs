//! The clock page ("VMClock", `include/uapi/linux/vmclock-abi.h`): what the guest must know of breaks in its time.
//!
//! Two numbers change when the machine was restored or moved: the marker of disruptions (calibrations of the
//! clock are void) and the generation (the machine may be one of several). The page says no time of its own:
//! kvmclock does. Guests know the page from Linux 6.13 on.
//!
//! The memory is the guest's, so nothing is ever read back from it.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::acpi::{AcpiRegisters, Event};
use crate::memory::{GuestMemory, layout};

/// "VCLK".
const MAGIC: u32 = 0x4b4c_4356;
const VERSION: u16 = 1;
/// No counter is named by which a time would be computed.
const COUNTER_INVALID: u8 = 0xff;
/// The page is changed with a notification, and has a generation.
const FLAGS: u64 = FLAG_GENERATION | FLAG_NOTIFICATION;
const FLAG_GENERATION: u64 = 1 << 8;
const FLAG_NOTIFICATION: u64 = 1 << 9;

/// Offsets of fields. Those not named are zero: time of type UTC, status unknown.
mod field {
    pub const MAGIC: u64 = 0;
    pub const SIZE: u64 = 4;
    pub const VERSION: u64 = 8;
    pub const COUNTER_ID: u64 = 10;
    pub const SEQUENCE: u64 = 12;
    pub const DISRUPTION: u64 = 16;
    pub const FLAGS: u64 = 24;
    pub const GENERATION: u64 = 104;
}

/// The clock page could not be written.
#[derive(Debug, Error)]
#[error("cannot write the clock page to guest memory at {address:#x}: {source}", address = layout::CLOCK_START)]
pub struct Error {
    source: vm_memory::GuestMemoryError,
}

/// The numbers on the page.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    sequence: u32,
    disruption: u64,
    generation: u64,
}

/// The clock page.
pub struct ClockPage {
    memory: GuestMemory,
    events: Arc<AcpiRegisters>,
    state: Mutex<State>,
}

impl ClockPage {
    /// Writes the page of a new machine.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(memory: GuestMemory, events: Arc<AcpiRegisters>) -> Result<Self, Error> {
        let page = Self {
            memory,
            events,
            state: Mutex::default(),
        };
        let size = u32::try_from(layout::CLOCK_SIZE).unwrap_or(u32::MAX);
        page.write(field::MAGIC, &MAGIC.to_le_bytes())?;
        page.write(field::SIZE, &size.to_le_bytes())?;
        page.write(field::VERSION, &VERSION.to_le_bytes())?;
        page.write(field::COUNTER_ID, &[COUNTER_INVALID])?;
        page.write(field::FLAGS, &FLAGS.to_le_bytes())?;
        Ok(page)
    }

    /// The numbers on the page.
    pub fn save(&self) -> State {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on from the numbers of another machine's page, at the next [`ClockPage::disrupt`].
    pub fn restore(&self, saved: State) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = State {
            // Nobody is writing.
            sequence: saved.sequence & !1,
            ..saved
        };
    }

    /// Says that time has jumped, and, if it `is_another`, that the machine may be one of several, and tells the guest. To be
    /// called before the guest runs on.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn disrupt(&self, is_another: bool) -> Result<(), Error> {
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.disruption = state.disruption.wrapping_add(1);
            state.generation = state.generation.wrapping_add(is_another.into());
            // An odd sequence number says that the fields are being written: those who read them then,
            // or see another number afterwards, read them again.
            self.sequence(state.sequence.wrapping_add(1))?;
            fence(Ordering::Release);
            self.write(field::DISRUPTION, &state.disruption.to_le_bytes())?;
            self.write(field::GENERATION, &state.generation.to_le_bytes())?;
            state.sequence = state.sequence.wrapping_add(2);
            self.sequence(state.sequence)?;
        }
        self.events.raise(Event::Clock);
        Ok(())
    }

    fn sequence(&self, number: u32) -> Result<(), Error> {
        self.memory
            .store(number.to_le(), at(field::SEQUENCE), Ordering::Release)
            .map_err(|source| Error { source })
    }

    fn write(&self, field: u64, bytes: &[u8]) -> Result<(), Error> {
        self.memory
            .write_slice(bytes, at(field))
            .map_err(|source| Error { source })
    }
}

fn at(field: u64) -> GuestAddress {
    GuestAddress(layout::CLOCK_START.saturating_add(field))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::BusDevice as _;
    use crate::ending::EndSignal;

    fn page() -> (ClockPage, GuestMemory, Arc<AcpiRegisters>) {
        let memory = crate::memory::allocate(1 << 20).unwrap();
        let ends = Arc::new(EndSignal::new().unwrap());
        let events = Arc::new(AcpiRegisters::new(ends).unwrap());
        let page = ClockPage::new(memory.clone(), Arc::clone(&events)).unwrap();
        (page, memory, events)
    }

    fn bytes(memory: &GuestMemory) -> [u8; 112] {
        let mut bytes = [0; 112];
        let start = GuestAddress(layout::CLOCK_START);
        memory.read_slice(&mut bytes, start).unwrap();
        bytes
    }

    #[test]
    fn a_new_page_says_no_time() {
        let (_, memory, events) = page();
        let mut expected = [0; 112];
        expected[..4].copy_from_slice(b"VCLK");
        expected[4..8].copy_from_slice(&4096_u32.to_le_bytes());
        expected[8..12].copy_from_slice(&[1, 0, 0xff, 0]);
        expected[24..32].copy_from_slice(&0x300_u64.to_le_bytes());
        assert_eq!(bytes(&memory), expected);
        let mut pending = [0; 4];
        events.read(4, &mut pending);
        assert_eq!(pending, [0; 4]);
    }

    #[test]
    fn a_disruption_shows_and_is_told() {
        let (page, memory, events) = page();
        let mut expected = bytes(&memory);
        for count in 1..=3_u8 {
            page.disrupt(true).unwrap();
            (expected[12], expected[16], expected[104]) = (2 * count, count, count);
            assert_eq!(bytes(&memory), expected);
            let mut pending = [0; 4];
            events.read(4, &mut pending);
            assert_eq!(pending, [1 << 4, 0, 0, 0]);
        }
    }

    #[test]
    fn what_the_guest_writes_there_is_not_believed() {
        let (page, memory, _) = page();
        let start = GuestAddress(layout::CLOCK_START);
        memory.write_slice(&[0xff; 112], start).unwrap();
        page.disrupt(true).unwrap();
        let bytes = bytes(&memory);
        assert_eq!(bytes[12..24], [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[104..], [1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn readers_never_see_half_of_it() {
        let (page, memory, _) = page();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut seen = 0;
                while !done.load(Ordering::Acquire) || seen == 0 {
                    let before: u32 = memory.load(at(field::SEQUENCE), Ordering::Acquire).unwrap();
                    let marker: u64 = memory.read_obj(at(field::DISRUPTION)).unwrap();
                    let generation: u64 = memory.read_obj(at(field::GENERATION)).unwrap();
                    fence(Ordering::Acquire);
                    let after: u32 = memory.load(at(field::SEQUENCE), Ordering::Relaxed).unwrap();
                    if before == after && before.is_multiple_of(2) {
                        assert_eq!((marker, generation), (u64::from(before) / 2, marker));
                        seen += 1;
                    }
                }
            });
            for _ in 0..100_000 {
                page.disrupt(true).unwrap();
            }
            done.store(true, Ordering::Release);
            reader.join().unwrap();
        });
    }
}

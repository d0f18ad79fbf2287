//! The machine's generation ("Virtual Machine Generation ID", Microsoft's specification of 2012): a random
//! number in guest memory. When the machine is started from a state that may have been started from
//! before, it becomes another one, and the guest knows that it is not alone: Linux reseeds its generator of
//! random numbers.
//!
//! The memory is the guest's: it may overwrite the number, and only misleads itself.

use std::io;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::acpi::{AcpiRegisters, Event};
use crate::memory::{GuestMemory, layout};

/// Size of the number in bytes.
pub const SIZE: usize = 16;

/// Why a machine has no new generation.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel gave no random bytes.
    #[error("cannot draw a generation id (getrandom): {0}")]
    Random(#[source] io::Error),
    /// The machine has no memory there.
    #[error("cannot write the generation id to guest memory at {address:#x}: {source}", address = layout::GENERATION_START)]
    Memory {
        /// Why.
        source: vm_memory::GuestMemoryError,
    },
}

/// The machine's generation.
pub struct Generation {
    memory: GuestMemory,
    events: Arc<AcpiRegisters>,
}

impl Generation {
    /// Gives a new machine its first one.
    ///
    /// # Errors
    /// When there are no random bytes, or no memory.
    pub fn new(memory: GuestMemory, events: Arc<AcpiRegisters>) -> Result<Self, Error> {
        let generation = Self { memory, events };
        generation.draw()?;
        Ok(generation)
    }

    /// Of a machine that has one in its memory, and keeps it.
    pub fn kept(memory: GuestMemory, events: Arc<AcpiRegisters>) -> Self {
        Self { memory, events }
    }

    /// Makes the machine another one, and tells the guest. To be called before the guest runs on.
    ///
    /// # Errors
    /// When there are no random bytes, or no memory.
    pub fn regenerate(&self) -> Result<(), Error> {
        self.draw()?;
        self.events.raise(Event::Generation);
        Ok(())
    }

    fn draw(&self) -> Result<(), Error> {
        let mut number = [0; SIZE];
        // Up to 256 bytes come whole and uninterrupted once the pool is ready (getrandom(2)).
        getrandom(&mut number, GetRandomFlags::empty())
            .map_err(|errno| Error::Random(errno.into()))?;
        self.memory
            .write_slice(&number, GuestAddress(layout::GENERATION_START))
            .map_err(|source| Error::Memory { source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::BusDevice as _;
    use crate::ending::EndSignal;

    fn events() -> Arc<AcpiRegisters> {
        let ends = Arc::new(EndSignal::new().unwrap());
        Arc::new(AcpiRegisters::new(ends).unwrap())
    }

    fn number(memory: &GuestMemory) -> u128 {
        memory
            .read_obj(GuestAddress(layout::GENERATION_START))
            .unwrap()
    }

    #[test]
    fn each_generation_has_another_number() {
        let memory = crate::memory::allocate(1 << 20).unwrap();
        let events = events();
        let generation = Generation::new(memory.clone(), Arc::clone(&events)).unwrap();
        let mut pending = [0; 4];
        events.read(4, &mut pending);
        assert_eq!(pending, [0; 4], "a new machine has nothing to tell");
        let mut seen = vec![0, number(&memory)];
        for _ in 0..3 {
            generation.regenerate().unwrap();
            let now = number(&memory);
            assert!(!seen.contains(&now));
            seen.push(now);
            events.read(4, &mut pending);
            assert_eq!(pending, [1 << 3, 0, 0, 0]);
        }
        let after = layout::GENERATION_START + SIZE as u64;
        assert_eq!(memory.read_obj::<u128>(GuestAddress(after)).unwrap(), 0);
    }

    #[test]
    fn a_machine_without_that_memory_is_refused() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let error = Generation::new(memory, events()).err().unwrap().to_string();
        assert!(error.contains("0xfd000"), "{error}");
    }
}

//! A device's configuration space (virtio 1.2, section 2.5): bytes that the device shows to its
//! driver, and a few that the driver may write.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The configuration space, shared between the device and its transport.
///
/// A driver's write changes bytes and nothing else: the device looks at them when it wants to. So
/// nothing that a guest does here runs code of a device on a vCPU thread.
#[derive(Debug, Default)]
pub struct ConfigSpace {
    bytes: Mutex<Vec<u8>>,
    generation: AtomicU32,
    writable: Range<usize>,
}

impl ConfigSpace {
    /// A space that shows `bytes`, of which the driver may write none.
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Self::with_writable(bytes, 0..0)
    }

    /// A space that shows `bytes`, of which the driver may write those in `writable`.
    pub fn with_writable(bytes: Vec<u8>, writable: Range<usize>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            generation: AtomicU32::new(0),
            writable,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().clone()
    }

    /// Changes the bytes from `offset` on, for the device. What lies beyond the end is dropped. The
    /// driver learns of it by [`Signal::config_changed`](super::queue::Signal::config_changed),
    /// which is the caller's to call.
    pub fn set(&self, offset: usize, data: &[u8]) {
        let mut bytes = self.lock();
        for (to, from) in bytes.iter_mut().skip(offset).zip(data) {
            *to = *from;
        }
        // Under the lock, so that a driver that finds the generation unchanged read one state.
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Reads for the driver; beyond the end there are zeroes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        for (to, from) in data.iter_mut().zip(self.lock().iter().skip(offset)) {
            *to = *from;
        }
    }

    /// Writes for the driver, where it may.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        if self.writable.is_empty() {
            return;
        }
        let mut bytes = self.lock();
        let positions = (offset..=usize::MAX).zip(data);
        for (at, from) in positions.filter(|(at, _)| self.writable.contains(at)) {
            if let Some(to) = bytes.get_mut(at) {
                *to = *from;
            }
        }
    }

    /// Changes with every [`ConfigSpace::set`] (section 2.5.1).
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The little-endian number of four bytes at `offset`; zero beyond the end.
    pub fn u32_at(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_writes_only_where_it_may() {
        let space = ConfigSpace::with_writable(vec![0; 12], 4..8);
        for offset in [0, 2, 6, 10, 12, u64::MAX, u64::MAX - 3] {
            space.write(offset, &[7; 4]);
        }
        assert_eq!(space.bytes(), [0, 0, 0, 0, 7, 7, 7, 7, 0, 0, 0, 0]);
        assert_eq!(space.generation(), 0);
        let fixed = ConfigSpace::new(vec![1, 2]);
        fixed.write(0, &[9, 9]);
        assert_eq!(fixed.bytes(), [1, 2]);
    }

    #[test]
    fn reads_beyond_the_end_are_zero() {
        let space = ConfigSpace::new(vec![1, 2, 3, 4, 5]);
        let mut data = [0xff; 4];
        space.read(3, &mut data);
        assert_eq!(data, [4, 5, 0, 0]);
        space.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn a_change_is_seen_with_a_new_generation() {
        let space = ConfigSpace::new(vec![0; 6]);
        space.set(2, &[1, 2, 3, 4, 5, 6]);
        assert_eq!(space.bytes(), [0, 0, 1, 2, 3, 4]);
        assert_eq!(space.generation(), 1);
        assert_eq!(space.u32_at(2), 0x0403_0201);
        assert_eq!(space.u32_at(4), 0x0403);
    }
}

//! The boot timer (`--boot-timer`): the guest writes one byte when it has booted, and the log says how
//! long that took.
//!
//! Guests know it as the byte 123 written to the first address of the MMIO hole, where Firecracker has it.
//! Our page of ACPI registers begins there: the byte is none that its first register, sleep control,
//! obeys (it would be sleep type 6, and there is only 5), so the timer lies over it and passes
//! everything else on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use log::info;
use nix::time::{ClockId, clock_gettime};

use crate::bus::BusDevice;

/// "Booted".
const BOOTED: u8 = 123;

/// A moment, by the clock on the wall and by the CPU time of this process.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    wall: Instant,
    cpu: Duration,
}

impl Moment {
    /// This one.
    pub fn now() -> Self {
        Self {
            wall: Instant::now(),
            cpu: cpu_time(),
        }
    }
}

/// CPU time that this process has used.
pub fn cpu_time() -> Duration {
    // The kernel has this clock, always.
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// The timer, over the device that shares its address.
pub struct BootTimer {
    start: Moment,
    below: Arc<dyn BusDevice>,
}

impl BootTimer {
    /// Measures from `start`.
    pub fn new(start: Moment, below: Arc<dyn BusDevice>) -> Self {
        Self { start, below }
    }
}

impl BusDevice for BootTimer {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.below.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if (offset, data) != (0, &[BOOTED]) {
            return self.below.write(offset, data);
        }
        let wall = self.start.wall.elapsed();
        let cpu = cpu_time().saturating_sub(self.start.cpu);
        info!(
            "Guest-boot-time = {:>6} us {} ms, {:>6} CPU us {} CPU ms",
            wall.as_micros(),
            wall.as_millis(),
            cpu.as_micros(),
            cpu.as_millis()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Below(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Below {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn takes_its_byte_and_nothing_else() {
        let below = Arc::new(Below::default());
        let timer = BootTimer::new(Moment::now(), below.clone());
        let passed = [
            (0, vec![122]),
            (1, vec![123]),
            (0, vec![123, 0]),
            (0, vec![]),
        ];
        timer.write(0, &[123]);
        for (offset, data) in &passed {
            timer.write(*offset, data);
        }
        assert_eq!(*below.0.lock().unwrap(), passed);
        let mut data = [0; 2];
        timer.read(7, &mut data);
        assert_eq!(data, [7, 7]);
    }
}

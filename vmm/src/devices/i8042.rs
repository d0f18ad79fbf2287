//! A keyboard controller without a keyboard, there to reset the machine (Linux's `reboot=k`).
//!
//! `vm-superio` knows that one command. Linux asks for the controller's configuration byte before it believes in
//! a controller, and waits two seconds for the answer: so that is here, too.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::{I8042Device, Trigger};

use crate::bus::BusDevice;
use crate::ending::{End, EndSignal};
use crate::metrics::fields::I8042Metrics;

/// Size of its window: data at 0x60, command and status at 0x64.
pub const WINDOW: u64 = 5;
const DATA: u8 = 0;
const COMMAND: u8 = 4;

const READ_CONFIGURATION: u8 = 0x20;
const WRITE_CONFIGURATION: u8 = 0x60;
/// Status: a byte waits at the data port.
const OUTPUT_FULL: u8 = 1 << 0;
/// Status: self-test passed, keyboard not locked.
const READY: u8 = 1 << 2 | 1 << 4;
/// Configuration: no interrupts, both ports' clocks off.
const CONFIGURATION: u8 = 1 << 4 | 1 << 5;

struct Reset {
    ends: Arc<EndSignal>,
    metrics: Arc<I8042Metrics>,
}

impl Trigger for Reset {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.metrics.reset_count.inc();
        self.ends.announce(End::Reset);
        Ok(())
    }
}

struct State {
    reset: I8042Device<Reset>,
    configuration: u8,
    /// What the next read of the data port brings.
    output: Option<u8>,
    /// The next write to the data port is the configuration.
    expects_configuration: bool,
}

/// The controller.
pub struct I8042 {
    state: Mutex<State>,
    metrics: Arc<I8042Metrics>,
}

impl I8042 {
    /// One that announces a reset to `ends`.
    pub fn new(ends: Arc<EndSignal>) -> Self {
        let metrics = Arc::<I8042Metrics>::default();
        let reset = Reset {
            ends,
            metrics: Arc::clone(&metrics),
        };
        let state = State {
            reset: I8042Device::new(reset),
            configuration: CONFIGURATION,
            output: None,
            expects_configuration: false,
        };
        Self {
            state: Mutex::new(state),
            metrics,
        }
    }

    /// What it counts.
    pub fn metrics(&self) -> Arc<I8042Metrics> {
        Arc::clone(&self.metrics)
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            *value = match offset {
                DATA => state.output.take().unwrap_or(0),
                COMMAND if state.output.is_some() => READY | OUTPUT_FULL,
                COMMAND => READY,
                _ => 0,
            };
            self.metrics.read_count.inc();
        } else {
            self.metrics.missed_read_count.inc();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            match offset {
                DATA if state.expects_configuration => state.configuration = *value,
                COMMAND if *value == READ_CONFIGURATION => {
                    state.output = Some(state.configuration);
                }
                _ => {
                    let Ok(()) = state.reset.write(offset, *value);
                }
            }
            state.expects_configuration = offset == COMMAND && *value == WRITE_CONFIGURATION;
            self.metrics.write_count.inc();
        } else {
            self.metrics.missed_write_count.inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller() -> (I8042, Arc<EndSignal>) {
        let ends = Arc::new(EndSignal::new().unwrap());
        (I8042::new(Arc::clone(&ends)), ends)
    }

    fn read(device: &I8042, offset: u64) -> u8 {
        let mut data = [0xff];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn only_the_reset_command_resets() {
        let (device, ends) = controller();
        device.write(0, &[0xfe]);
        device.write(4, &[0xff]);
        device.write(4, &[0xfe, 0]);
        device.write(4, &[]);
        device.write(u64::MAX, &[0xfe]);
        let mut data = [0xff; 3];
        device.read(4, &mut data);
        assert_eq!((data, ends.announced()), ([0; 3], None));
        device.write(4, &[0xfe]);
        assert_eq!(ends.announced(), Some(End::Reset));
    }

    #[test]
    fn the_configuration_is_kept() {
        let (device, ends) = controller();
        assert_eq!(read(&device, 4) & OUTPUT_FULL, 0);
        device.write(4, &[READ_CONFIGURATION]);
        assert_eq!(read(&device, 4) & OUTPUT_FULL, 1);
        assert_eq!(read(&device, 0), CONFIGURATION);
        assert_eq!(read(&device, 4) & OUTPUT_FULL, 0);
        device.write(4, &[WRITE_CONFIGURATION]);
        // Even if it is the reset command's number.
        device.write(0, &[0xfe]);
        device.write(4, &[READ_CONFIGURATION]);
        assert_eq!(read(&device, 0), 0xfe);
        device.write(0, &[0x11]);
        device.write(4, &[READ_CONFIGURATION]);
        assert_eq!(read(&device, 0), 0xfe, "no command came before that write");
        assert_eq!(ends.announced(), None);
    }
}

//! A keyboard controller: it resets the machine (Linux's `reboot=k`), and brings Ctrl+Alt+Del to a guest.
//!
//! Commands, status and configuration are those of the IBM PS/2 Hardware Interface Technical Reference, "Keyboard and
//! Auxiliary Device Controller". It has no port for a mouse, says so at once, and translates no scan codes.

use std::sync::{Arc, Mutex, PoisonError};
use std::{io, mem};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use super::Line;
use super::keyboard::Keyboard;
use crate::bus::BusDevice;
use crate::ending::{End, EndSignal};
use crate::metrics::fields::I8042Metrics;

/// Size of its window: data at 0x60, command and status at 0x64.
pub const WINDOW: u64 = 5;
const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// Status: a byte waits at the data port.
const OUTPUT_FULL: u8 = 1 << 0;
/// Status: self-test passed, keyboard not locked.
const READY: u8 = 1 << 2 | 1 << 4;

/// Configuration: the keyboard interrupts.
const INTERRUPT: u8 = 1 << 0;
/// Configuration: the keyboard's clock is off.
const KEYBOARD_OFF: u8 = 1 << 4;
/// Configuration at the start: no interrupts, both ports' clocks off.
const CONFIGURATION: u8 = KEYBOARD_OFF | 1 << 5;

const SELF_TEST_PASSED: u8 = 0x55;
const KEYBOARD_FINE: u8 = 0;
/// Of a mouse's port: its clock line is stuck. Linux takes that for "there is none" without waiting for one.
const NO_MOUSE: u8 = 1;
/// Output port: no reset, A20 on.
const OUTPUT_PORT: u8 = 0b11;

/// Whom the next byte at the data port is for.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
enum Recipient {
    #[default]
    Keyboard,
    Configuration,
    /// Comes back from the controller, but not as a mouse's: there is none.
    Loop,
    Nobody,
}

/// The controller and its keyboard, as plain data.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    configuration: u8,
    recipient: Recipient,
    /// The controller's own answer, which is read before what the keyboard says.
    answer: Option<u8>,
    keyboard: Keyboard,
}

impl State {
    /// True while the keyboard has something to say and may.
    fn keyboard_waits(&self) -> bool {
        self.configuration & KEYBOARD_OFF == 0 && self.keyboard.has_output()
    }

    fn status(&self) -> u8 {
        if self.answer.is_some() || self.keyboard_waits() {
            READY | OUTPUT_FULL
        } else {
            READY
        }
    }

    fn take(&mut self) -> Option<u8> {
        let answer = self.answer.take();
        answer.or_else(|| self.keyboard_waits().then(|| self.keyboard.take())?)
    }

    fn data(&mut self, byte: u8) {
        match mem::take(&mut self.recipient) {
            Recipient::Configuration => self.configuration = byte,
            Recipient::Loop => self.answer = Some(byte),
            Recipient::Nobody => {}
            Recipient::Keyboard => {
                // A byte for the keyboard turns its clock on.
                self.configuration &= !KEYBOARD_OFF;
                self.keyboard.command(byte);
            }
        }
    }

    /// Carries out a command, but for the reset.
    fn command(&mut self, command: u8) {
        self.recipient = Recipient::Keyboard;
        match command {
            0x20 => self.answer = Some(self.configuration),
            0x60 => self.recipient = Recipient::Configuration,
            0xa9 => self.answer = Some(NO_MOUSE),
            0xaa => self.answer = Some(SELF_TEST_PASSED),
            0xab => self.answer = Some(KEYBOARD_FINE),
            0xad => self.configuration |= KEYBOARD_OFF,
            0xae => self.configuration &= !KEYBOARD_OFF,
            0xd0 => self.answer = Some(OUTPUT_PORT),
            0xd3 => self.recipient = Recipient::Loop,
            // The output port, and the buffers of keyboard and mouse: each takes a byte.
            0xd1 | 0xd2 | 0xd4 => self.recipient = Recipient::Nobody,
            _ => {}
        }
    }
}

/// The pulse on the processor's reset line.
const RESET: u8 = 0xfe;

/// The controller.
pub struct I8042 {
    state: Mutex<State>,
    line: Line,
    ends: Arc<EndSignal>,
    metrics: Arc<I8042Metrics>,
}

impl I8042 {
    /// One that announces a reset to `ends`.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new(ends: Arc<EndSignal>) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                configuration: CONFIGURATION,
                recipient: Recipient::Keyboard,
                answer: None,
                keyboard: Keyboard::new(),
            }),
            line: Line::new()?,
            ends,
            metrics: Arc::default(),
        })
    }

    /// The controller and its keyboard, as plain data.
    pub fn save(&self) -> State {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.clone()
    }

    /// Becomes what `saved` says. False, with nothing changed, where the keyboard has more to say than one can have.
    pub fn restore(&self, saved: &State) -> bool {
        let Some(keyboard) = Keyboard::restored(&saved.keyboard) else {
            return false;
        };
        self.change(|state| {
            *state = State {
                keyboard,
                ..saved.clone()
            };
        });
        true
    }

    /// The keyboard's interrupt.
    pub fn interrupt(&self) -> &EventFd {
        &self.line
    }

    /// What it counts.
    pub fn metrics(&self) -> Arc<I8042Metrics> {
        Arc::clone(&self.metrics)
    }

    /// Presses Ctrl+Alt+Del. False, with nothing pressed, where no driver of the guest listens to the keyboard.
    pub fn press_ctrl_alt_del(&self) -> bool {
        self.change(|state| {
            let listens = state.configuration & (INTERRUPT | KEYBOARD_OFF) == INTERRUPT
                && state.keyboard.is_scanning();
            if listens {
                state.keyboard.press_ctrl_alt_del();
            }
            listens
        })
    }

    /// Does something to the controller, and interrupts the guest if the keyboard has something to say thereafter.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut state);
        // An edge each time: the driver reads one byte for each interrupt, and does not mind one too many.
        if state.configuration & INTERRUPT != 0 && state.keyboard_waits() {
            // An eventfd fails only in ways that a new attempt would too.
            let _ = self.line.trigger();
        }
        result
    }

    fn reset(&self) {
        self.metrics.reset_count.inc();
        self.ends.announce(End::Reset);
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let [value] = data else {
            self.metrics.missed_read_count.inc();
            return;
        };
        *value = match offset {
            DATA => self.change(State::take).unwrap_or(0),
            COMMAND => {
                let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.status()
            }
            _ => 0,
        };
        self.metrics.read_count.inc();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = data else {
            self.metrics.missed_write_count.inc();
            return;
        };
        match offset {
            DATA => self.change(|state| state.data(*value)),
            COMMAND if *value == RESET => self.reset(),
            COMMAND => self.change(|state| state.command(*value)),
            _ => {}
        }
        self.metrics.write_count.inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller() -> (I8042, Arc<EndSignal>) {
        let ends = Arc::new(EndSignal::new().unwrap());
        (I8042::new(Arc::clone(&ends)).unwrap(), ends)
    }

    fn read(device: &I8042, offset: u64) -> u8 {
        let mut data = [0xff];
        device.read(offset, &mut data);
        data[0]
    }

    /// What it answers to `bytes`, each with the port it is for.
    fn answers(device: &I8042, bytes: &[(u64, u8)]) -> Vec<u8> {
        for (port, byte) in bytes {
            device.write(*port, &[*byte]);
        }
        std::iter::from_fn(|| {
            (read(device, COMMAND) & OUTPUT_FULL != 0).then(|| read(device, DATA))
        })
        .collect()
    }

    fn interrupts(device: &I8042) -> u64 {
        device.interrupt().read().unwrap_or(0)
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
        assert!(answers(&device, &[]).is_empty());
        assert_eq!(answers(&device, &[(COMMAND, 0x20)]), [CONFIGURATION]);
        // Even if it is the reset command's number.
        let kept = [(COMMAND, 0x60), (DATA, 0xfe), (COMMAND, 0x20)];
        assert_eq!(answers(&device, &kept), [0xfe]);
        // What no command came before is the keyboard's, and turns it on.
        assert_eq!(answers(&device, &[(DATA, 0xee)]), [0xee]);
        assert_eq!(answers(&device, &[(COMMAND, 0x20)]), [0xee]);
        assert_eq!(ends.announced(), None);
    }

    #[test]
    fn it_passes_its_tests_and_has_no_mouse() {
        let (device, _) = controller();
        assert_eq!(answers(&device, &[(COMMAND, 0xaa)]), [0x55]);
        assert_eq!(answers(&device, &[(COMMAND, 0xab)]), [0]);
        assert_eq!(answers(&device, &[(COMMAND, 0xa9)]), [1]);
        assert_eq!(answers(&device, &[(COMMAND, 0xd0)]), [3]);
        assert_eq!(answers(&device, &[(COMMAND, 0xd3), (DATA, 0x5a)]), [0x5a]);
        // Status bit 5 would make it a mouse's.
        device.write(COMMAND, &[0xd3]);
        device.write(DATA, &[0x5a]);
        assert_eq!(read(&device, COMMAND), READY | OUTPUT_FULL);
        read(&device, DATA);
        assert!(answers(&device, &[(COMMAND, 0xd4), (DATA, 0xf2)]).is_empty());
        assert_eq!(interrupts(&device), 0, "nobody has turned them on");
    }

    #[test]
    fn keys_come_with_interrupts_to_a_driver_that_listens() {
        let (device, _) = controller();
        assert!(!device.press_ctrl_alt_del());
        // Interrupts on, keyboard on; it is asked to send keys.
        for (port, byte) in [(COMMAND, 0x60), (DATA, 0x21)] {
            device.write(port, &[byte]);
        }
        assert!(!device.press_ctrl_alt_del(), "nobody has asked for keys");
        assert_eq!(answers(&device, &[(DATA, 0xf4)]), [0xfa]);
        assert_eq!(interrupts(&device), 1);
        assert!(device.press_ctrl_alt_del());
        let mut keys = Vec::new();
        while interrupts(&device) != 0 {
            keys.push(read(&device, DATA));
        }
        assert_eq!(keys[..4], [0x14, 0x11, 0xe0, 0x71]);
        assert_eq!(keys.len(), 11);
        assert_eq!(read(&device, COMMAND), READY);
    }

    #[test]
    fn keys_wait_while_the_keyboard_is_off() {
        let (device, _) = controller();
        for (port, byte) in [(COMMAND, 0x60), (DATA, 0x21), (DATA, 0xf4)] {
            device.write(port, &[byte]);
        }
        assert!(device.press_ctrl_alt_del());
        device.write(COMMAND, &[0xad]);
        interrupts(&device);
        assert_eq!(answers(&device, &[(COMMAND, 0x20)]), [0x31]);
        assert!(!device.press_ctrl_alt_del());
        device.write(COMMAND, &[0xae]);
        assert_eq!(interrupts(&device), 1);
        assert_eq!(answers(&device, &[]).len(), 12, "the answer and the keys");
    }
}

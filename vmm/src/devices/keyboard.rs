//! A PS/2 keyboard with three keys, as much of it as a driver asks for before it believes in it.
//!
//! Scan codes are those of set 2, which is what Linux's `atkbd` expects of a controller that does not translate. Commands
//! and answers are those of the IBM PS/2 Hardware Interface Technical Reference, "Keyboard".

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// What waits to be read: the keyboard sends nothing more until there is room.
const CAPACITY: usize = 16;

/// Pressed one after the other and let go in the opposite order.
const CTRL_ALT_DEL: [u8; 11] = [
    0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14,
];

const ACKNOWLEDGE: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;
/// What every keyboard with the MF II layout calls itself.
const ID: [u8; 2] = [0xab, 0x83];
const SET_2: u8 = 2;

/// Commands that are followed by a parameter.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
enum Awaited {
    /// Lights, or the repeat rate: of no consequence here.
    Ignored,
    /// The scan code set; 0 asks which one it is.
    Set,
}

/// The keyboard.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Keyboard {
    output: VecDeque<u8>,
    awaited: Option<Awaited>,
    scanning: bool,
}

impl Keyboard {
    /// One that nobody has asked for keys yet.
    pub fn new() -> Self {
        Self {
            // Never more: a vCPU's thread is to need no memory.
            output: VecDeque::with_capacity(CAPACITY),
            awaited: None,
            scanning: false,
        }
    }

    /// A saved one, if it has no more to say than one can have.
    pub fn restored(saved: &Self) -> Option<Self> {
        if saved.output.len() > CAPACITY {
            return None;
        }
        let mut keyboard = Self::new();
        keyboard.output.extend(&saved.output);
        (keyboard.awaited, keyboard.scanning) = (saved.awaited, saved.scanning);
        Some(keyboard)
    }

    /// True while a byte waits.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Takes the byte that waits.
    pub fn take(&mut self) -> Option<u8> {
        self.output.pop_front()
    }

    /// Whether a driver has asked for keys.
    pub fn is_scanning(&self) -> bool {
        self.scanning
    }

    /// Presses Ctrl, Alt and Del and lets them go. Keys that nobody has read yet are enough.
    pub fn press_ctrl_alt_del(&mut self) {
        if CAPACITY.saturating_sub(self.output.len()) >= CTRL_ALT_DEL.len() {
            self.output.extend(CTRL_ALT_DEL);
        }
    }

    /// Takes a command or a parameter of the driver.
    pub fn command(&mut self, byte: u8) {
        if let Some(awaited) = self.awaited.take()
            && byte < 0xed
        {
            self.answer(&[ACKNOWLEDGE]);
            if awaited == Awaited::Set && byte == 0 {
                self.answer(&[SET_2]);
            }
            return;
        }
        match byte {
            // Lights; repeat rate.
            0xed | 0xf3 => self.await_parameter(Awaited::Ignored),
            0xf0 => self.await_parameter(Awaited::Set),
            // Echo.
            0xee => self.answer(&[0xee]),
            0xf2 => {
                self.answer(&[ACKNOWLEDGE]);
                self.answer(&ID);
            }
            // Start; stop; defaults.
            0xf4 => self.restart(true, &[ACKNOWLEDGE]),
            0xf5 => self.restart(false, &[ACKNOWLEDGE]),
            0xf6 => self.restart(self.scanning, &[ACKNOWLEDGE]),
            // Reset.
            0xff => self.restart(true, &[ACKNOWLEDGE, SELF_TEST_PASSED]),
            _ => self.answer(&[RESEND]),
        }
    }

    fn await_parameter(&mut self, awaited: Awaited) {
        self.awaited = Some(awaited);
        self.answer(&[ACKNOWLEDGE]);
    }

    fn restart(&mut self, scanning: bool, answer: &[u8]) {
        self.scanning = scanning;
        self.output.clear();
        self.answer(answer);
    }

    /// A driver that never reads loses answers.
    fn answer(&mut self, bytes: &[u8]) {
        let room = CAPACITY.saturating_sub(self.output.len());
        self.output.extend(bytes.iter().take(room));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(keyboard: &mut Keyboard) -> Vec<u8> {
        std::iter::from_fn(|| keyboard.take()).collect()
    }

    fn told(keyboard: &mut Keyboard, bytes: &[u8]) -> Vec<u8> {
        for byte in bytes {
            keyboard.command(*byte);
        }
        all(keyboard)
    }

    #[test]
    fn it_answers_like_a_keyboard() {
        let mut keyboard = Keyboard::new();
        assert_eq!(told(&mut keyboard, &[0xf2]), [0xfa, 0xab, 0x83]);
        assert_eq!(told(&mut keyboard, &[0xed, 0x07]), [0xfa, 0xfa]);
        assert_eq!(told(&mut keyboard, &[0xf3, 0x20]), [0xfa, 0xfa]);
        assert_eq!(told(&mut keyboard, &[0xf0, 0x00]), [0xfa, 0xfa, 0x02]);
        assert_eq!(told(&mut keyboard, &[0xf0, 0x02]), [0xfa, 0xfa]);
        assert_eq!(told(&mut keyboard, &[0xee]), [0xee]);
        assert_eq!(told(&mut keyboard, &[0x12]), [0xfe]);
        // A command in a parameter's place is a command.
        assert_eq!(told(&mut keyboard, &[0xed, 0xff]), [0xfa, 0xaa]);
    }

    #[test]
    fn it_sends_keys_to_who_wants_them() {
        let mut keyboard = Keyboard::new();
        assert!(!keyboard.is_scanning());
        for (command, scanning) in [(0xf4, true), (0xf6, true), (0xf5, false), (0xff, true)] {
            keyboard.command(command);
            assert_eq!(keyboard.is_scanning(), scanning, "{command:#x}");
        }
        all(&mut keyboard);
        keyboard.press_ctrl_alt_del();
        keyboard.press_ctrl_alt_del();
        assert_eq!(all(&mut keyboard), CTRL_ALT_DEL, "once, until it is read");
        assert_eq!(keyboard.take(), None);
    }

    #[test]
    fn a_driver_that_never_reads_costs_no_memory() {
        let mut keyboard = Keyboard::new();
        for byte in (0..=255).cycle().take(10_000) {
            keyboard.command(byte);
            keyboard.press_ctrl_alt_del();
            assert!(keyboard.output.len() <= CAPACITY);
        }
    }
}

//! The ACPI power button, as an input device.
//!
//! The modules for it are optional: without them no device appears and the list is empty.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

/// `EV_KEY` and `KEY_POWER` of linux/input-event-codes.h.
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// Size of `struct input_event` on a 64-bit kernel: two 8-byte times, type, code, value.
const EVENT_SIZE: usize = 24;

/// Every input device, non-blocking.
pub fn open_all() -> Vec<File> {
    let Ok(entries) = fs::read_dir("/dev/input") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("event"))
        .filter_map(|entry| {
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(entry.path())
                .ok()
        })
        .collect()
}

/// Takes the events that wait in a device; true when the power button was pressed among them.
pub fn pressed(mut device: &File) -> bool {
    let mut pressed = false;
    let mut events = [0; EVENT_SIZE * 16];
    while let Ok(length @ 1..) = device.read(&mut events) {
        for event in events
            .get(..length)
            .unwrap_or_default()
            .chunks_exact(EVENT_SIZE)
        {
            pressed |= is_power_press(event);
        }
    }
    pressed
}

fn is_power_press(event: &[u8]) -> bool {
    let Some(&[a, b, c, d, e, f, g, h]) = event.last_chunk::<8>() else {
        return false;
    };
    let kind = u16::from_ne_bytes([a, b]);
    let code = u16::from_ne_bytes([c, d]);
    let value = i32::from_ne_bytes([e, f, g, h]);
    kind == EV_KEY && code == KEY_POWER && value == 1
}

#[cfg(test)]
mod tests {
    use super::is_power_press;

    #[test]
    fn only_a_press_counts() {
        let event = |kind: u16, code: u16, value: i32| {
            let mut bytes = vec![0; 16];
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(code.to_ne_bytes());
            bytes.extend(value.to_ne_bytes());
            bytes
        };
        assert!(is_power_press(&event(1, 116, 1)));
        assert!(!is_power_press(&event(1, 116, 0)));
        assert!(!is_power_press(&event(0, 116, 1)));
        assert!(!is_power_press(&event(1, 115, 1)));
        assert!(!is_power_press(&[1; 7]));
    }
}

//! `hostile`: queues and chains that cannot be, one after the other, to every device that there is; each has to say that it
//! needs a reset, or to live with it, and to work again after a reset.

use super::Failure;
use crate::cmdline::Cmdline;
use crate::machine::wait_for;
use crate::serial;
use crate::virtio::Device;
use crate::virtio::hostile::{CHAINS, LAYOUTS};

const NEEDS_RESET: u32 = 64;

/// Types of devices, and of each a queue that it looks into when it is rung.
const DEVICES: [(&str, u32, u32); 8] = [
    ("entropy", 4, 0),
    ("block", 2, 0),
    ("net", 1, 1),
    ("vsock", 19, 1),
    ("console", 3, 1),
    ("balloon", 5, 0),
    ("mem", 24, 0),
    ("pmem", 27, 0),
];

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    for (name, id, index) in DEVICES {
        let needs_reset = |device: &Device| device.status() & NEEDS_RESET != 0;
        for layout in &LAYOUTS {
            let device = Device::find(cmdline, id, 0, 0)?;
            device.broken_queue(index, layout);
            // Its status is not what an honest driver wants to see.
            let _ = device.finish();
            if !needs_reset(&device) {
                serial::line(format_args!("probe: {name}: {}", layout.0));
                return Err("a queue that cannot be was taken");
            }
        }
        for chain in &CHAINS {
            let device = Device::find(cmdline, id, 0, 0)?;
            let mut queue = device.queue(index, 0)?;
            device.finish()?;
            queue.attack(chain);
            let ended =
                wait_for(|| needs_reset(&device) || !chain.breaks && queue.take().is_some());
            if ended.is_err() || chain.breaks && !needs_reset(&device) {
                serial::line(format_args!("probe: {name}: {}", chain.name));
                return Err("a chain that cannot be has no end");
            }
        }
        // Nothing is left of it.
        let device = Device::find(cmdline, id, 0, 0)?;
        device.queue(index, 0)?;
        device.finish()?;
        serial::line(format_args!("probe: {name} lives"));
    }
    Ok(())
}

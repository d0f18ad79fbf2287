//! What the probe can be told to do.

mod balloon;
mod blk;
mod console;
mod cpuid;
mod dirty;
mod fs;
mod hostile;
mod hotplug;
mod keyboard;
mod mem;
mod net;
mod pit;
mod pmem;
mod rng;
mod rounds;
mod serial;
mod touch;
mod vsock;

use crate::cmdline::Cmdline;
use crate::machine;

/// Why a task failed, for the last line.
pub type Failure = &'static str;

/// Runs the task `name`.
pub fn run(name: &str, cmdline: &Cmdline) -> Result<(), Failure> {
    match name {
        "boot" => Ok(()),
        // Busy for good, so that a test can see how a spinning guest is ended.
        "spin" => {
            crate::serial::line(format_args!("probe: spin"));
            machine::spin()
        }
        "tick" => tick(),
        "cpuid" => cpuid::run(cmdline),
        "booted" => {
            machine::write8(machine::BOOT_TIMER, 123);
            Ok(())
        }
        "serial" => serial::run(),
        "balloon" => balloon::run(cmdline),
        "fs" => fs::run(cmdline),
        "blk" => blk::run(cmdline),
        "console" => console::run(cmdline),
        "rounds" => rounds::run(cmdline),
        "rng" => rng::run(cmdline),
        "vsock" => vsock::echo(cmdline),
        "vsock-connect" => vsock::connect(cmdline),
        "vsock-many" => vsock::many(cmdline),
        "hostile" => hostile::run(cmdline),
        "hotplug" => hotplug::run(cmdline),
        "keyboard" => keyboard::run(cmdline),
        "mem" => mem::run(cmdline),
        "net" => net::run(cmdline),
        "pmem" => pmem::run(cmdline),
        "pit" => pit::run(),
        _ => for_snapshots(name),
    }
}

/// Those for machines that are saved and moved.
#[inline(never)]
fn for_snapshots(name: &str) -> Result<(), Failure> {
    match name {
        "chatter" => chatter(),
        "dirty" => dirty::run(),
        "touch" => touch::run(),
        _ => Err("no such task"),
    }
}

/// Says again and again that it runs, so that a test can see when it does not.
fn tick() -> ! {
    // Some 50 ms at 3 GHz.
    const PERIOD: u64 = 150_000_000;
    let mut number = 0u64;
    loop {
        crate::serial::line(format_args!("probe: tick {number}"));
        number = number.wrapping_add(1);
        let start = machine::tsc();
        while machine::tsc().wrapping_sub(start) < PERIOD {
            core::hint::spin_loop();
        }
    }
}

/// Never stops talking, so that a machine that goes on from a snapshot is heard at once.
fn chatter() -> ! {
    loop {
        crate::serial::line(format_args!("probe: chatter"));
    }
}

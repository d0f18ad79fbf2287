//! The probe: a bare-metal guest for tests and benchmarks.
//!
//! It boots by the Linux 64-bit protocol and by PVH, enters ring 3 within a few dozen instructions,
//! reads its task and its devices from the command line, and drives virtio by polling. It needs no
//! interrupt and no timer, so it runs wherever `/dev/kvm` runs user-mode code. `README.md` lists
//! the tasks; every one ends in a line `probe: TASK ok` or `probe: TASK FAIL: why`.
#![no_std]
#![no_main]
// Bare metal: ports, fixed addresses and rings shared with a device.
#![allow(unsafe_code)]

mod cmdline;
mod machine;
mod runtime;
mod serial;
mod tasks;
mod virtio;

use cmdline::Cmdline;

core::arch::global_asm!(include_str!("start.s"));

/// First Rust code, in ring 3, on the probe's own stack and page tables.
#[unsafe(no_mangle)]
extern "sysv64" fn probe_main(protocol: u64, info: u64) -> ! {
    let cmdline = Cmdline::from_boot(protocol, info);
    let task = cmdline.value("probe.task").unwrap_or("boot");
    match tasks::run(task, &cmdline) {
        Ok(()) => serial::line(format_args!("probe: {task} ok")),
        Err(why) => serial::line(format_args!("probe: {task} FAIL: {why}")),
    }
    machine::end(cmdline.value("probe.end").unwrap_or("reset"))
}

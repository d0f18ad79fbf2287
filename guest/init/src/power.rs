//! The end of the guest.

use crate::say;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot, set_cad_enabled};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::Duration;

/// Makes Ctrl-Alt-Delete on the guest's keyboard a SIGINT to PID 1 in place of an instant reset (reboot(2)).
pub fn ctrl_alt_del_is_a_signal() {
    let _ = set_cad_enabled(false);
}

/// Kills every process but ourselves (kill(2): PID 1 is never included).
pub fn kill_everyone() {
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
}

/// Writes everything back and powers the machine off (ACPI S5).
pub fn off() -> ! {
    kill_everyone();
    nix::unistd::sync();
    // For a writable root on a disk: a clean file system needs a last write that only this makes.
    let _ = mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
        None::<&str>,
    );
    let Err(errno) = reboot(RebootMode::RB_POWER_OFF);
    say(&format!("cannot power off: {errno}"));
    // PID 1 must not return: the kernel would panic. The host ends the machine.
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

//! Exit codes, as a caller of the jailer or the VMM sees them.
//!
//! | code | from | meaning |
//! |---|---|---|
//! | 0 | VMM | the guest powered off (ACPI S5) |
//! | 1 | VMM | the VMM failed while the guest ran |
//! | 2 | VMM, jailer | bad arguments, config or resources: nothing was started |
//! | 10 | VMM | the guest asked for a reset |
//! | 11 | VMM | the guest crashed (triple fault, KVM shutdown or internal error) |
//! | 12 | VMM | the host ended it (SIGTERM, SIGINT) |
//! | 13 | VMM | the machine has moved to another VMM, and runs there |
//! | 125 | jailer | a step of building the jail failed; the message names it |
//! | 159 | VMM, broker | a seccomp violation (128 + SIGSYS) |
//! | 128+n | jailer | the VMM died by signal n |
//!
//! A jailer that stays as the VMM's parent exits with the VMM's own code.

/// The guest powered off (ACPI S5).
pub const GUEST_POWERED_OFF: u8 = 0;
/// The VMM failed while the guest ran.
pub const VMM_FAILED: u8 = 1;
/// Bad arguments, config or resources; nothing was started.
pub const BAD_INPUT: u8 = 2;
/// The guest asked for a reset.
pub const GUEST_RESET: u8 = 10;
/// The guest crashed: a triple fault, or KVM reported a shutdown or an internal error.
pub const GUEST_CRASHED: u8 = 11;
/// The host ended the machine with SIGTERM or SIGINT.
pub const ENDED_BY_HOST: u8 = 12;
/// The machine has moved to another VMM, and runs there.
pub const MOVED: u8 = 13;
/// A step of building the jail failed.
pub const JAIL_FAILED: u8 = 125;
/// A thread called what its seccomp policy forbids (128 + SIGSYS).
pub const SECCOMP_VIOLATION: u8 = 159;

/// The code that stands for death by a signal, as shells have it: 128 + `signal`.
pub const fn by_signal(signal: i32) -> u8 {
    // Signal numbers are 1 to 64, so the sum fits.
    128 | (signal as u8 & 0x7f)
}

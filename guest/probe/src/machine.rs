//! Ports, MMIO and the ways to end.

use core::arch::asm;

/// Command and status of the keyboard controller.
pub const I8042_COMMAND: u16 = 0x64;
/// The command that resets.
pub const I8042_RESET: u8 = 0xfe;
/// The sleep control register: `SLP_TYP` 5 and `SLP_EN` (ACPI 6.5, section 4.8.3.7).
const SLEEP_CONTROL: u64 = 0xc000_0000;
/// Where a guest says that it has booted: the same address.
pub const BOOT_TIMER: u64 = SLEEP_CONTROL;
const POWER_OFF: u8 = 5 << 2 | 1 << 5;
/// The reset register and its value.
const RESET: u64 = 0xc000_0002;
const RESET_VALUE: u8 = 1;

unsafe extern "C" {
    fn crash() -> !;
}

/// Writes a byte to a port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: ring 3 has IOPL 3, and a port write touches no memory of ours.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// Reads a byte from a port.
pub fn inb(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as in `outb`; reading a port touches no memory of ours either.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// Reads a register of a device.
pub fn read32(address: u64) -> u32 {
    // SAFETY: the identity map covers the MMIO hole; only windows named on the command line
    // or by the constants above are read.
    unsafe { (address as *const u32).read_volatile() }
}

/// Writes a register of a device.
pub fn write32(address: u64, value: u32) {
    // SAFETY: as in `read32`.
    unsafe { (address as *mut u32).write_volatile(value) }
}

/// Reads two bytes of a register.
pub fn read16(address: u64) -> u16 {
    // SAFETY: as in `read32`.
    unsafe { (address as *const u16).read_volatile() }
}

/// Writes two bytes of a register.
pub fn write16(address: u64, value: u16) {
    // SAFETY: as in `read32`.
    unsafe { (address as *mut u16).write_volatile(value) }
}

/// Reads a byte of a register.
pub fn read8(address: u64) -> u8 {
    // SAFETY: as in `read32`.
    unsafe { (address as *const u8).read_volatile() }
}

/// Writes a byte of a register.
pub fn write8(address: u64, value: u8) {
    // SAFETY: as in `read32`.
    unsafe { (address as *mut u8).write_volatile(value) }
}

/// Makes the gibibyte at 4 GiB accessible, as the first four are from the start.
pub fn map_fifth_gibibyte() {
    #[repr(align(4096))]
    #[allow(dead_code, reason = "the processor reads it")]
    struct Directory([u64; 512]);
    static mut DIRECTORY: Directory = Directory([0; 512]);
    unsafe extern "C" {
        static mut pdpt: [u64; 512];
    }
    // SAFETY: single-threaded; the tables lie in the identity map. Pages of 2 MiB, open to ring 3.
    unsafe {
        let directory = (&raw mut DIRECTORY).cast::<u64>();
        for page in 0..512u64 {
            let entry = 4 << 30 | page << 21 | 0xe7;
            directory.add(page as usize).write_volatile(entry);
        }
        (&raw mut pdpt)
            .cast::<u64>()
            .add(4)
            .write_volatile(directory as u64 | 0x27);
    }
}

/// The time-stamp counter, to bound every wait.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC reads a counter and nothing else.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Polls until `ready` or until some seconds (about ten at 3 GHz) have passed.
pub fn wait_for(mut ready: impl FnMut() -> bool) -> Result<(), &'static str> {
    let start = tsc();
    while !ready() {
        if tsc().wrapping_sub(start) > 30_000_000_000 {
            return Err("timed out");
        }
        core::hint::spin_loop();
    }
    Ok(())
}

/// Spins for good.
pub fn spin() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// Ends the machine: `reset` (i8042), `acpi-reset`, `poweroff`, `crash`, `spin`.
pub fn end(how: &str) -> ! {
    match how {
        "poweroff" => write8(SLEEP_CONTROL, POWER_OFF),
        "acpi-reset" => write8(RESET, RESET_VALUE),
        // SAFETY: an invalid instruction with no gate for it: the machine shuts down.
        "crash" => unsafe { crash() },
        "spin" => {}
        _ => outb(I8042_COMMAND, I8042_RESET),
    }
    spin()
}

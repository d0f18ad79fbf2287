//! `cpuid`: prints one subleaf of CPUID.

use core::arch::x86_64::__cpuid_count;

use super::Failure;
use crate::cmdline::Cmdline;
use crate::serial;

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let number = |name| cmdline.number(name).unwrap_or(0);
    let leaf = u32::try_from(number("probe.leaf")).map_err(|_| "the leaf has 32 bits")?;
    let subleaf = u32::try_from(number("probe.subleaf")).map_err(|_| "the subleaf has 32 bits")?;
    let found = __cpuid_count(leaf, subleaf);
    serial::line(format_args!(
        "probe: leaf {leaf:#x} {:08x} {:08x} {:08x} {:08x}",
        found.eax, found.ebx, found.ecx, found.edx
    ));
    Ok(())
}

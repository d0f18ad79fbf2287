//! The kernel command line.

use linux_loader::cmdline::Cmdline;
use vm_memory::{Bytes, GuestAddress};

use super::{Error, MachineDescription};
use crate::memory::{GuestMemory, layout};

/// Makes the command line from the operator's `boot_args`.
///
/// A guest that does without ACPI (`acpi=off`) finds its devices in `virtio_mmio.device=`
/// parameters, added here before a `--` that starts the arguments of init. With ACPI they are in
/// the DSDT: naming them twice would make Linux drive each device twice.
pub(super) fn compose(boot_args: &str, machine: &MachineDescription) -> Result<String, Error> {
    let printable = |c: char| c.is_ascii_graphic() || c == ' ';
    if let Some(character) = boot_args.chars().find(|c| !printable(*c)) {
        return Err(Error::CmdlineCharacter { character });
    }
    let mut cmdline =
        Cmdline::try_from(boot_args, layout::CMDLINE_MAX_SIZE).map_err(Error::Cmdline)?;
    if boot_args
        .split_ascii_whitespace()
        .any(|word| word == "acpi=off")
    {
        for device in &machine.mmio_devices {
            cmdline
                .add_virtio_mmio_device(device.size, GuestAddress(device.base), device.gsi, None)
                .map_err(Error::Cmdline)?;
        }
    }
    let bytes = cmdline.as_cstring().map_err(Error::Cmdline)?;
    Ok(bytes.to_string_lossy().into_owned())
}

/// Writes the command line with its NUL. `limit` is what the kernel takes, without the NUL.
pub(super) fn write(memory: &GuestMemory, cmdline: &str, limit: usize) -> Result<(), Error> {
    let length = cmdline.len();
    if length > limit {
        return Err(Error::CmdlineTooLong { length, limit });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    let start = layout::CMDLINE_START;
    memory
        .write_slice(&bytes, GuestAddress(start))
        .map_err(Error::memory("the command line", start))
}

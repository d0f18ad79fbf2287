//! `boot-source`: what is booted.

use serde::{Deserialize, Serialize};

use super::{Error, check_path, range};
use crate::boot::Protocol;

/// The command line of a config that has no `boot_args`: Firecracker's, of a guest without a console.
pub const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// What is booted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: an ELF64 image or a bzImage. Empty while there is none.
    pub kernel_image_path: String,
    /// The initial RAM disk.
    pub initrd_path: Option<String>,
    /// The kernel's command line; [`DEFAULT_BOOT_ARGS`] without it.
    pub boot_args: Option<String>,
    /// How the kernel is entered; without it the image decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
}

impl BootSource {
    /// The kernel's command line.
    pub fn args(&self) -> &str {
        self.boot_args.as_deref().unwrap_or(DEFAULT_BOOT_ARGS)
    }

    /// Checks it.
    ///
    /// # Errors
    /// When there is no kernel, or a value cannot be.
    pub fn check(&self) -> Result<(), Error> {
        check_path("boot-source.kernel_image_path", &self.kernel_image_path)?;
        if let Some(path) = &self.initrd_path {
            check_path("boot-source.initrd_path", path)?;
        }
        if self.args().contains(char::is_control) {
            return range(
                "boot-source.boot_args",
                format_args!("{:?}", self.args()),
                "control characters are not allowed",
            );
        }
        Ok(())
    }
}

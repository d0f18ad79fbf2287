//! The kernel command line: `name=value` words and the virtio-mmio devices.

/// `boot_params.hdr.cmd_line_ptr` (Linux 64-bit protocol).
const BOOT_PARAMS_CMDLINE: u64 = 0x228;
/// `hvm_start_info.cmdline_paddr` (PVH).
const START_INFO_CMDLINE: u64 = 24;
const MAX: usize = 2048;

/// The words of the command line.
pub struct Cmdline {
    text: &'static str,
}

impl Cmdline {
    /// Finds the command line where the boot protocol put it (0: boot_params, 1: start_info).
    pub fn from_boot(protocol: u64, info: u64) -> Self {
        // SAFETY: the VMM promises one of these structures at `info`; all memory is identity-mapped.
        let bytes = unsafe {
            let start = if protocol == 0 {
                u64::from(((info + BOOT_PARAMS_CMDLINE) as *const u32).read_volatile())
            } else {
                ((info + START_INFO_CMDLINE) as *const u64).read_volatile()
            } as *const u8;
            let mut len = 0;
            if !start.is_null() {
                while len < MAX && start.add(len).read_volatile() != 0 {
                    len += 1;
                }
            }
            core::slice::from_raw_parts(start, len)
        };
        Self {
            text: core::str::from_utf8(bytes).unwrap_or(""),
        }
    }

    /// The value of the last word `name=value`.
    pub fn value(&self, name: &str) -> Option<&'static str> {
        self.values(name).last()
    }

    /// The value of `name` as a decimal number.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.value(name)?.parse().ok()
    }

    /// Base addresses of the virtio-mmio windows, in order.
    pub fn virtio_windows(&self) -> impl Iterator<Item = u64> {
        self.values("virtio_mmio.device").filter_map(|device| {
            let (_size, rest) = device.split_once("@0x")?;
            let (base, _gsi) = rest.split_once(':')?;
            u64::from_str_radix(base, 16).ok()
        })
    }

    fn values(&self, name: &str) -> impl Iterator<Item = &'static str> {
        self.text
            .split_ascii_whitespace()
            .filter_map(move |word| word.strip_prefix(name)?.strip_prefix('='))
    }
}

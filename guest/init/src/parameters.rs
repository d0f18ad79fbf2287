//! The `casemate.*` parameters of the kernel command line.

use crate::{Error, say};

/// Block device of the root file system, such as `/dev/vda`.
pub const ROOT: &str = "casemate.root";
/// Its file system type.
pub const ROOT_FS_TYPE: &str = "casemate.rootfstype";
/// `1`: the root is read-only below a writable overlay in memory.
pub const OVERLAY: &str = "casemate.overlay";

/// Block device with an ext4 that takes the overlay's writes, instead of memory.
pub const UPPER: &str = "casemate.upper";

/// What the host asked for on the kernel command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Parameters {
    /// [`ROOT`].
    pub root: Option<String>,
    /// [`ROOT_FS_TYPE`]; `erofs` when absent.
    pub root_fs_type: String,
    /// [`OVERLAY`]; off when absent.
    pub overlay: bool,
    /// [`UPPER`].
    pub upper: Option<String>,
}

impl Parameters {
    /// Reads `/proc/cmdline`.
    pub fn read() -> Result<Self, Error> {
        let line = std::fs::read_to_string("/proc/cmdline")
            .map_err(|error| Error::other(format!("cannot read /proc/cmdline: {error}")))?;
        Ok(Self::parse(&line))
    }

    /// Picks our parameters out of a command line; the last one of a name counts, as for the kernel.
    pub fn parse(line: &str) -> Self {
        let mut parameters = Self {
            root: None,
            root_fs_type: "erofs".into(),
            overlay: false,
            upper: None,
        };
        // What follows a lone "--" is for init as arguments, not parameters; we take none.
        for word in line
            .split_ascii_whitespace()
            .take_while(|word| *word != "--")
        {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match name {
                ROOT => parameters.root = Some(value.into()),
                ROOT_FS_TYPE => parameters.root_fs_type = value.into(),
                OVERLAY => parameters.overlay = value == "1",
                UPPER => parameters.upper = Some(value.into()),
                _ if name.starts_with("casemate.") => {
                    say(&format!("unknown parameter {word:?} ignored"))
                }
                _ => {}
            }
        }
        parameters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picks_ours() {
        let line = "console=ttyS0 quiet casemate.root=/dev/vda casemate.rootfstype=ext4 casemate.overlay=1 casemate.upper=/dev/vdc -- casemate.root=x\n";
        let want = Parameters {
            root: Some("/dev/vda".into()),
            root_fs_type: "ext4".into(),
            overlay: true,
            upper: Some("/dev/vdc".into()),
        };
        assert_eq!(Parameters::parse(line), want);
        let none = Parameters {
            root: None,
            root_fs_type: "erofs".into(),
            overlay: false,
            upper: None,
        };
        assert_eq!(Parameters::parse("casemate.rooty=1 casemate.overlay"), none);
    }
}

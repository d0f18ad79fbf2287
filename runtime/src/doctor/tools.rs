//! Programs and devices that are used beside KVM.

use std::path::PathBuf;

use serde::Serialize;

use super::host::Root;
use super::{Finding, Level};
use crate::places::Places;
use crate::rootfs;

/// What was found.
#[derive(Debug, Serialize)]
pub struct ToolFacts {
    jailer: Option<PathBuf>,
    vmm: Option<PathBuf>,
    mkfs_erofs: Option<PathBuf>,
    tun: bool,
    root: bool,
}

/// Our own programs, mkfs.erofs, /dev/net/tun, root.
pub fn collect(root: &Root, findings: &mut Vec<Finding>) -> ToolFacts {
    let places = Places::from_env();
    let mut program = |name: &'static str| match places.program(name) {
        Ok(path) => {
            findings.push(Finding::new(
                name,
                Level::Good,
                path.display().to_string(),
                "`casemate run` uses this one.",
            ));
            Some(path)
        }
        Err(error) => {
            findings.push(
                Finding::new(name, Level::Bad, "not found", "Nothing can be run.")
                    .mend(&error.to_string()),
            );
            None
        }
    };
    let jailer = program("casemate-jailer");
    let vmm = program("casemate-vmm");

    let mkfs_erofs = rootfs::find_mkfs();
    findings.push(match &mkfs_erofs {
        Some(path) => Finding::new(
            "mkfs.erofs",
            Level::Good,
            path.display().to_string(),
            "Directories can be given as --rootfs.",
        ),
        None => Finding::new(
            "mkfs.erofs",
            Level::Bad,
            "not found",
            "Directories cannot be given as --rootfs; images can.",
        )
        .mend("apt install erofs-utils"),
    });

    let tun = root.exists("/dev/net/tun");
    findings.push(if tun {
        Finding::new(
            "tun",
            Level::Good,
            "/dev/net/tun",
            "Guests can have network interfaces (--net).",
        )
    } else {
        Finding::new(
            "tun",
            Level::Note,
            "no /dev/net/tun",
            "Guests cannot have network interfaces (--net).",
        )
        .mend("modprobe tun")
    });

    let is_root = nix::unistd::geteuid().is_root();
    findings.push(if is_root {
        Finding::new(
            "privileges",
            Level::Good,
            "root",
            "The jailer can build a jail.",
        )
    } else {
        Finding::new(
            "privileges",
            Level::Bad,
            "not root",
            "The jailer cannot build a jail.",
        )
        .mend("run casemate as root: the machine itself runs without privileges")
    });
    ToolFacts {
        jailer,
        vmm,
        mkfs_erofs,
        tun,
        root: is_root,
    }
}

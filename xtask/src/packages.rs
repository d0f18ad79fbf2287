//! Debian packages: installing what a task needs, and downloading kernels without installing them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::workspace::{lock, say};

/// A program that a task needs, and the package that has it.
pub struct Need {
    /// The file whose presence proves that the package is there: any of these will do.
    pub files: &'static [&'static str],
    /// Debian's name of the package.
    pub package: &'static str,
    /// What it is needed for, as the end of "installing PACKAGE: ".
    pub reason: &'static str,
}

/// QEMU: the lab, and the peer in the benchmark.
pub const QEMU: Need = Need {
    files: &["/usr/bin/qemu-system-x86_64"],
    package: "qemu-system-x86",
    reason: "the lab is a machine that it emulates",
};
/// A static busybox: root file systems of test guests, and the lab's modprobe.
pub const BUSYBOX: Need = Need {
    files: &["/bin/busybox", "/usr/bin/busybox"],
    package: "busybox-static",
    reason: "test guests need a root file system",
};
/// `mkfs.erofs`, with which `casemate run --rootfs DIR` makes an image.
pub const EROFS: Need = Need {
    files: &["/usr/bin/mkfs.erofs"],
    package: "erofs-utils",
    reason: "a guest's root file system becomes an erofs image",
};
/// `ip`, with which the tests make taps and network namespaces of their own.
pub const IPROUTE: Need = Need {
    files: &["/usr/bin/ip", "/usr/sbin/ip", "/sbin/ip", "/bin/ip"],
    package: "iproute2",
    reason: "tests of network devices make taps in namespaces",
};
/// `mkfs.ext4`, for a root file system that is an image.
pub const EXT4: Need = Need {
    files: &["/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"],
    package: "e2fsprogs",
    reason: "a test boots from an ext4 image",
};
/// gdb, in its smallest form.
pub const GDB: Need = Need {
    files: &["/usr/bin/gdb"],
    package: "gdb-minimal",
    reason: "a test debugs a guest",
};
/// `xz`, with which a distribution may have compressed its modules.
pub const XZ: Need = Need {
    files: &["/usr/bin/xz"],
    package: "xz-utils",
    reason: "the lab kernel's modules are compressed with it",
};
/// `zstd`, likewise.
pub const ZSTD: Need = Need {
    files: &["/usr/bin/zstd"],
    package: "zstd",
    reason: "the lab kernel's modules are compressed with it",
};

/// Python with what makes environments: a bare `python3` has `venv`, but no pip to put into one.
pub const PYTHON_VENV: Need = Need {
    files: &[
        "/usr/lib/python3.11/ensurepip",
        "/usr/lib/python3.12/ensurepip",
        "/usr/lib/python3.13/ensurepip",
        "/usr/lib/python3.14/ensurepip",
    ],
    package: "python3-venv",
    reason: "real clients of the API are Python programs",
};
/// Python's nftables, with which an SDK makes the rules of a machine's network.
pub const PYTHON_NFTABLES: Need = Need {
    files: &["/usr/lib/python3/dist-packages/nftables"],
    package: "python3-nftables",
    reason: "an SDK that drives the VMM makes nftables rules",
};

/// Installs those packages of `needs` that are missing.
///
/// # Errors
/// When something is missing and cannot be installed: the message says what to install by hand.
pub fn install(needs: &[&Need]) -> Result<()> {
    if missing(needs).is_empty() {
        return Ok(());
    }
    // apt refuses to run twice at once; what another run installs meanwhile is no longer missing.
    let _lock = lock("packages")?;
    let missing = missing(needs);
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|need| need.package).collect();
    let by_hand = format!("install by hand: apt-get install {}", names.join(" "));
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!(
            "missing {} and no apt-get here; {by_hand} (or its like)",
            names.join(", ")
        );
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "missing {}, and only root can install it; {by_hand}",
            names.join(", ")
        );
    }
    for need in &missing {
        say(format_args!("installing {}: {}", need.package, need.reason));
    }
    let install = |quiet: bool| {
        let mut apt = Command::new("apt-get");
        // Another apt may be at work on a machine that was just started.
        apt.args(["-o", "DPkg::Lock::Timeout=300"]);
        apt.args(["install", "--yes", "--no-install-recommends", "-qq"])
            .args(&names);
        apt.env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if quiet {
            apt.stderr(Stdio::null());
        }
        apt.status().context("run apt-get install")
    };
    // A fresh machine has no package lists, or old ones: fetch them only when that shows.
    if install(true)?.success() {
        return Ok(());
    }
    update_lists()?;
    if !install(false)?.success() {
        bail!("apt-get could not install {}; {by_hand}", names.join(", "));
    }
    Ok(())
}

fn missing<'a>(needs: &[&'a Need]) -> Vec<&'a Need> {
    let is_missing = |need: &&Need| !need.files.iter().any(|file| Path::new(file).exists());
    needs.iter().copied().filter(is_missing).collect()
}

fn update_lists() -> Result<()> {
    say("fetching the package lists (apt-get update)");
    let status = Command::new("apt-get")
        .args(["update", "-qq"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("run apt-get update")?;
    if !status.success() {
        bail!("apt-get update failed: {status}; is the package mirror reachable?");
    }
    Ok(())
}

/// Which of Debian's kernels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flavour {
    /// `linux-image-amd64`: every driver, 9p among them. The lab's kernel.
    Generic,
    /// `linux-image-cloud-amd64`: small, boots faster. The guests' kernel.
    Cloud,
}

impl Flavour {
    fn metapackage(self) -> &'static str {
        match self {
            Self::Generic => "linux-image-amd64",
            Self::Cloud => "linux-image-cloud-amd64",
        }
    }

    fn matches(self, file: &str) -> bool {
        file.starts_with("linux-image-")
            && file.ends_with(".deb")
            && file.contains("amd64_")
            && !file.contains("-rt-")
            && file.contains("-cloud-") == (self == Self::Cloud)
    }
}

/// The `.deb` of a kernel in `dir`, downloaded (never installed) when it is not there yet.
///
/// # Errors
/// When it has to be downloaded and apt cannot.
pub fn kernel_deb(flavour: Flavour, dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    if let Some(found) = newest_deb(flavour, dir)? {
        return Ok(found);
    }
    let _lock = lock("packages")?;
    // Another run may have had it.
    if let Some(found) = newest_deb(flavour, dir)? {
        return Ok(found);
    }
    // Old lists name a version that the mirror has no more.
    if !download(flavour, dir)? {
        update_lists()?;
        if !download(flavour, dir)? {
            bail!(
                "apt-get could not download {}'s kernel; {}",
                flavour.metapackage(),
                by_hand(dir)
            );
        }
    }
    newest_deb(flavour, dir)?.with_context(|| format!("no kernel package in {}", dir.display()))
}

/// What to do where apt does not have the package: on Ubuntu, for one, whose packages are others.
fn by_hand(dir: &Path) -> String {
    format!(
        "put a linux-image-*.deb of Debian's into {} (`cargo xtask demo --kernel FILE` takes any kernel for its guest)",
        dir.display()
    )
}

/// Downloads beside `dir`'s packages and renames when complete: an interrupted run leaves none that is cut.
fn download(flavour: Flavour, dir: &Path) -> Result<bool> {
    let package = concrete_package(flavour, dir)?;
    say(format_args!(
        "downloading {package} (to be unpacked, not installed)"
    ));
    let partial = tempfile::Builder::new()
        .prefix(".downloading-")
        .tempdir_in(dir)?;
    let status = Command::new("apt-get")
        // Else apt complains that its own user cannot write to this directory.
        .args(["-o", "APT::Sandbox::User=root", "-qq", "download", &package])
        .current_dir(partial.path())
        .stdin(Stdio::null())
        .status()
        .context("run apt-get download")?;
    let Some(deb) = newest_deb(flavour, partial.path())?.filter(|_| status.success()) else {
        return Ok(false);
    };
    let name = deb.file_name().context("a package without a name")?;
    fs::rename(&deb, dir.join(name)).with_context(|| format!("rename {}", deb.display()))?;
    Ok(true)
}

fn newest_deb(flavour: Flavour, dir: &Path) -> Result<Option<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        if flavour.matches(&entry.file_name().to_string_lossy()) {
            found.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    found.sort();
    Ok(found.pop().map(|(_, path)| path))
}

/// The package that the metapackage depends on: `linux-image-6.1.0-56-amd64` and the like.
fn concrete_package(flavour: Flavour, dir: &Path) -> Result<String> {
    let metapackage = flavour.metapackage();
    let look_up = || -> Result<Option<String>> {
        let output = Command::new("apt-cache")
            .args(["depends", "--important", metapackage])
            .stderr(Stdio::null())
            .output()
            .with_context(|| format!("run apt-cache; {}", by_hand(dir)))?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"))
            .map(str::to_owned))
    };
    if let Some(name) = look_up()? {
        return Ok(name);
    }
    update_lists()?;
    look_up()?.with_context(|| {
        format!(
            "apt knows no package {metapackage}, Debian's; {}",
            by_hand(dir)
        )
    })
}

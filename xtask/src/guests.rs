//! Linux guests for the demo and the tests: a registered kernel and a small root file system.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::artifacts::Artifacts;
use crate::packages::{self, Flavour};
use crate::workspace::{kernels_dir, root, say};

/// Registers a distribution's kernel with `casemate kernel add`, unless it is registered already.
/// `data` is the `CASEMATE_DATA_DIR`; the kernel's name there is returned.
///
/// # Errors
/// When it cannot be downloaded or registered.
pub fn register(artifacts: &Artifacts, data: &Path, flavour: Flavour) -> Result<&'static str> {
    let name = match flavour {
        Flavour::Generic => "generic",
        Flavour::Cloud => "cloud",
    };
    if !data.join("kernels").join(name).exists() || is_outdated(artifacts, data, name)? {
        let deb = packages::kernel_deb(flavour, &kernels_dir())?;
        add(artifacts, data, name, &["--deb"], &deb)?;
    }
    Ok(name)
}

/// Whether a registered kernel lacks drivers that machines have come to need since.
fn is_outdated(artifacts: &Artifacts, data: &Path, name: &str) -> Result<bool> {
    let output = Command::new(artifacts.program("casemate"))
        .env("CASEMATE_DATA_DIR", data)
        .args(["kernel", "ls", "--json"])
        .output()
        .context("run casemate kernel ls")?;
    let kernels: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("read what casemate kernel ls says")?;
    let kernels = kernels.as_array().map(Vec::as_slice).unwrap_or_default();
    let kernel = kernels.iter().find(|kernel| kernel["name"] == name);
    Ok(kernel.is_some_and(|kernel| kernel["outdated"] == true))
}

/// The bzImage in the cloud kernel's package, unpacked to `file` unless it is there.
///
/// # Errors
/// When the package cannot be downloaded or unpacked.
pub fn bzimage(file: &Path) -> Result<()> {
    if file.exists() {
        return Ok(());
    }
    let deb = packages::kernel_deb(Flavour::Cloud, &kernels_dir())?;
    let parent = file.parent().context("no parent directory")?;
    fs::create_dir_all(parent)?;
    let partial = tempfile::Builder::new()
        .prefix(".bzimage-")
        .tempdir_in(parent)?;
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("-x").arg(&deb).arg(partial.path());
    crate::artifacts::run(&mut unpack)?;
    let boot = partial.path().join("boot");
    for entry in fs::read_dir(&boot).with_context(|| format!("read {}", boot.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("vmlinuz-") {
            return fs::rename(entry.path(), file)
                .with_context(|| format!("rename to {}", file.display()));
        }
    }
    bail!("{} holds no kernel", deb.display())
}

/// Has both of Debian's packages where `runtime/tests/kernel.rs` looks for them: in the checkout's `target/kernels`.
///
/// # Errors
/// When one cannot be downloaded, or the directory cannot be made.
pub fn packages_for_tests() -> Result<()> {
    for flavour in [Flavour::Generic, Flavour::Cloud] {
        packages::kernel_deb(flavour, &kernels_dir())?;
    }
    let there = root().join("target/kernels");
    if !there.exists() {
        // CARGO_TARGET_DIR is elsewhere.
        fs::create_dir_all(root().join("target"))?;
        symlink(kernels_dir(), &there).with_context(|| format!("link {}", there.display()))?;
    }
    Ok(())
}

/// Registers a kernel file anew, as `name`.
///
/// # Errors
/// When `casemate kernel add` refuses it.
pub fn register_file(artifacts: &Artifacts, data: &Path, name: &str, file: &Path) -> Result<()> {
    if data.join("kernels").join(name).exists() {
        casemate_kernel(artifacts, data, &["rm", name])?;
    }
    add(artifacts, data, name, &[], file)
}

fn add(artifacts: &Artifacts, data: &Path, name: &str, option: &[&str], file: &Path) -> Result<()> {
    say(format_args!(
        "registering {} as the guest kernel `{name}`",
        file.display()
    ));
    fs::create_dir_all(data).with_context(|| format!("create {}", data.display()))?;
    let file = file
        .to_str()
        .with_context(|| format!("{} is not UTF-8", file.display()))?;
    let words: Vec<&str> = ["add", "--name", name]
        .iter()
        .chain(option)
        .chain(&[file])
        .copied()
        .collect();
    casemate_kernel(artifacts, data, &words)
}

fn casemate_kernel(artifacts: &Artifacts, data: &Path, words: &[&str]) -> Result<()> {
    let status = Command::new(artifacts.program("casemate"))
        .env("CASEMATE_DATA_DIR", data)
        .arg("kernel")
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("run casemate kernel")?;
    if !status.success() {
        bail!("casemate kernel {} failed ({status})", words.join(" "));
    }
    Ok(())
}

/// Makes a root file system of nothing but a static busybox at `dir`, unless it is there.
///
/// # Errors
/// When busybox is not static or something cannot be written.
pub fn busybox_rootfs(dir: &Path) -> Result<()> {
    packages::install(&[&packages::BUSYBOX])?;
    if dir.exists() {
        return Ok(());
    }
    let busybox = packages::BUSYBOX
        .files
        .iter()
        .map(PathBuf::from)
        .find(|path| path.exists());
    let busybox = busybox.context("no busybox")?;
    let parent = dir.parent().context("no parent directory")?;
    fs::create_dir_all(parent)?;
    let partial = tempfile::Builder::new()
        .prefix(".rootfs-")
        .tempdir_in(parent)?;
    for name in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp"] {
        fs::create_dir(partial.path().join(name))?;
    }
    let bin = partial.path().join("bin");
    fs::copy(&busybox, bin.join("busybox"))?;
    let applets = Command::new(&busybox)
        .arg("--list")
        .output()
        .context("run busybox --list")?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines() {
        if applet != "busybox" {
            symlink("busybox", bin.join(applet)).with_context(|| format!("link {applet}"))?;
        }
    }
    fs::write(
        partial.path().join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\n",
    )?;
    fs::write(partial.path().join("etc/group"), "root:x:0:\n")?;
    fs::rename(partial.keep(), dir).with_context(|| format!("rename to {}", dir.display()))
}

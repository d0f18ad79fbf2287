//! The lab's kernel: Debian's generic package, unpacked under the target directory.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::packages::{self, Flavour};
use crate::workspace::{kernels_dir, lock, say};

/// A kernel's image is some 60 MiB.
const MAX_IMAGE: u64 = 512 << 20;

/// An unpacked kernel package.
pub struct LabKernel {
    /// The ELF image, as QEMU's `-kernel` boots it by the PVH protocol.
    pub image: PathBuf,
    /// `…/lib/modules/RELEASE`.
    pub modules: PathBuf,
}

/// Gets the lab's kernel ready: downloads and unpacks it the first time.
///
/// # Errors
/// When it cannot be downloaded, unpacked or read.
pub fn lab_kernel() -> Result<LabKernel> {
    let deb = packages::kernel_deb(Flavour::Generic, &kernels_dir())?;
    let name = deb.file_stem().context("a kernel package without a name")?;
    let place = kernels_dir().join(name);
    if !place.exists() {
        let _lock = lock("unpacking")?;
        // Another run may have done it.
        if !place.exists() {
            unpack(&deb, &place)?;
        }
    }
    let modules = only_entry(&place.join("lib/modules"))?;
    Ok(LabKernel {
        image: place.join("vmlinux"),
        modules,
    })
}

/// Unpacks `deb` beside `place` and renames it there when complete, so that an interrupted run
/// leaves nothing half done.
fn unpack(deb: &Path, place: &Path) -> Result<()> {
    packages::install(&[&packages::BUSYBOX])?;
    say(format_args!("unpacking {}", deb.display()));
    let parent = place.parent().context("no parent directory")?;
    let partial = tempfile::Builder::new()
        .prefix(".unpacking-")
        .tempdir_in(parent)?;
    run(Command::new("dpkg-deb")
        .arg("-x")
        .arg(deb)
        .arg(partial.path()))?;
    let boot = partial.path().join("boot");
    // Where Debian 13 has them.
    let merged = partial.path().join("usr/lib/modules");
    if merged.exists() {
        fs::create_dir_all(partial.path().join("lib"))?;
        fs::rename(&merged, partial.path().join("lib/modules"))?;
    }
    let release = only_entry(&partial.path().join("lib/modules"))?;
    let release = release.file_name().context("no kernel release")?;
    let bzimage = boot.join(format!("vmlinuz-{}", release.to_string_lossy()));
    unpack_payload(&bzimage, &partial.path().join("vmlinux"))?;
    decompress_modules(&partial.path().join("lib/modules"))?;
    // `modprobe` in the lab needs the index that the package's own installation would make.
    run(Command::new("busybox")
        .arg("depmod")
        .arg("-b")
        .arg(partial.path())
        .arg(release))?;
    fs::remove_dir_all(&boot)?;
    fs::rename(partial.path(), place).with_context(|| format!("rename to {}", place.display()))?;
    let _ = partial.keep();
    Ok(())
}

/// Debian compresses modules since version 13, Ubuntu does it otherwise; busybox's depmod and
/// modprobe read neither for sure.
fn decompress_modules(modules: &Path) -> Result<()> {
    for (ending, need, program) in [
        ("xz", &packages::XZ, &["xz", "-d"][..]),
        ("zst", &packages::ZSTD, &["zstd", "-d", "-q", "--rm"]),
    ] {
        let pattern = format!("*.ko.{ending}");
        let find = || {
            let mut find = Command::new("find");
            find.arg(modules)
                .args(["-type", "f", "-name", pattern.as_str()]);
            find
        };
        let first = find().args(["-print", "-quit"]).output();
        if first.context("run find")?.stdout.is_empty() {
            continue;
        }
        packages::install(&[need])?;
        run(find().arg("-exec").args(program).args(["{}", "+"]))?;
    }
    Ok(())
}

/// Takes the ELF image out of a bzImage.
///
/// QEMU boots the ELF by PVH; the bzImage's own unpacking would take long under emulation.
fn unpack_payload(bzimage: &Path, image: &Path) -> Result<()> {
    let source = File::open(bzimage).with_context(|| format!("open {}", bzimage.display()))?;
    let mut output = BufWriter::new(File::create(image)?);
    casemate_kernel_image::unpack(&source, MAX_IMAGE, &mut output)
        .with_context(|| format!("unpack {}", bzimage.display()))?;
    output
        .flush()
        .with_context(|| format!("write {}", image.display()))
}

fn only_entry(dir: &Path) -> Result<PathBuf> {
    let first = fs::read_dir(dir)
        .with_context(|| format!("read {}", dir.display()))?
        .next();
    Ok(first
        .with_context(|| format!("{} is empty", dir.display()))??
        .path())
}

fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("run {command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

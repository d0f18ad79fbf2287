//! The lab's initrd: this very program as `/init`, and the modules it loads.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// What the lab needs before it can see the host's files, and KVM; in an order that loads.
const MODULES: [&str; 17] = [
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_console",
    "netfs",
    "fscache",
    "9pnet",
    "9pnet_virtio",
    "9p",
    "overlay",
    "irqbypass",
    "ccp",
    "kvm",
    "kvm-amd",
];

/// Writes the initrd, a `newc` cpio archive (Linux, Documentation/driver-api/early-userspace/
/// buffer-format.rst), with the modules of `modules` (`…/lib/modules/RELEASE`).
///
/// # Errors
/// When a module is missing or something cannot be read or written.
pub fn write(to: &Path, modules: &Path) -> Result<()> {
    let mut archive = Archive {
        out: io::BufWriter::new(fs::File::create(to)?),
        inode: 1,
    };
    for dir in ["dev", "proc", "sys", "run", "host", "root", "modules"] {
        archive.entry(dir, 0o040_755, &[])?;
    }
    archive.entry(
        "init",
        0o100_755,
        &fs::read("/proc/self/exe").context("read this program")?,
    )?;
    for (index, name) in MODULES.iter().enumerate() {
        let path = find_module(modules, name)?;
        let plain = match path.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => unpacked("xz", &path)?,
            Some("zst") => unpacked("zstd", &path)?,
            _ => fs::read(&path).with_context(|| format!("read {}", path.display()))?,
        };
        archive.entry(&format!("modules/{index:02}-{name}"), 0o100_644, &plain)?;
    }
    archive.entry("TRAILER!!!", 0, &[])?;
    archive.out.flush()?;
    Ok(())
}

/// The file of a module, by the package's own list of paths. Compressed ones count too.
fn find_module(modules: &Path, name: &str) -> Result<PathBuf> {
    let list = modules.join("modules.order");
    let list = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
    let relative = list
        .lines()
        .find(|line| {
            let file = line.rsplit('/').next().unwrap_or(line);
            file.split('.').next() == Some(name)
        })
        .with_context(|| format!("the kernel in {} has no module {name}", modules.display()))?;
    let stem = relative.split(".ko").next().unwrap_or(relative);
    ["ko", "ko.xz", "ko.zst"]
        .iter()
        .map(|extension| modules.join(format!("{stem}.{extension}")))
        .find(|path| path.exists())
        .with_context(|| format!("no file for module {name} in {}", modules.display()))
}

fn unpacked(program: &str, path: &Path) -> Result<Vec<u8>> {
    let output = Command::new(program).arg("-dc").arg(path).output()?;
    anyhow::ensure!(
        output.status.success(),
        "{program} could not unpack {}",
        path.display()
    );
    Ok(output.stdout)
}

struct Archive<W: Write> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        write!(self.out, "070701")?;
        // ino, mode, uid, gid, nlink, mtime, filesize, dev ×2, rdev ×2, namesize, check
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            write!(self.out, "{field:08x}")?;
        }
        self.inode += 1;
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        // The header is 110 bytes; name and content are each padded to four.
        self.pad(110 + name.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, length: usize) -> io::Result<()> {
        let padding = length.next_multiple_of(4) - length;
        self.out.write_all(&[0; 3][..padding])
    }
}

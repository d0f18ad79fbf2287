//! The lab's initrd: this very program as `/init`, and the modules it loads.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};

/// What the lab needs before it can see the host's files, and KVM. What these need in turn differs from one kernel to
/// the next and is read from its index.
const MODULES: [&str; 6] = [
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "kvm_amd",
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
    let read = |name: &str| {
        let path = modules.join(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    let dependencies = read("modules.dep")?;
    let files = load_order(&dependencies, &read("modules.builtin")?)
        .with_context(|| format!("the kernel in {}", modules.display()))?;
    for (index, file) in files.iter().enumerate() {
        let path = modules.join(file);
        let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let name = format!("modules/{index:02}-{}", module_name(file));
        archive.entry(&name, 0o100_644, &content)?;
    }
    archive.entry("TRAILER!!!", 0, &[])?;
    archive.out.flush()?;
    Ok(())
}

/// The files of [`MODULES`] and of all that they need, each after what it needs, by the index `modules.dep` (lines
/// `FILE: FILE…`). What is built into the kernel (`modules.builtin`, a file a line) needs none.
fn load_order<'a>(dependencies: &'a str, builtin: &str) -> Result<Vec<&'a str>> {
    let index: BTreeMap<&str, &str> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .collect();
    let builtin: HashSet<String> = builtin.lines().map(module_name).collect();
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    for name in MODULES {
        if builtin.contains(name) {
            continue;
        }
        let Some(file) = index.keys().find(|file| module_name(file) == name) else {
            bail!(
                "it has no module {name}, and not built in either: the lab needs Debian's generic kernel"
            );
        };
        visit(file, &index, &mut seen, &mut order)?;
    }
    Ok(order)
}

fn visit<'a>(
    file: &'a str,
    index: &BTreeMap<&'a str, &'a str>,
    seen: &mut HashSet<&'a str>,
    order: &mut Vec<&'a str>,
) -> Result<()> {
    if !seen.insert(file) {
        return Ok(());
    }
    let needs = index
        .get(file)
        .with_context(|| format!("its modules.dep has no line for {file}"))?;
    for need in needs.split_whitespace() {
        visit(need, index, seen, order)?;
    }
    order.push(file);
    Ok(())
}

/// `kvm_amd` for `kernel/arch/x86/kvm/kvm-amd.ko`: the kernel takes both spellings for one.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    let name = name.split('.').next().unwrap_or(name);
    name.replace('-', "_")
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

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio.ko\n\
        kernel/drivers/virtio/virtio.ko:\n\
        kernel/drivers/char/virtio_console.ko: kernel/drivers/virtio/virtio.ko\n\
        kernel/net/9p/9pnet.ko:\n\
        kernel/net/9p/9pnet_virtio.ko: kernel/net/9p/9pnet.ko kernel/drivers/virtio/virtio.ko\n\
        kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/netfs/netfs.ko\n\
        kernel/fs/netfs/netfs.ko:\n\
        kernel/arch/x86/kvm/kvm-amd.ko: kernel/arch/x86/kvm/kvm.ko\n\
        kernel/arch/x86/kvm/kvm.ko:\n";

    #[test]
    fn each_module_comes_after_what_it_needs() {
        // No fscache: Linux 6.8 merged it into netfs.
        let order = load_order(INDEX, "kernel/fs/overlayfs/overlay.ko\n").unwrap();
        let names: Vec<_> = order.iter().map(|file| module_name(file)).collect();
        assert_eq!(
            names,
            [
                "virtio",
                "virtio_pci",
                "virtio_console",
                "9pnet",
                "9pnet_virtio",
                "netfs",
                "9p",
                "kvm",
                "kvm_amd"
            ]
        );
    }

    #[test]
    fn a_kernel_without_a_driver_is_refused_by_its_name() {
        let error = load_order(INDEX, "").unwrap_err();
        assert!(error.to_string().contains("overlay"), "{error}");
    }
}

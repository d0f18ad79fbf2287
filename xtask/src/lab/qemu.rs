//! The lab's machine: QEMU's software emulator with AMD's virtualization emulated in it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use super::wire::PORT;
use crate::kernels::LabKernel;
use crate::packages::QEMU;

/// A busy host does not run the machine for a while now and then: without `no_timer_check` the
/// kernel, which counts ticks early in its boot, once found none and panicked.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 no_timer_check rdinit=/init";

/// Starts the machine and returns the host's end of its port.
///
/// One CPU: with two, a nested guest with two vCPUs hung the whole lab. q35 with an HPET: the
/// `microvm` type lost its timer tick in about half of the boots.
///
/// # Errors
/// When QEMU or setpriv cannot be run.
pub fn start(
    kernel: &LabKernel,
    initrd: &Path,
    log: &Path,
    memory: u32,
) -> Result<(Child, UnixStream)> {
    let program = QEMU.files.first().context("no QEMU named")?;
    let (ours, theirs) = UnixStream::pair()?;
    let port = format!("virtserialport,chardev=wire,name={PORT}");
    // The kernel ends QEMU when this process dies, however it dies.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", program])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-M",
            "q35,hpet=on",
            "-accel",
            "tcg",
            "-smp",
            "1",
        ])
        .args(["-cpu", "max,+svm,la57=off", "-m", &memory.to_string()])
        .args(nodes(memory))
        .args(["-vga", "none", "-display", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", COMMAND_LINE])
        .arg("-chardev")
        .arg(option("file,id=console,path=", log)?)
        .args(["-serial", "chardev:console"])
        .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
        // Its standard input is the socket: no path, and no descriptor that others could inherit.
        .args(["-chardev", "socket,id=wire,fd=0", "-device", &port])
        .arg("-fsdev")
        .arg("local,id=host,path=/,security_model=none,readonly=on,multidevs=remap")
        .args(["-device", "virtio-9p-pci,fsdev=host,mount_tag=host"])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null());
    let child = command
        .spawn()
        .context("run setpriv (util-linux) with QEMU")?;
    Ok((child, ours))
}

/// Two NUMA nodes with half of the memory each; the CPU is in the first.
fn nodes(memory: u32) -> Vec<String> {
    let first = memory / 2;
    let mut words = Vec::new();
    for (number, (size, cpus)) in [(first, ",cpus=0"), (memory.saturating_sub(first), "")]
        .into_iter()
        .enumerate()
    {
        words.push("-object".to_owned());
        words.push(format!("memory-backend-ram,id=node{number},size={size}M"));
        words.push("-numa".to_owned());
        words.push(format!("node,nodeid={number},memdev=node{number}{cpus}"));
    }
    words
}

/// A QEMU option with a path in it: a comma there is written twice.
fn option(before: &str, path: &Path) -> Result<String> {
    let Some(path) = path.to_str() else {
        bail!("{} is not UTF-8", path.display())
    };
    Ok(format!("{before}{}", path.replace(',', ",,")))
}

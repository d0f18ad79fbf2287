//! What is measured: each contestant runs the same probe guest, 128 MiB, one vCPU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::artifacts::Artifacts;
use crate::packages::QEMU;

/// The guests' memory, where nothing else is said.
pub const MEMORY_MIB: u32 = 128;

/// What the guest is told.
#[derive(Clone, Copy)]
pub enum Task {
    /// Say a line and reset.
    Boot,
    /// Say a line and halt for good.
    Idle,
    /// Never stop talking.
    Chatter,
    /// Write to memory and say a dot for each millisecond, for good.
    Dirty,
}

impl Task {
    /// A kernel command line. `end` is how the guest ends the machine.
    fn command_line(self, end: &str) -> String {
        match self {
            // Firecracker has a serial port only for guests that name a console.
            Self::Boot => format!("console=ttyS0 acpi=off probe.task=boot probe.end={end}"),
            Self::Idle => "idle console=ttyS0 acpi=off".to_owned(),
            Self::Chatter => "console=ttyS0 acpi=off probe.task=chatter".to_owned(),
            Self::Dirty => "console=ttyS0 acpi=off probe.task=dirty".to_owned(),
        }
    }

    /// What the guest then says.
    pub fn expected(self) -> &'static str {
        match self {
            Self::Boot => "probe: boot ok",
            Self::Idle => "probe: idle",
            Self::Chatter => "probe: chatter",
            Self::Dirty => "probe: dirty",
        }
    }
}

/// An uid that no account has: the one of jailed machines here.
pub const UID: &str = "950999";

/// Firecracker logs to the standard output that is also its guest's console, and loses some of that
/// then.
pub const QUIET: [&str; 2] = ["--level", "Off"];

/// One program, or a pair of them.
pub enum Contestant {
    /// Our VMM.
    Vmm,
    /// Our VMM in its jail.
    Jailed,
    /// Firecracker.
    Firecracker(PathBuf),
    /// Firecracker in its jail.
    FirecrackerJailed {
        /// Its jailer.
        jailer: PathBuf,
        /// The VMM.
        vmm: PathBuf,
    },
    /// QEMU's microvm machine.
    Qemu,
}

impl Contestant {
    /// Its name in the table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Vmm => "casemate-vmm",
            Self::Jailed => "casemate-jailer + casemate-vmm",
            Self::Firecracker(_) => "Firecracker",
            Self::FirecrackerJailed { .. } => "Firecracker's jailer + Firecracker",
            Self::Qemu => "QEMU microvm",
        }
    }

    /// The command that starts it. What has to exist beforehand is made in `dir`, outside the
    /// timed part, and `id` is the machine's.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn prepare(
        &self,
        artifacts: &Artifacts,
        dir: &Path,
        id: &str,
        task: Task,
    ) -> Result<Command> {
        let probe = artifacts.probe();
        Ok(match self {
            Self::Vmm => {
                let mut command = Command::new(artifacts.program("casemate-vmm"));
                let config = write_config(dir, id, &probe, task)?;
                command
                    .args(["--no-api", "--id", id, "--config-file"])
                    .arg(config);
                command
            }
            Self::Jailed => {
                let mut command = Command::new(artifacts.program("casemate-jailer"));
                let config = write_config(dir, id, &probe, task)?;
                command.args(["--id", id, "--uid", UID, "--gid", UID, "--exec-file"]);
                command.arg(artifacts.program("casemate-vmm"));
                command
                    .arg("--grant-ro")
                    .arg(format!("config={}", text(&config)?));
                command.arg("--grant-ro").arg(&probe);
                command.args(["--", "--no-api", "--config-file", "config"]);
                command
            }
            Self::Firecracker(vmm) => {
                let mut command = Command::new(vmm);
                let config = write_config(dir, id, &probe, task)?;
                command
                    .args(["--no-api", "--id", id, "--config-file"])
                    .arg(config)
                    .args(QUIET);
                command
            }
            Self::FirecrackerJailed { jailer, vmm } => {
                // Its jail is a directory that must hold the machine's files before the start.
                let name = vmm
                    .file_name()
                    .context("no name of Firecracker's program")?;
                let root = dir.join(name).join(id).join("root");
                fs::create_dir_all(&root)?;
                fs::hard_link(&probe, root.join("probe"))
                    .or_else(|_| fs::copy(&probe, root.join("probe")).map(drop))?;
                let config = config(Path::new("/probe"), task, MEMORY_MIB)?;
                fs::write(root.join("config.json"), config)?;
                let mut command = Command::new(jailer);
                command
                    .args(["--id", id, "--uid", UID, "--gid", UID, "--exec-file"])
                    .arg(vmm);
                command.arg("--chroot-base-dir").arg(dir);
                command.args(["--", "--no-api", "--config-file", "config.json"]);
                command.args(QUIET);
                command
            }
            Self::Qemu => qemu(&probe, task)?,
        })
    }

    /// Removes what one start left in `dir`.
    pub fn clean(&self, dir: &Path, id: &str) {
        // Nothing depends on it: `dir` as a whole is temporary.
        let _ = fs::remove_file(dir.join(format!("{id}.json")));
        if let Self::FirecrackerJailed { vmm, .. } = self {
            let _ = fs::remove_dir_all(dir.join(vmm.file_name().unwrap_or_default()).join(id));
        }
    }
}

/// A machine's config file.
///
/// # Errors
/// When the kernel's name is not UTF-8.
pub fn config(kernel: &Path, task: Task, memory_mib: u32) -> Result<Vec<u8>> {
    let config = json!({
        "boot-source": { "kernel_image_path": text(kernel)?, "boot_args": task.command_line("reset") },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": memory_mib },
        "drives": [],
    });
    Ok(serde_json::to_vec(&config)?)
}

fn write_config(dir: &Path, id: &str, kernel: &Path, task: Task) -> Result<PathBuf> {
    let path = dir.join(format!("{id}.json"));
    fs::write(&path, config(kernel, task, MEMORY_MIB)?)
        .with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// The microvm machine without all that this guest does not need. It has no i8042, so the guest
/// ends by a triple fault.
fn qemu(probe: &Path, task: Task) -> Result<Command> {
    let program = QEMU.files.first().context("no QEMU named")?;
    let mut command = Command::new(program);
    let machine = "microvm,accel=kvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on";
    command.args(["-nodefaults", "-no-user-config", "-M", machine]);
    // A host whose KVM is software refuses the MSR that belongs to this feature.
    command.args(["-cpu", "host,-arch-capabilities", "-smp", "1", "-m", "128"]);
    command
        .args([
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
            "-kernel",
        ])
        .arg(probe);
    command.args(["-append", &task.command_line("crash")]);
    Ok(command)
}

/// A path as text.
///
/// # Errors
/// When it is none.
pub fn text(path: &Path) -> Result<&str> {
    match path.to_str() {
        Some(text) => Ok(text),
        None => bail!("{} is not UTF-8", path.display()),
    }
}

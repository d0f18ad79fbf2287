//! What a `casemate run` asks for, checked before anything is started or made.

use std::env;
use std::fs::{self, FileType, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use casemate_broker::MachineId;
use casemate_init::protocol::{Frame, Spec};
use serde::{Deserialize, Serialize};

use super::Error;
use super::taps::{self, Tap};
use crate::cli::RunArgs;
use crate::kernels::{self, Needs};
use crate::layer;
use crate::places::Places;
use crate::rootfs;

/// Words for every Linux guest: what it says before it has drivers goes to the serial port; a panic ends the machine at
/// once.
const BASE_CMDLINE: &str = "console=ttyS0 quiet panic=-1";
/// The virtio console takes over once the kernel has its driver. A kernel without one leaves it at the serial port.
const CONSOLE_CMDLINE: &str = "console=hvc0";
/// The environment of a command to which nobody gave a `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A block device of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name in the machine config.
    pub name: String,
    /// Its file on the host, without symbolic links.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// Whether what the guest flushes has to reach the host's disk.
    pub durable: bool,
}

/// The two files that a machine goes on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// The machine but for its memory.
    pub state: PathBuf,
    /// Its memory.
    pub memory: PathBuf,
}

/// A machine to be made.
#[derive(Debug)]
pub struct Plan {
    /// Its name.
    pub id: MachineId,
    /// The VMM.
    pub vmm: PathBuf,
    /// The jailer.
    pub jailer: PathBuf,
    /// The kernel, without symbolic links.
    pub kernel: PathBuf,
    /// What the kernel is called.
    pub kernel_name: String,
    /// The initial RAM disk, likewise.
    pub initrd: Option<PathBuf>,
    /// The kernel command line.
    pub cmdline: String,
    /// Whether there is a virtio console beside the serial port.
    pub console: bool,
    /// Disks, the root first.
    pub disks: Vec<Disk>,
    /// Tap interfaces.
    pub taps: Vec<Tap>,
    /// What the guest is told at the metadata service's address.
    pub metadata: Option<PathBuf>,
    /// Where they are.
    pub netns: Option<PathBuf>,
    /// Virtual CPUs at the start.
    pub cpus: u8,
    /// How many there can be while the machine runs, if their number can change.
    pub max_cpus: Option<u8>,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// The command; none with a bare kernel.
    pub spec: Option<Spec>,
    /// What it goes on from, if it does not boot.
    pub from: Option<Saved>,
    /// Whether it can be saved.
    pub saveable: bool,
    /// Walls that may be missing.
    pub allow_missing_landlock: bool,
    /// Likewise limits.
    pub allow_missing_cgroup: bool,
}

/// True for what can be a disk: a regular file or a block device.
pub fn is_disk(kind: FileType) -> bool {
    kind.is_file() || kind.is_block_device()
}

impl Plan {
    /// Whether anybody has something to ask of the machine while it runs.
    pub fn has_api(&self) -> bool {
        self.max_cpus.is_some() || self.saveable || self.from.is_some()
    }

    /// Checks the arguments, finds the kernel and prepares the root file system.
    pub fn new(args: &RunArgs, places: &Places) -> Result<Self, Error> {
        let id: MachineId = match &args.id {
            Some(id) => id.parse()?,
            None => made_up_id()?,
        };
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::NotRoot);
        }
        if let Some(max) = args.max_cpus
            && max < args.cpus
        {
            return Err(Error::FewerCpus {
                cpus: args.cpus,
                max,
            });
        }
        let vmm = resolved("the VMM", &places.program("casemate-vmm")?)?;
        let jailer = places.program("casemate-jailer")?;
        check_kvm()?;
        let netns = args
            .netns
            .as_deref()
            .map(|path| resolved("--netns", path))
            .transpose()?;
        let taps = taps::taps(&args.net, netns.is_some())?;
        if args.metadata.is_some() && taps.is_empty() {
            return Err(Error::MetadataWithoutNet);
        }
        let metadata = args.metadata.as_deref();
        let metadata = metadata
            .map(|path| readable("--metadata", path))
            .transpose()?;
        let mut disks = Vec::new();
        for (number, text) in args.disk.iter().enumerate() {
            disks.push(disk(number, text)?);
        }
        let spec = if args.bare {
            None
        } else {
            Some(spec(args, &id)?)
        };
        let initrd = args
            .initrd
            .as_deref()
            .map(|path| readable("--initrd", path))
            .transpose()?;

        let mut plan = Self {
            id,
            vmm,
            jailer,
            kernel: PathBuf::new(),
            kernel_name: String::new(),
            initrd,
            cmdline: String::new(),
            console: false,
            disks,
            taps,
            metadata,
            netns,
            cpus: args.cpus,
            max_cpus: args.max_cpus,
            memory_mib: args.memory,
            spec,
            from: None,
            saveable: args.watch.snapshots,
            allow_missing_landlock: args.watch.may_miss("landlock"),
            allow_missing_cgroup: args.watch.may_miss("cgroup"),
        };
        if args.bare {
            let file = args.kernel.as_deref().ok_or(Error::BareWithoutKernel)?;
            plan.kernel = readable("--kernel", Path::new(file))?;
            plan.kernel_name = file.to_string();
            plan.cmdline = args.append.clone().unwrap_or_default();
        } else {
            plan.linux(args, places)?;
        }
        Ok(plan)
    }

    fn linux(&mut self, args: &RunArgs, places: &Places) -> Result<(), Error> {
        let given = args.rootfs.as_deref().ok_or(Error::NoRootfs)?;
        let image = rootfs::prepare(places, given, &args.rootfs_type)?;
        let needs = Needs {
            net: !args.net.is_empty(),
            pmem: false,
            layer: args.root_size.is_some(),
            fs_type: Some(image.fs_type.clone()),
        };
        let boot = kernels::resolve(args.kernel.as_deref(), &needs)?;
        self.kernel = readable("--kernel", &boot.vmlinux)?;
        self.kernel_name = args.kernel.clone().unwrap_or_else(|| "default".to_string());
        if self.initrd.is_none() {
            self.initrd = boot
                .initrd
                .as_deref()
                .map(|path| readable("initrd", path))
                .transpose()?;
        }
        self.disks.insert(
            0,
            Disk {
                name: "rootfs".to_string(),
                path: image.path,
                read_only: true,
                durable: false,
            },
        );
        let fs_type = image.fs_type;
        self.cmdline = format!(
            "{BASE_CMDLINE} casemate.root=/dev/vda casemate.rootfstype={fs_type} casemate.overlay=1"
        );
        if args.root_size.is_some() {
            // Behind all others, whose names do not change by it.
            let letter = (b'a'..=b'z')
                .nth(self.disks.len())
                .ok_or(Error::TooManyDisks)?;
            let device = format!("/dev/vd{}", char::from(letter));
            self.cmdline.push_str(&format!(" casemate.upper={device}"));
            self.disks.push(Disk {
                name: layer::NAME.to_string(),
                path: places.layer(self.id.as_str()),
                read_only: false,
                durable: false,
            });
        }
        self.console = boot.console;
        if self.console {
            self.cmdline = format!("{} {CONSOLE_CMDLINE}", self.cmdline);
        }
        if let Some(words) = &args.append {
            self.cmdline.push(' ');
            self.cmdline.push_str(words);
        }
        Ok(())
    }
}

/// Eight hexadecimal digits that no other machine is likely to have.
pub fn made_up_id() -> Result<MachineId, Error> {
    let mut bytes = [0; 4];
    io::Read::read_exact(
        &mut fs::File::open("/dev/urandom")
            .map_err(Error::file("cannot open", Path::new("/dev/urandom")))?,
        &mut bytes,
    )
    .map_err(Error::file("cannot read", Path::new("/dev/urandom")))?;
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("vm-{text}").parse()?)
}

pub fn check_kvm() -> Result<(), Error> {
    let path = Path::new("/dev/kvm");
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(Error::NoKvm("it does not exist")),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Err(Error::NoKvm("no permission"))
        }
        Err(error) => Err(Error::file("cannot open", path)(error)),
    }
}

/// The path without symbolic links: the jailer follows none.
pub(super) fn resolved(what: &'static str, path: &Path) -> Result<PathBuf, Error> {
    fs::canonicalize(path).map_err(Error::file(what, path))
}

/// A file that can be read, without symbolic links in its path.
pub(super) fn readable(what: &'static str, path: &Path) -> Result<PathBuf, Error> {
    let path = resolved(what, path)?;
    let metadata = fs::metadata(&path).map_err(Error::file(what, &path))?;
    if !metadata.is_file() {
        return Err(Error::NotAFile { what, path });
    }
    fs::File::open(&path).map_err(Error::file(what, &path))?;
    Ok(path)
}

fn disk(number: usize, text: &str) -> Result<Disk, Error> {
    let (path, read_only) = match text.strip_suffix(":ro") {
        Some(path) => (path, true),
        None => (text.strip_suffix(":rw").unwrap_or(text), false),
    };
    let path = resolved("--disk", Path::new(path))?;
    let metadata = fs::metadata(&path).map_err(Error::file("--disk", &path))?;
    if !is_disk(metadata.file_type()) {
        return Err(Error::NotADisk(path));
    }
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(&path)
        .map_err(Error::file("--disk", &path))?;
    Ok(Disk {
        name: format!("disk{number}"),
        path,
        read_only,
        durable: !read_only,
    })
}

fn spec(args: &RunArgs, id: &MachineId) -> Result<Spec, Error> {
    let interactive = io::stdin().is_terminal() && io::stdout().is_terminal();
    let tty = match args.tty.as_str() {
        "yes" if !io::stdin().is_terminal() => return Err(Error::NoTerminal),
        "yes" => true,
        "no" => false,
        _ => interactive,
    };
    let mut env = vec![("PATH".to_string(), DEFAULT_PATH.to_string())];
    if tty && let Ok(term) = env::var("TERM") {
        env.push(("TERM".to_string(), term));
    }
    for word in &args.env {
        let (key, value) = match word.split_once('=') {
            Some((key, value)) => (key, value.to_string()),
            None => match env::var(word) {
                Ok(value) => (word.as_str(), value),
                Err(_) => continue,
            },
        };
        if key.is_empty() {
            return Err(Error::BadEnvironment(word.clone()));
        }
        env.retain(|(other, _)| other != key);
        env.push((key.to_string(), value));
    }
    let argv = if args.command.is_empty() {
        vec!["/bin/sh".to_string()]
    } else {
        args.command.clone()
    };
    let (rows, cols) = if tty { super::terminal::size() } else { (0, 0) };
    let spec = Spec {
        argv,
        env,
        cwd: args.workdir.clone(),
        tty,
        rows,
        cols,
        hostname: args.hostname.clone().unwrap_or_else(|| id.to_string()),
        uid: None,
        gid: None,
    };
    // Encoded once now, so that one that is too long starts nothing.
    Frame::Spec(spec.clone())
        .to_bytes()
        .map_err(Error::Command)?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn args(words: &[&str]) -> RunArgs {
        match Cli::try_parse_from(["casemate", "run"].iter().chain(words))
            .unwrap()
            .command
        {
            Command::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn disks() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("d");
        fs::write(&file, "x").unwrap();
        let text = file.to_str().unwrap();
        assert!(!disk(0, text).unwrap().read_only);
        assert!(disk(1, &format!("{text}:ro")).unwrap().read_only);
        assert_eq!(disk(1, text).unwrap().name, "disk1");
        assert!(matches!(
            disk(0, root.path().to_str().unwrap()),
            Err(Error::NotADisk(_))
        ));
        assert!(matches!(disk(0, "/dev/null"), Err(Error::NotADisk(_))));
        assert!(matches!(disk(0, "/nonexistent"), Err(Error::File { .. })));
    }

    #[test]
    fn the_last_value_of_a_variable_counts() {
        let id = "x".parse().unwrap();
        let spec = spec(
            &args(&[
                "-e", "A=1", "-e", "A=2=3", "-e", "PATH=/p", "--tty=no", "--", "c",
            ]),
            &id,
        )
        .unwrap();
        assert_eq!(
            spec.env,
            [
                ("A".to_string(), "2=3".to_string()),
                ("PATH".to_string(), "/p".to_string())
            ]
        );
        assert_eq!((spec.hostname.as_str(), spec.tty), ("x", false));
    }

    #[test]
    fn a_command_that_is_too_long_is_refused_here() {
        let long = "x".repeat(70_000);
        let id = "x".parse().unwrap();
        assert!(matches!(
            spec(&args(&["--tty=no", "--", &long]), &id),
            Err(Error::Command(_))
        ));
        assert!(matches!(
            spec(&args(&["--tty=no", "-e", "=x"]), &id),
            Err(Error::BadEnvironment(_))
        ));
    }

    #[test]
    fn files_are_files() {
        assert!(matches!(
            readable("--kernel", Path::new("/")),
            Err(Error::NotAFile { .. })
        ));
        assert!(matches!(
            readable("--kernel", Path::new("/nonexistent")),
            Err(Error::File { .. })
        ));
    }
}

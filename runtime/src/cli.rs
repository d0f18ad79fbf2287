//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::migrate::MigrateArgs;
use crate::page_handler::ServeArgs;
use crate::units::{parse_duration, parse_memory_mib};

/// Run untrusted code in jailed microVMs.
#[derive(Debug, Parser)]
#[command(
    name = "casemate",
    version,
    about,
    disable_help_subcommand = true,
    after_help = "Directories: CASEMATE_DATA_DIR (kernels and caches, default /var/lib/casemate), CASEMATE_STATE_DIR \
                  (running machines, default /run/casemate), CASEMATE_LIBEXEC (casemate-jailer and casemate-vmm, default: \
                  beside this program)."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a new microVM, in the foreground
    Run(Box<RunArgs>),
    /// List running microVMs
    #[command(visible_alias = "ls")]
    Ps(PsArgs),
    /// Show what confines a running microVM, as the kernel reports it
    Inspect(InspectArgs),
    /// Show what this host offers, what it means and how to mend it
    Doctor(DoctorArgs),
    /// Print a VMM's metrics as Prometheus text
    Metrics(MetricsArgs),
    /// Show how many virtual CPUs a running microVM has, or change it
    Vcpus(VcpusArgs),
    /// Save running microVMs, and look at what was saved
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Run microVMs that go on from a snapshot, in the foreground
    Clone(Box<CloneArgs>),
    /// Move a running machine to another VMM, here or on another host
    Migrate(Box<MigrateArgs>),
    /// Remove what killed runs left behind
    Gc,
    /// Register, list and remove guest kernels
    #[command(disable_help_flag = true)]
    Kernel(KernelArgs),
    /// Carry bytes between a guest and the terminal (started by `run`)
    #[command(hide = true)]
    Monitor(MonitorArgs),
    /// Have a machine go on when `snapshot create` was killed (started by it)
    #[command(hide = true)]
    SnapshotGuard(GuardArgs),
}

/// `casemate snapshot`.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Save a running microVM, which goes on
    Create(SnapshotCreateArgs),
    /// List the snapshots that have names
    #[command(visible_alias = "list")]
    Ls(PsArgs),
    /// Show what a snapshot is: of which machine, and what is in its files
    Describe(SnapshotArgs),
    /// Read all of a snapshot and compare it with its checksums
    #[command(
        after_help = "Exit code: 0 when it is whole, 1 when it is not, 125 when it could not be looked at."
    )]
    Verify(SnapshotArgs),
    /// Remove snapshots. Machines that go on from one do not notice
    Rm(SnapshotRmArgs),
    /// Bring a restored machine's memory from a file, page by page as the guest touches it
    Serve(ServeArgs),
}

/// `casemate snapshot create`.
#[derive(Debug, Args)]
#[command(
    after_help = "The machine is paused while it is written. It goes on afterwards, also when that fails, is interrupted, or this \
                  command is killed. Disks given with --disk are not in the snapshot. \
                  Exit code: 0; 128+n when a signal n ended it, and nothing was made; 125 when it failed."
)]
pub struct SnapshotCreateArgs {
    /// The machine, started with --snapshots
    pub id: String,
    /// What the snapshot is to be called; with a `/` in it the directory that it is to be. Never one that exists
    #[arg(value_name = "NAME|PATH")]
    pub name: String,
    /// Do not let the machine go on afterwards
    #[arg(long)]
    pub leave_paused: bool,
}

/// `casemate snapshot describe` and `verify`.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The snapshot
    #[arg(value_name = "NAME|PATH")]
    pub name: String,
}

/// `casemate snapshot rm`.
#[derive(Debug, Args)]
pub struct SnapshotRmArgs {
    /// The snapshots
    #[arg(value_name = "NAME|PATH", required = true)]
    pub names: Vec<String>,
}

/// `casemate clone`.
#[derive(Debug, Args)]
#[command(
    after_help = "A machine goes on with the command that it was saved with, as another one: with an id, a user, a jail, a host name \
                  and random numbers of its own. Each gets a copy of what was written to its root on a disk of its own (--root-size). \
                  Exit code: as of `run`; with -n that of the first machine that ends with another one than 0."
)]
pub struct CloneArgs {
    /// The snapshot
    #[arg(value_name = "NAME|PATH")]
    pub snapshot: String,
    /// How many. Lines of several begin with the machine's id and a tab, and none has standard input
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub count: u16,
    /// Name of the machine; of several each is this, a hyphen and its number [default: made up]
    #[arg(long)]
    pub id: Option<String>,
    /// The tap for a network card of the machine's: as many as it has, in their order. `%d` is the machine's number
    /// [default: those that it had]
    #[arg(long, value_name = "TAP")]
    pub net: Vec<String>,
    /// Network namespace in which the taps are [default: where they were]
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
    /// How each is watched.
    #[command(flatten)]
    pub watch: WatchArgs,
    /// The process that started this one among several
    #[arg(long, hide = true)]
    pub parent: Option<i32>,
}

/// `casemate snapshot-guard`.
#[derive(Debug, Args)]
pub struct GuardArgs {
    /// Socket of the machine's API
    pub socket: PathBuf,
    /// Where the machine writes its files
    pub saved: PathBuf,
    /// Where they are put together
    pub staged: PathBuf,
}

/// `casemate metrics`.
#[derive(Debug, Args)]
pub struct MetricsArgs {
    /// What the VMM's `--metrics-path` names; `-` is standard input
    pub file: PathBuf,
}

/// `casemate run`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit code: the command's own; 128+n when a signal n ended it; 124 after --timeout; 125 when casemate failed; \
                  126 or 127 when the command cannot be executed or does not exist in the guest."
)]
pub struct RunArgs {
    /// Name of the machine: 1-64 of [A-Za-z0-9-] [default: made up]
    #[arg(long)]
    pub id: Option<String>,
    /// Guest kernel: a name from `casemate kernel ls` or a file [default: the default kernel]
    #[arg(long, value_name = "NAME|FILE")]
    pub kernel: Option<String>,
    /// Initial RAM disk to use instead of the composed one
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Root file system: a directory (made into a cached, read-only image) or an image file
    #[arg(long, value_name = "DIR|IMAGE")]
    pub rootfs: Option<PathBuf>,
    /// File system of an image given with --rootfs (never guessed from its content)
    #[arg(long, value_name = "TYPE", default_value = "erofs", value_parser = ["erofs", "ext4", "squashfs", "xfs", "btrfs"])]
    pub rootfs_type: String,
    /// Keep what the machine writes to its root on a disk of its own of this size, not in its memory: a guest that
    /// fills it sees a full disk. It goes with the machine
    #[arg(long, value_name = "SIZE", value_parser = parse_memory_mib, conflicts_with = "bare")]
    pub root_size: Option<u64>,
    /// Virtual CPUs, 1-32
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub cpus: u8,
    /// Virtual CPUs that the machine can have while it runs, --cpus to 32: change their number by `casemate vcpus`
    /// [default: fixed]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    pub max_cpus: Option<u8>,
    /// Guest memory: MiB, or a number with the suffix M or G
    #[arg(long, short = 'm', value_name = "SIZE", default_value = "512", value_parser = parse_memory_mib)]
    pub memory: u64,
    /// A further disk: raw image or block device; `:ro` makes it read-only
    #[arg(long, value_name = "PATH[:ro]")]
    pub disk: Vec<String>,
    /// A network interface: an existing tap device, and how many of its queues to use
    #[arg(long, value_name = "TAP[:QUEUES]")]
    pub net: Vec<String>,
    /// What the guest is told at http://169.254.169.254: a JSON file. Needs --net
    #[arg(long, value_name = "FILE")]
    pub metadata: Option<PathBuf>,
    /// Network namespace in which the taps of --net are
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
    /// Environment of the command; `KEY` alone takes the value from here
    #[arg(long, short = 'e', value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,
    /// Working directory of the command
    #[arg(long, short = 'w', value_name = "DIR")]
    pub workdir: Option<String>,
    /// Host name in the guest [default: the machine's id]
    #[arg(long)]
    pub hostname: Option<String>,
    /// Accepted for familiarity: a machine is always removed when it ends
    #[arg(long)]
    pub rm: bool,
    /// How it is watched.
    #[command(flatten)]
    pub watch: WatchArgs,
    /// Write what confines the machine, as the kernel reports it, to FILE when the command starts (`-`: standard error)
    #[arg(long, value_name = "FILE|-")]
    pub confinement_report: Option<PathBuf>,
    /// Give the command a terminal: yes, no or auto (when standard input and output are one)
    #[arg(
        long,
        short = 't',
        value_name = "WHEN",
        default_value = "auto",
        default_missing_value = "yes",
        num_args = 0..=1,
        require_equals = true,
        value_parser = ["auto", "yes", "no"]
    )]
    pub tty: String,
    /// Run the kernel alone, without init, root file system or command: standard input and output are its console
    #[arg(long, conflicts_with_all = ["rootfs", "command", "env", "workdir", "console"])]
    pub bare: bool,
    /// Further words for the kernel command line
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// The command and its arguments [default: /bin/sh]
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// How a machine is kept and watched, whether it boots or goes on from a snapshot.
#[derive(Debug, Args)]
pub struct WatchArgs {
    /// End the machine after this long, with exit code 124 (e.g. 90, 30s, 5m)
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Let the machine be saved while it runs, by `casemate snapshot create`. Its broker may then make two files, each no
    /// larger than its memory, below CASEMATE_DATA_DIR
    #[arg(long)]
    pub snapshots: bool,
    /// How long the command may take to end after a signal, before it is made to
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    pub stop_grace: Duration,
    /// How long the guest may take to get ready
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = parse_duration)]
    pub boot_timeout: Duration,
    /// Show the guest's console (kernel messages) on standard error
    #[arg(long)]
    pub console: bool,
    /// Leave one of the walls out where this host lacks it (cgroup: limits whose controllers it lacks)
    #[arg(long, value_name = "WALL", value_delimiter = ',', value_parser = ["landlock", "cgroup"])]
    pub allow_missing: Vec<String>,
}

impl WatchArgs {
    /// Whether this wall may be missing.
    pub fn may_miss(&self, wall: &str) -> bool {
        self.allow_missing.iter().any(|other| other == wall)
    }
}

/// `casemate ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Ids only
    #[arg(long, short, conflicts_with = "json")]
    pub quiet: bool,
}

/// `casemate inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Show the confinement (the only view so far, and thus required)
    #[arg(long, action = ArgAction::SetTrue, required = true)]
    pub confinement: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// The machine
    pub id: String,
}

/// `casemate vcpus`.
#[derive(Debug, Args)]
pub struct VcpusArgs {
    /// The machine, started with --max-cpus
    pub id: String,
    /// How many it shall have, 1 to its --max-cpus. Those that are too many leave when the guest lets them go
    #[arg(value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    pub count: Option<u8>,
}

/// `casemate doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// `casemate kernel`: its own module reads the rest.
#[derive(Debug, Args)]
pub struct KernelArgs {
    /// Passed on.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<std::ffi::OsString>,
}

/// `casemate monitor`: numbers of inherited descriptors.
#[derive(Debug, Args)]
pub struct MonitorArgs {
    /// Socket to `run`
    #[arg(long)]
    pub control: i32,
    /// Where the guest's init connects
    #[arg(long)]
    pub listener: Option<i32>,
    /// Read end of the guest's console
    #[arg(long)]
    pub console: i32,
    /// Write end of the guest's console
    #[arg(long)]
    pub console_input: Option<i32>,
    /// Read end of the VMM's and the jailer's log
    #[arg(long)]
    pub log: i32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn run(args: &[&str]) -> Result<RunArgs, clap::Error> {
        let words = ["casemate", "run"].iter().chain(args);
        match Cli::try_parse_from(words)?.command {
            Command::Run(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_takes_what_it_documents() {
        let args = run(&[
            "--cpus",
            "2",
            "-m",
            "1G",
            "-e",
            "A=b",
            "--timeout",
            "2m",
            "--",
            "ls",
            "-l",
        ])
        .unwrap();
        assert_eq!((args.cpus, args.memory), (2, 1024));
        assert_eq!(args.watch.timeout, Some(Duration::from_secs(120)));
        assert_eq!(args.command, ["ls", "-l"]);
        assert_eq!(args.tty, "auto");
        let missing = run(&["--allow-missing", "landlock,cgroup"])
            .unwrap()
            .watch
            .allow_missing;
        assert_eq!(missing, ["landlock", "cgroup"]);
        assert_eq!(run(&["-t", "--", "sh"]).unwrap().tty, "yes");
        assert_eq!(run(&["--tty=no"]).unwrap().tty, "no");
    }

    #[test]
    fn bad_values_are_refused() {
        for bad in [
            &["--cpus", "0"][..],
            &["--cpus", "33"],
            &["--memory", "0"],
            &["--memory", "x"],
            &["--timeout", "-1"],
            &["--bare", "--", "sh"],
            &["--allow-missing", "seccomp"],
        ] {
            assert!(run(bad).is_err(), "{bad:?}");
        }
    }
}

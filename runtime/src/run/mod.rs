//! `casemate run`: a command in a new machine, in the foreground.
//!
//! Top to bottom: a [`plan`] is checked, the machine's directory and user id are taken ([`crate::state`]), its config is
//! written ([`machine_config`]), monitor and jailer are started ([`children`]), and all is watched until both have ended
//! ([`supervise`]). Whatever happens, dropping those in reverse removes everything.

mod children;
mod machine_config;
pub mod origin;
mod plan;
mod resume;
mod supervise;
pub mod taps;
mod terminal;

use std::io;
use std::path::{Path, PathBuf};

use casemate_broker::MachineIdError;
use casemate_init::protocol::Identity;
use nix::errno::Errno;
use nix::sys::signalfd::SignalFd;

use crate::cgroups::Hierarchies;
use crate::cli::{RunArgs, WatchArgs};
use crate::places::{MissingProgram, Places};
use crate::state::{self, Machine, Traits, UidRange};
use crate::{inspect, kernels, layer, rootfs, say};
use children::Children;
pub use machine_config::{API_SOCKET, FILES, SAVED, VSOCK_SOCKET};
pub use plan::{Disk, Plan, Saved, check_kvm, is_disk, made_up_id};
pub use supervise::hold_signals;
use supervise::{Limits, Outcome, Supervisor};

/// Why nothing was run, or a run could not be seen to its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The id.
    #[error("--id: {0}")]
    Id(#[from] MachineIdError),
    /// Not root.
    #[error(
        "running a machine needs root, to build its jail: the machine itself has no privileges"
    )]
    NotRoot,
    /// Our programs.
    #[error(transparent)]
    Program(#[from] MissingProgram),
    /// `/dev/kvm`.
    #[error("/dev/kvm: {0}: see `casemate doctor`")]
    NoKvm(&'static str),
    /// Limits that nothing would hold.
    #[error(
        "this host has no cgroup controller {}: the machine would have no bounds there; mount cgroup v2 with it \
         (see `casemate doctor`), or do without by --allow-missing cgroup", .0.join(", ")
    )]
    NoController(Vec<&'static str>),
    /// A path.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// The option, or what was being done.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A directory or device where a file is expected.
    #[error("{what} {}: not a regular file", path.display())]
    NotAFile {
        /// The option.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// Not a disk.
    #[error("--disk {}: not a disk; give an image (a regular file) or a block device", .0.display())]
    NotADisk(PathBuf),
    /// Not an interface's name.
    #[error(
        "--net {0:?}: not the name of a network interface (1-15 characters, no / or =), with :QUEUES behind it (1-8) or without"
    )]
    BadTap(String),
    /// Nobody could ask for it.
    #[error("--metadata: a guest asks for it over the network: give --net, too")]
    MetadataWithoutNet,
    /// Named twice.
    #[error("--net {0}: given twice")]
    TwoTaps(String),
    /// Not there.
    #[error("--net {0}: no tap of that name exists: make it with `ip tuntap add {0} mode tap`")]
    NoTap(String),
    /// The most is less than what there is at the start.
    #[error("--max-cpus {max}: less than --cpus {cpus}")]
    FewerCpus {
        /// `--cpus`.
        cpus: u8,
        /// `--max-cpus`.
        max: u8,
    },
    /// `-t` without a terminal.
    #[error("--tty: standard input is not a terminal")]
    NoTerminal,
    /// A variable without a name.
    #[error("--env {0:?}: give KEY=VALUE")]
    BadEnvironment(String),
    /// The command does not fit.
    #[error("{0}")]
    Command(casemate_init::protocol::Error),
    /// `--bare` needs a file.
    #[error("--bare: give the kernel as --kernel FILE")]
    BareWithoutKernel,
    /// There is nothing to run a command in.
    #[error("--rootfs is missing: give a directory or an image with the command in it")]
    NoRootfs,
    /// The root file system.
    #[error(transparent)]
    Rootfs(#[from] rootfs::Error),
    /// The disk for what is written to it.
    #[error(transparent)]
    Layer(#[from] layer::Error),
    /// Its name has one letter for each.
    #[error("--disk: too many disks")]
    TooManyDisks,
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] kernels::Error),
    /// Where it would be saved.
    #[error("--snapshots: {what} {}: {source}", path.display())]
    Saved {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The machine that would go on.
    #[error("cannot have the VMM go on from the snapshot: {0}")]
    Load(io::Error),
    /// It would not.
    #[error("the VMM refuses the snapshot: {0}")]
    Refused(String),
    /// The machine's directory.
    #[error(transparent)]
    State(#[from] state::Error),
    /// A system call.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// What confines the machine could not be read.
    #[error("--confinement-report: {0}")]
    Report(#[from] inspect::Error),
}

impl Error {
    fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::File { what, path, source }
    }

    fn errno(what: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::System {
            what,
            source: errno.into(),
        }
    }

    fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { what, source }
    }
}

/// How a machine is run, beside what it is.
#[derive(Debug, Default)]
pub struct Manner {
    /// Where to write what confines it.
    pub report: Option<PathBuf>,
    /// Who it is from now on, if it goes on from a snapshot.
    pub identity: Option<Identity>,
    /// What each line of its output begins with.
    pub prefix: Option<String>,
}

/// Runs a machine to its end and returns the exit code.
pub fn run(args: &RunArgs) -> Result<u8, Error> {
    let places = Places::from_env();
    let plan = Plan::new(args, &places)?;
    let manner = Manner {
        report: args.confinement_report.clone(),
        ..Manner::default()
    };
    let make_layer = |layer: &Path| match args.root_size {
        Some(size) => layer::make(layer, size).map_err(Error::from),
        None => Ok(()),
    };
    to_its_end(&places, &plan, manner, &args.watch, make_layer)
}

/// Starts a machine, and sees it to its end; `make_layer` makes its own disk, if it has one. Returns the exit code.
pub fn to_its_end<E: From<Error>>(
    places: &Places,
    plan: &Plan,
    manner: Manner,
    watch: &WatchArgs,
    make_layer: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<u8, E> {
    let range = UidRange::from_env().map_err(Error::from)?;
    let hierarchies = Hierarchies::read(Path::new("/"));
    let missing = hierarchies.missing();
    if !missing.is_empty() && !plan.allow_missing_cgroup {
        return Err(Error::NoController(missing).into());
    }

    // Signals are held from here on and read from a descriptor: none can end this process before it has cleaned up.
    let signals = supervise::hold_signals()?;
    let traits = Traits {
        cpus: plan.cpus,
        memory_mib: plan.memory_mib,
        kernel: plan.kernel_name.clone(),
        command: plan
            .spec
            .as_ref()
            .map(|spec| spec.argv.clone())
            .unwrap_or_default(),
    };
    let mut machine = Machine::create(places, &plan.id, range, traits).map_err(Error::from)?;
    make_layer(&places.layer(plan.id.as_str()))?;
    let outcome = start(
        places,
        plan,
        manner,
        watch,
        signals,
        &mut machine,
        &hierarchies,
    )?;
    if outcome.all_ended {
        machine.processes_ended();
    }
    drop(machine);
    Ok(outcome.code)
}

fn start(
    places: &Places,
    plan: &Plan,
    manner: Manner,
    watch: &WatchArgs,
    signals: SignalFd,
    machine: &mut Machine,
    hierarchies: &Hierarchies,
) -> Result<Outcome, Error> {
    let saved = places.saved(plan.id.as_str());
    let _saved = match plan.saveable {
        true => Some(origin::write(plan, machine, &saved)?),
        false => None,
    };
    let config = machine_config::machine_config(plan);
    let config = serde_json::to_vec_pretty(&config).unwrap_or_default();
    let config = machine.write("config.json", &config)?;
    let socket = machine.path(machine_config::VSOCK_SOCKET);
    let uid = machine.uid();
    let arguments =
        machine_config::jailer_arguments(plan, uid, &config, &socket, &saved, hierarchies);

    let mut children = Children::start(
        plan,
        &manner,
        watch.console,
        machine,
        &socket,
        arguments,
        hierarchies,
    )?;
    if plan.from.is_some() {
        let api = machine.path(API_SOCKET);
        if let Some(outcome) = resume::resume(plan, &api, &mut children, &signals)? {
            return Ok(outcome);
        }
    }
    let limits = Limits {
        timeout: watch.timeout,
        stop_grace: watch.stop_grace,
        boot_timeout: plan.spec.is_some().then_some(watch.boot_timeout),
    };
    let supervisor = Supervisor::new(children, signals, limits, plan, manner.report, machine);
    // While the guest boots there is time for what killed runs have left.
    if let Err(error) = state::gc::try_run(places) {
        say::warn(format_args!(
            "cannot collect what killed runs left: {error}"
        ));
    }
    supervisor.run()
}

//! `casemate clone`: machines that go on from a snapshot, each in a jail of its own.
//!
//! One is run as any other machine, but that its VMM is told to load instead of to boot, and its guest who it is. Several are
//! a process each of this program, which this one starts and waits for: it never sees what their guests write.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use casemate_broker::{MachineId, MachineIdError, exit};
use casemate_init::protocol::{ENTROPY_BYTES, Identity};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::cli::CloneArgs;
use crate::layer;
use crate::places::{MissingProgram, Places};
use crate::run::taps::{self, Tap};
use crate::run::{self, Disk, Manner, Plan, Saved, origin};
use crate::snapshot::{Error as Failure, Snapshot, copy, meta};
use crate::state::process::signal_pid;

/// Why no machine goes on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The snapshot, a file or a system call.
    #[error(transparent)]
    Snapshot(#[from] Failure),
    /// The machine.
    #[error(transparent)]
    Run(#[from] run::Error),
    /// Our programs.
    #[error(transparent)]
    Program(#[from] MissingProgram),
    /// The id.
    #[error("--id: {0}")]
    Id(#[from] MachineIdError),
    /// It could write to a disk that another one writes to.
    #[error(
        "disk {}: what is written to it is not in a snapshot, and only one machine can go on with it", .0.display()
    )]
    SharedDisk(PathBuf),
    /// It is no longer what the guest knows.
    #[error(
        "disk {}: it has changed since the snapshot was made, and its content is not in it: a guest that goes on would \
         destroy what is there", .0.display()
    )]
    Changed(PathBuf),
    /// Too few or too many.
    #[error(
        "--net: the machine has {has} network cards, and {given} taps are given: name one for each, in their order"
    )]
    Taps {
        /// Cards.
        has: usize,
        /// Taps.
        given: usize,
    },
    /// All would have one.
    #[error("--net {0}: several machines cannot share a tap: put %d where its number is to be")]
    OneTap(String),
}

/// Has machines go on from a snapshot, to their end, and returns the exit code.
pub fn run(args: &CloneArgs) -> Result<u8, Error> {
    if let Some(parent) = args.parent {
        // In an orderly way, as by a signal from it.
        set_pdeathsig(Signal::SIGTERM).map_err(Failure::system("die with the parent"))?;
        if nix::unistd::getppid().as_raw() != parent {
            return Ok(exit::by_signal(Signal::SIGTERM as i32));
        }
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(run::Error::NotRoot.into());
    }
    let places = Places::from_env();
    let snapshot = Snapshot::find(&places, &args.snapshot)?;
    let prefix: MachineId = match &args.id {
        Some(id) => id.parse()?,
        None => run::made_up_id()?,
    };
    match args.count {
        1 => one(&places, &snapshot, args, prefix),
        count => several(&snapshot, args, &prefix, count),
    }
}

/// One, in the foreground.
fn one(places: &Places, snapshot: &Snapshot, args: &CloneArgs, id: MachineId) -> Result<u8, Error> {
    let plan = plan(places, snapshot, args, id)?;
    let manner = Manner {
        report: None,
        identity: plan.spec.is_some().then(|| identity(&plan)).transpose()?,
        prefix: args.parent.map(|_| plan.id.to_string()),
    };
    let copy_layer = |to: &Path| match snapshot.meta.origin.has_layer() {
        true => copy_layer(&snapshot.path(meta::LAYER), to),
        false => Ok(()),
    };
    run::to_its_end(places, &plan, manner, &args.watch, copy_layer)
}

fn plan(
    places: &Places,
    snapshot: &Snapshot,
    args: &CloneArgs,
    id: MachineId,
) -> Result<Plan, Error> {
    let vmm = places.program("casemate-vmm")?;
    let vmm = fs::canonicalize(&vmm).map_err(Failure::io("the VMM", &vmm))?;
    let jailer = places.program("casemate-jailer")?;
    run::check_kvm()?;
    let origin = snapshot.meta.origin.clone();
    let mut disks = origin.disks;
    for (number, disk) in disks.iter_mut().enumerate() {
        if disk.name == layer::NAME {
            disk.path = places.layer(id.as_str());
        } else {
            check_disk(disk, snapshot.meta.disks.get(number).copied().flatten())?;
        }
    }
    let netns = match &args.netns {
        Some(path) => Some(fs::canonicalize(path).map_err(Failure::io("--netns", path))?),
        None => origin.netns,
    };
    let taps = with_taps(origin.taps, &args.net, netns.is_some())?;
    let mut spec = origin.spec;
    if let Some(spec) = &mut spec {
        spec.hostname = id.to_string();
    }
    Ok(Plan {
        id,
        vmm,
        jailer,
        kernel: PathBuf::new(),
        kernel_name: origin.kernel,
        initrd: None,
        cmdline: String::new(),
        console: origin.console,
        disks,
        taps,
        metadata: origin.metadata,
        netns,
        cpus: origin.cpus,
        max_cpus: origin.max_cpus,
        memory_mib: origin.memory_mib,
        spec,
        from: Some(Saved {
            state: snapshot.path(run::FILES[0]),
            memory: snapshot.path(run::FILES[1]),
        }),
        saveable: args.watch.snapshots,
        allow_missing_landlock: args.watch.may_miss("landlock"),
        allow_missing_cgroup: args.watch.may_miss("cgroup"),
    })
}

/// Whether a disk is what it was when the snapshot was made.
fn check_disk(disk: &Disk, then: Option<(u64, i64)>) -> Result<(), Error> {
    let now = origin::fingerprint(&disk.path).map_err(Failure::io("disk", &disk.path))?;
    match now == then {
        true => Ok(()),
        false => Err(Error::Changed(disk.path.clone())),
    }
}

/// The machine's cards on the taps that are given, or on those that they were on.
fn with_taps(mut cards: Vec<Tap>, given: &[String], elsewhere: bool) -> Result<Vec<Tap>, Error> {
    let words: Vec<String> = match given {
        [] => cards.iter().map(|tap| tap.interface.clone()).collect(),
        given => given.to_vec(),
    };
    let (has, given) = (cards.len(), words.len());
    if has != given {
        return Err(Error::Taps { has, given });
    }
    for (card, tap) in cards.iter_mut().zip(taps::taps(&words, elsewhere)?) {
        card.interface = tap.interface;
    }
    Ok(cards)
}

/// A machine that is no other: drawn by the host's kernel.
fn identity(plan: &Plan) -> Result<Identity, Error> {
    let mut entropy = vec![0; ENTROPY_BYTES];
    random(&mut entropy)?;
    let mut addresses = Vec::new();
    for _ in &plan.taps {
        let mut address = [0; 6];
        random(&mut address)?;
        let [first, ..] = &mut address;
        // Of one card, and administered locally.
        *first = (*first & 0xfc) | 2;
        addresses.push(address);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |since| since.as_nanos());
    Ok(Identity {
        hostname: plan.id.to_string(),
        entropy,
        time: u64::try_from(now).unwrap_or(u64::MAX),
        addresses,
    })
}

fn random(bytes: &mut [u8]) -> Result<(), Error> {
    let wanted = bytes.len();
    let got = getrandom(bytes, GetRandomFlags::empty()).map_err(Failure::system("draw"))?;
    match got == wanted {
        true => Ok(()),
        false => Err(Failure::system("draw")(Errno::EIO).into()),
    }
}

/// A copy of the disk that was the saved machine's own.
fn copy_layer(from: &Path, to: &Path) -> Result<(), Error> {
    let file = fs::File::open(from).map_err(Failure::io("cannot open", from))?;
    if let Some(parent) = to.parent() {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(parent);
        made.map_err(Failure::io("cannot make the directory", parent))?;
    }
    layer::remove(to);
    copy(&file, to).map_err(Failure::io("cannot make", to))?;
    Ok(())
}

/// Several, each by a process of its own, whose lines begin with its id.
fn several(
    snapshot: &Snapshot,
    args: &CloneArgs,
    prefix: &MachineId,
    count: u16,
) -> Result<u8, Error> {
    let disks = &snapshot.meta.origin.disks;
    let shared = disks
        .iter()
        .find(|disk| !disk.read_only && disk.name != layer::NAME);
    if let Some(disk) = shared {
        return Err(Error::SharedDisk(disk.path.clone()));
    }
    if let Some(tap) = args.net.iter().find(|tap| !tap.contains("%d")) {
        return Err(Error::OneTap(tap.clone()));
    }
    if let (Some(tap), []) = (snapshot.meta.origin.taps.first(), args.net.as_slice()) {
        return Err(Error::OneTap(tap.interface.clone()));
    }
    // All of them are ids, or none is started.
    let ids = (1..=count).map(|number| format!("{prefix}-{number}").parse());
    let ids: Vec<MachineId> = ids.collect::<Result<_, _>>()?;
    let signals = run::hold_signals()?;
    let mut clones = Clones::default();
    for (number, id) in (1..=count).zip(&ids) {
        clones.0.push(start(args, number, id)?);
    }
    let mut code = 0;
    while !clones.0.is_empty() {
        let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Failure::system("wait for events")(errno).into()),
        }
        while let Ok(Some(info)) = signals.read_signal() {
            match Signal::try_from(info.ssi_signo.cast_signed()) {
                Ok(Signal::SIGCHLD | Signal::SIGWINCH) | Err(_) => {}
                Ok(signal) => clones.signal(signal),
            }
        }
        let ended = clones
            .reap()
            .map_err(Failure::system("wait for a machine"))?;
        for status in ended {
            if code == 0 {
                code = code_of(status);
            }
        }
    }
    Ok(code)
}

fn code_of(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(u8::MAX),
        (None, Some(signal)) => exit::by_signal(signal),
        (None, None) => u8::MAX,
    }
}

/// Processes that run a machine each. Dropping them asks each to end.
#[derive(Debug, Default)]
struct Clones(Vec<Child>);

impl Clones {
    fn signal(&self, signal: Signal) {
        for child in &self.0 {
            signal_pid(child.id(), signal);
        }
    }

    /// How those have ended that have.
    fn reap(&mut self) -> io::Result<Vec<ExitStatus>> {
        let mut ended = Vec::new();
        let mut left = Vec::new();
        for mut child in std::mem::take(&mut self.0) {
            match child.try_wait()? {
                Some(status) => ended.push(status),
                None => left.push(child),
            }
        }
        self.0 = left;
        Ok(ended)
    }
}

impl Drop for Clones {
    fn drop(&mut self) {
        self.signal(Signal::SIGTERM);
        for child in &mut self.0 {
            let _ = child.wait();
        }
    }
}

fn start(args: &CloneArgs, number: u16, id: &MachineId) -> Result<Child, Error> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("casemate").arg("clone");
    command.args(["--id", id.as_str(), "--parent"]);
    command.arg(std::process::id().to_string());
    for tap in &args.net {
        command
            .arg("--net")
            .arg(tap.replace("%d", &number.to_string()));
    }
    if let Some(netns) = &args.netns {
        command.arg("--netns").arg(netns);
    }
    for (given, option) in [
        (args.watch.console, "--console"),
        (args.watch.snapshots, "--snapshots"),
    ] {
        if given {
            command.arg(option);
        }
    }
    for wall in &args.watch.allow_missing {
        command.args(["--allow-missing", wall]);
    }
    let times = [
        ("--timeout", args.watch.timeout),
        ("--stop-grace", Some(args.watch.stop_grace)),
        ("--boot-timeout", Some(args.watch.boot_timeout)),
    ];
    for (option, time) in times {
        if let Some(time) = time {
            command.arg(option).arg(time.as_secs_f64().to_string());
        }
    }
    command.arg("--").arg(&args.snapshot);
    // What a terminal sends goes to this process, which passes it on.
    command.stdin(Stdio::null()).process_group(0);
    let child = command.spawn();
    Ok(child.map_err(Failure::system("cannot start a machine's process"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tap(name: &str) -> Tap {
        Tap {
            name: name.to_owned(),
            interface: name.to_owned(),
            queues: 2,
        }
    }

    #[test]
    fn cards_keep_their_names_on_other_taps() {
        let cards = || vec![tap("a"), tap("b")];
        let words = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
        let moved = with_taps(cards(), &words(&["x", "y"]), true).unwrap();
        assert_eq!(
            (moved[1].name.as_str(), moved[1].interface.as_str()),
            ("b", "y")
        );
        assert_eq!(moved[1].queues, 2);
        assert_eq!(with_taps(cards(), &[], true).unwrap(), cards());
        let error = with_taps(cards(), &words(&["x"]), true).unwrap_err();
        assert!(matches!(error, Error::Taps { has: 2, given: 1 }));
    }

    #[test]
    fn a_disk_that_has_changed_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("d");
        fs::write(&path, "one").unwrap();
        let disk = Disk {
            name: "disk0".into(),
            path: path.clone(),
            read_only: false,
            durable: true,
        };
        let then = origin::fingerprint(&path).unwrap();
        check_disk(&disk, then).unwrap();
        fs::write(&path, "four").unwrap();
        assert!(matches!(check_disk(&disk, then), Err(Error::Changed(_))));
        fs::remove_file(&path).unwrap();
        assert!(matches!(
            check_disk(&disk, then),
            Err(Error::Snapshot(Failure::Io { .. }))
        ));
    }
}

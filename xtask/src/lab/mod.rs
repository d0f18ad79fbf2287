//! The lab: a software-emulated machine with a Debian kernel in which KVM works, on any host.
//!
//! It sees the host's files read-only, under an overlay in memory, so that it can run every
//! program and build product of the host, as root, and nothing it does touches the host.
//!
//! [`qemu`] is the machine, [`initrd`] what it boots into, [`guest`] its process 1, and [`wire`]
//! what the two ends say to each other.

pub mod guest;
mod initrd;
mod qemu;
mod wire;

use std::env;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

use crate::kernels::{self, LabKernel};
use crate::packages;
use crate::workspace;
use wire::{Frame, MAX_PAYLOAD, Spec};

/// Exit code: the lab went silent. The end of its console is on standard error.
pub const HUNG: u8 = 120;
/// Exit code: the command was still running when `--timeout` ended.
pub const TIMED_OUT: u8 = 121;
/// Exit code: the lab did not start, or its machine died.
pub const BROKEN: u8 = 122;

/// MiB of memory, of which half is the most that changed and new files may take.
pub const DEFAULT_MEMORY: u32 = 3072;

/// The lab ticks every second; after so long without, it is hung. A busy host needs some room.
pub const SILENCE: Duration = Duration::from_secs(60);
/// How long a lab sleeps at most that has lost its timer's interrupt.
const NUDGE: Duration = Duration::from_millis(500);
/// It is up after about five seconds on an idle host.
const BOOT: Duration = Duration::from_secs(120);
/// How much of the console is shown of a lab that ended by itself: the whole account that a kernel gives of its end,
/// with registers and stack.
const CONSOLE_LINES: usize = 120;

/// `cargo xtask lab`
#[derive(clap::Args)]
#[command(
    after_help = "The exit code is the command's own (128 + n when signal n ended it), or: \
    120 the lab hung, 121 --timeout was over, 122 the lab could not start or died."
)]
pub struct Arguments {
    /// Seconds after which the command is given up.
    #[arg(long, default_value_t = 1800)]
    timeout: u64,
    /// Seconds without a sign of life after which the lab counts as hung: it gives one every second.
    #[arg(long, default_value_t = SILENCE.as_secs())]
    silence: u64,
    /// The lab's memory in MiB.
    #[arg(long, default_value_t = DEFAULT_MEMORY)]
    memory: u32,
    /// Set a variable; PATH, HOME, CASEMATE_*, CARGO_*, RUST* and a few more pass as they are.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Keep the machine's console in this file.
    #[arg(long, value_name = "FILE")]
    keep_log: Option<PathBuf>,
    /// Forward standard input (else the command finds it empty).
    #[arg(long)]
    stdin: bool,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// What a lab is to run.
pub struct Job {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// The overall bound.
    pub timeout: Duration,
    /// The bound of a silence; [`SILENCE`] unless there is a reason.
    pub silence: Duration,
    /// MiB.
    pub memory: u32,
    /// Variables in addition to those that pass as they are.
    pub env: Vec<(String, String)>,
    /// Where to keep the console.
    pub keep_log: Option<PathBuf>,
    /// Whether to forward this process's standard input.
    pub stdin: bool,
}

/// How it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The command's exit code, 128 + n for signal n.
    Exited(u8),
    /// No sign of life within the bound.
    Hung,
    /// The command took longer than allowed.
    TimedOut,
    /// The machine died, or could not be set up.
    Broken,
}

impl Outcome {
    /// The code that `cargo xtask lab` exits with.
    pub fn code(self) -> u8 {
        match self {
            Self::Exited(code) => code,
            Self::Hung => HUNG,
            Self::TimedOut => TIMED_OUT,
            Self::Broken => BROKEN,
        }
    }
}

/// Runs the command line's job.
///
/// # Errors
/// When the lab cannot be put together.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    let mut env = Vec::new();
    for pair in &arguments.env {
        let (name, value) = pair
            .split_once('=')
            .with_context(|| format!("--env {pair}: not NAME=VALUE"))?;
        env.push((name.to_owned(), value.to_owned()));
    }
    let job = Job {
        command: arguments.command.clone(),
        timeout: Duration::from_secs(arguments.timeout),
        silence: Duration::from_secs(arguments.silence),
        memory: arguments.memory,
        env,
        keep_log: arguments.keep_log.clone(),
        stdin: arguments.stdin,
    };
    match run(&job, &mut io::stdout(), &mut io::stderr()) {
        Ok(outcome) => Ok(ExitCode::from(outcome.code())),
        Err(error) => {
            eprintln!("xtask: the lab: {error:#}");
            Ok(ExitCode::from(BROKEN))
        }
    }
}

/// Runs a job, its two streams going to `out` and `err`.
///
/// # Errors
/// When the lab cannot be put together; how the command itself ended is the [`Outcome`].
pub fn run(job: &Job, out: &mut dyn Write, err: &mut dyn Write) -> Result<Outcome> {
    packages::install(&[&packages::QEMU, &packages::BUSYBOX])?;
    let kernel = kernels::lab_kernel()?;
    let place = Place::new(job.keep_log.as_deref())?;
    initrd::write(&place.initrd, &kernel.modules).context("write the lab's initrd")?;
    let (child, wire) = qemu::start(&kernel, &place.initrd, &place.log, job.memory)?;
    let _machine = Machine(child);
    let outcome = converse(job, &kernel, wire, out, err)?;
    if matches!(outcome, Outcome::Hung | Outcome::Broken) {
        writeln!(
            err,
            "xtask: the end of the lab's console:\n{}",
            tail(&place.log, CONSOLE_LINES)
        )?;
    }
    Ok(outcome)
}

/// The directory of one lab, locked for as long as the lab runs.
struct Place {
    initrd: PathBuf,
    log: PathBuf,
    _dir: TempDir,
    _lock: Flock<File>,
}

impl Place {
    fn new(keep_log: Option<&Path>) -> Result<Self> {
        let labs = workspace::target_dir().join("lab");
        fs::create_dir_all(&labs)?;
        remove_abandoned(&labs)?;
        let dir = tempfile::Builder::new().prefix("run-").tempdir_in(&labs)?;
        let lock = lock(dir.path())?.context("a new directory is locked already")?;
        let log = match keep_log {
            Some(path) => std::path::absolute(path)?,
            None => dir.path().join("console"),
        };
        Ok(Self {
            initrd: dir.path().join("initrd"),
            log,
            _dir: dir,
            _lock: lock,
        })
    }
}

fn lock(dir: &Path) -> Result<Option<Flock<File>>> {
    let file = File::open(dir)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error).with_context(|| format!("lock {}", dir.display())),
    }
}

/// Removes what killed labs left: their directories are no longer locked.
fn remove_abandoned(labs: &Path) -> Result<()> {
    for entry in fs::read_dir(labs)? {
        let entry = entry?;
        // A neighbour's fresh directory has no lock for an instant.
        let age = entry
            .metadata()
            .and_then(|data| data.modified())
            .map(|time| time.elapsed());
        let old = matches!(age, Ok(Ok(age)) if age > Duration::from_secs(60));
        if old && lock(&entry.path()).is_ok_and(|lock| lock.is_some()) {
            // Another lab may be doing the same.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Ends QEMU whichever way we leave.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only when it has gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn converse(
    job: &Job,
    kernel: &LabKernel,
    mut wire: UnixStream,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<Outcome> {
    let spec = serde_json::to_vec(&spec(job, kernel)?)?;
    let end = Instant::now()
        .checked_add(job.timeout)
        .context("--timeout is too long")?;
    let mut bound = BOOT;
    let sending = Arc::new(Mutex::new(wire.try_clone()?));
    let (nudging, stdin) = (Arc::clone(&sending), job.stdin);
    // Apart, because the lab reads only once it is up.
    thread::spawn(move || send_input(&sending, spec, stdin));
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            writeln!(
                err,
                "xtask: the lab's time is over ({} s)",
                job.timeout.as_secs()
            )?;
            return Ok(Outcome::TimedOut);
        }
        wire.set_read_timeout(Some(bound.min(left)))?;
        match Frame::read(&mut wire) {
            Ok(Frame::Ready) => {
                bound = job.silence;
                let nudging = Arc::clone(&nudging);
                thread::spawn(move || nudge(&nudging));
            }
            Ok(Frame::Heartbeat) => {}
            Ok(Frame::Stdout(bytes)) => {
                out.write_all(&bytes)?;
                out.flush()?;
            }
            Ok(Frame::Stderr(bytes)) => {
                err.write_all(&bytes)?;
                err.flush()?;
            }
            Ok(Frame::Exited(code)) => return Ok(Outcome::Exited(code)),
            Ok(Frame::Failed(why)) => {
                writeln!(err, "xtask: the lab: {}", String::from_utf8_lossy(&why))?;
                return Ok(Outcome::Broken);
            }
            Ok(Frame::Spec(_) | Frame::Stdin(_) | Frame::Nudge) => {
                bail!("the lab sent a frame of ours")
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if bound <= left {
                    writeln!(
                        err,
                        "xtask: the lab hung: no sign of life for {} s",
                        bound.as_secs()
                    )?;
                    return Ok(Outcome::Hung);
                }
            }
            Err(error) => {
                let what = match error.kind() {
                    ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => {
                        "the lab's machine ended by itself (its kernel panicked, or QEMU failed)"
                    }
                    _ => "the lab's port cannot be read",
                };
                writeln!(err, "xtask: {what}: {error}")?;
                return Ok(Outcome::Broken);
            }
        }
    }
}

/// Sends the command and, when asked, what arrives at our standard input. A write fails only
/// when the lab has ended, which the reading side notices and reports.
fn send_input(wire: &Mutex<UnixStream>, spec: Vec<u8>, stdin: bool) -> io::Result<()> {
    send(wire, &Frame::Spec(spec))?;
    if stdin {
        let mut buffer = vec![0; MAX_PAYLOAD];
        loop {
            let length = io::stdin().read(&mut buffer)?;
            if length == 0 {
                break;
            }
            let input = buffer.iter().take(length).copied().collect();
            send(wire, &Frame::Stdin(input))?;
        }
    }
    send(wire, &Frame::Stdin(Vec::new()))
}

/// See [`Frame::Nudge`]. It ends with the machine.
fn nudge(wire: &Mutex<UnixStream>) {
    while send(wire, &Frame::Nudge).is_ok() {
        thread::sleep(NUDGE);
    }
}

fn send(wire: &Mutex<UnixStream>, frame: &Frame) -> io::Result<()> {
    let mut wire = wire.lock().unwrap_or_else(PoisonError::into_inner);
    frame.write(&mut *wire)
}

fn spec(job: &Job, kernel: &LabKernel) -> Result<Spec> {
    let text = |path: &Path| -> Result<String> {
        Ok(path
            .to_str()
            .with_context(|| format!("{} is not UTF-8", path.display()))?
            .to_owned())
    };
    let cwd = env::current_dir()?;
    let mut env: Vec<_> = env::vars().filter(|(name, _)| passes(name)).collect();
    env.push(("CASEMATE_LAB".to_owned(), "1".to_owned()));
    env.extend(job.env.iter().cloned());
    Ok(Spec {
        argv: job.command.clone(),
        env,
        keep: vec![
            text(&cwd)?,
            text(&workspace::root())?,
            text(&workspace::target_dir())?,
        ],
        cwd: text(&cwd)?,
        modules: text(&kernel.modules)?,
    })
}

/// Whether a variable of ours is the command's too. Never a credential.
fn passes(name: &str) -> bool {
    let known = [
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TERM", "NO_COLOR", "TZ",
    ];
    let families = ["CASEMATE_", "CARGO_", "RUST", "LC_"];
    (known.contains(&name) || families.iter().any(|family| name.starts_with(family)))
        && !name.contains("TOKEN")
}

/// The last lines of the console, without what a terminal would take for commands.
fn tail(log: &Path, lines: usize) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    let last = all
        .get(all.len().saturating_sub(lines)..)
        .unwrap_or_default()
        .join("\n");
    last.chars()
        .filter(|c| !c.is_control() || *c == '\n' || *c == '\t')
        .collect()
}

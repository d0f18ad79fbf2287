//! Runs the jobs that parse kernels and packages in processes of their own.
//!
//! The child is this program again (`casemate kernel jailed JOB`). Before the first byte of its input it changes to a user
//! id that owns nothing but the directory it works in, enters a Landlock domain that ends at that directory (or allows
//! nothing) and a seccomp filter, in that order. Its input is standard input, its result one line of JSON on standard error;
//! what it says when it fails goes through [`plain`] before it reaches a terminal.

use super::{Error, unpack};
use crate::say;
use caps::CapSet;
use casemate_seccomp_filters::{EXIT_VIOLATION, Role, Stage, install, install_violation_reporter};
use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus,
};
use nix::sys::personality::{self, Persona};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, close, getppid, setgroups, setresgid, setresuid};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{IsTerminal, Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// User and group id of unpackers. No account has it, nor any machine: those get theirs from another range.
pub const UNPACKER_ID: u32 = 0x6361_0001;
/// Most that is read of a child's result or complaint, in bytes.
const MAX_REPORT: u64 = 4 << 20;
/// Longest that a child may take: a hostile input must not hold anybody up for ever.
const PATIENCE: Duration = Duration::from_secs(600);
/// Memory of a child, in bytes: dictionaries are at most 128 MiB, everything else is small.
const MAX_MEMORY: u64 = 2 << 30;
/// Greatest file that a child may write, in bytes.
const MAX_FILE: u64 = 1 << 30;
/// Newest Landlock ABI whose file system rights are handled; older kernels handle fewer.
const LANDLOCK_ABI: ABI = ABI::V5;

/// What a child does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Job {
    /// Unpacks a package into its directory.
    Package,
    /// Unpacks a kernel image from standard input to standard output.
    Image,
    /// Indexes modules below its directory; their list is standard input.
    Index,
}

/// How a child is started.
pub struct Task<'a> {
    /// What it does.
    pub job: Job,
    /// Its working directory, the only one it can reach.
    pub directory: &'a Path,
    /// Its standard input. When it is a file, how far it was read is shown as progress.
    pub input: File,
    /// Its standard output.
    pub output: Option<File>,
    /// Go on when the host has no Landlock.
    pub allow_missing_landlock: bool,
    /// The input's name, for messages.
    pub name: &'a str,
}

/// Runs a child to its end and returns its result.
pub fn run<T: DeserializeOwned>(mut task: Task) -> Result<T, Error> {
    let failed = |message: String| Error::Unpack {
        input: task.name.into(),
        message,
    };
    let broken = |error: std::io::Error| failed(format!("cannot run the unpacker: {error}"));
    let job = clap::ValueEnum::to_possible_value(&task.job)
        .map(|value| value.get_name().to_owned())
        .unwrap_or_default();
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["kernel", "jailed", &job])
        .args(["--parent", &std::process::id().to_string()])
        .env_clear()
        .current_dir(task.directory);
    if task.allow_missing_landlock {
        command.arg("--allow-missing=landlock");
    }
    command
        .stdin(task.input.try_clone().map_err(broken)?)
        .stderr(Stdio::piped());
    command.stdout(task.output.take().map_or_else(Stdio::null, Stdio::from));
    let mut child = command.spawn().map_err(broken)?;
    let report = child.stderr.take().map(|stderr| {
        thread::spawn(move || {
            let mut report = Vec::new();
            let _ = stderr.take(MAX_REPORT).read_to_end(&mut report);
            report
        })
    });
    let start = Instant::now();
    let mut progress = Progress::new(&task.input, task.name);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if start.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(5)),
            Ok(None) | Err(_) => {
                let _ = child.kill();
                break child.wait().map_err(broken)?;
            }
        }
        progress.show(&mut task.input);
    };
    progress.clear();
    let report = report
        .and_then(|thread| thread.join().ok())
        .unwrap_or_default();
    if status.success() {
        return serde_json::from_slice(&report)
            .map_err(|error| failed(format!("the unpacker's result is not valid: {error}")));
    }
    Err(failed(complaint(status, &report)))
}

/// Why a child failed, in one line.
fn complaint(status: ExitStatus, report: &[u8]) -> String {
    let said = plain(report);
    match (status.code(), status.signal()) {
        (Some(EXIT_VIOLATION), _) => format!("the unpacker did what its policy forbids ({said})"),
        (_, Some(libc::SIGKILL)) => format!(
            "the unpacker took more than {} s or too much memory",
            PATIENCE.as_secs()
        ),
        (_, Some(signal)) => format!("the unpacker was killed by signal {signal} {said}"),
        _ => said,
    }
}

/// The first line of what a jailed process said, without what could steer a terminal.
fn plain(report: &[u8]) -> String {
    let text = String::from_utf8_lossy(report);
    let line = text.lines().next().unwrap_or_default();
    line.chars()
        .filter(|character| !character.is_control())
        .take(500)
        .collect()
}

/// A line on the terminal, if standard error is one, that shows how far the input has been read.
struct Progress<'a> {
    size: u64,
    name: &'a str,
    last: Option<Instant>,
    shown: bool,
}

impl<'a> Progress<'a> {
    fn new(input: &File, name: &'a str) -> Self {
        let size = input.metadata().map_or(0, |data| data.len());
        let visible = size > 0 && std::io::stderr().is_terminal();
        Self {
            size,
            name,
            last: visible.then(Instant::now),
            shown: false,
        }
    }

    fn show(&mut self, input: &mut File) {
        let Some(last) = self
            .last
            .as_mut()
            .filter(|last| last.elapsed() > Duration::from_millis(200))
        else {
            return;
        };
        *last = Instant::now();
        // The child reads through the same open file description, so its position is ours.
        if let Ok(position) = input.stream_position() {
            let percent = position.saturating_mul(100) / self.size.max(1);
            say::error_text(format_args!("\r{}: unpacking, {percent} % ", self.name));
            self.shown = true;
        }
    }

    fn clear(&self) {
        if self.shown {
            say::error_text("\r\x1b[K");
        }
    }
}

/// The child: confines itself, does its job, says what came of it. False when it failed.
pub fn child(job: Job, parent: i32, allow_missing_landlock: bool) -> bool {
    let result = enter(job, parent, allow_missing_landlock).and_then(|streams| match job {
        Job::Package => unpack::package(streams).and_then(say),
        Job::Image => unpack::image(streams).and_then(say),
        Job::Index => unpack::index(streams).and_then(say),
    });
    if let Err(message) = &result {
        say::error_text(format_args!("{message}\n"));
    }
    result.is_ok()
}

fn say(result: impl Serialize) -> Result<(), String> {
    let text = serde_json::to_string(&result).map_err(|error| error.to_string())?;
    say::error_text(format_args!("{text}\n"));
    Ok(())
}

/// Puts this process into its jail. Nothing has been read yet.
fn enter(job: Job, parent: i32, allow_missing_landlock: bool) -> Result<unpack::Streams, String> {
    close_inherited();
    let streams = unpack::Streams::take().map_err(|error| format!("standard streams: {error}"))?;
    for (resource, limit) in [
        (Resource::RLIMIT_AS, MAX_MEMORY),
        (Resource::RLIMIT_FSIZE, MAX_FILE),
        // 1 and not 0: only 1 also stops a dump into a program (core(5)).
        (Resource::RLIMIT_CORE, 1),
        (Resource::RLIMIT_NOFILE, 64),
        // Should nobody be left to lose his patience.
        (Resource::RLIMIT_CPU, PATIENCE.as_secs()),
    ] {
        setrlimit(resource, limit, limit).map_err(|errno| format!("set {resource:?}: {errno}"))?;
    }
    let domain = landlock_domain(job)?;
    // A caller's `setarch` could take the randomisation of addresses away.
    personality::set(Persona::empty())
        .map_err(|errno| format!("reset the personality: {errno}"))?;
    // The bounding set needs a capability that the change of the user id ends; groups before the user id, while they may
    // still be changed.
    let capabilities = |error| format!("drop capabilities: {error}");
    caps::clear(None, CapSet::Bounding).map_err(capabilities)?;
    let (uid, gid) = (Uid::from_raw(UNPACKER_ID), Gid::from_raw(UNPACKER_ID));
    setgroups(&[]).map_err(|errno| format!("drop groups: {errno}"))?;
    setresgid(gid, gid, gid).map_err(|errno| format!("change the group id: {errno}"))?;
    setresuid(uid, uid, uid).map_err(|errno| format!("change the user id: {errno}"))?;
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
    ] {
        caps::clear(None, set).map_err(capabilities)?;
        if !caps::read(None, set).map_err(capabilities)?.is_empty() {
            return Err(format!("drop capabilities: {set:?} ones are left"));
        }
    }
    prctl::set_dumpable(false).map_err(|errno| format!("forbid dumps: {errno}"))?;
    // After the change of the user id, which clears it: whoever waits for the result may be killed.
    prctl::set_pdeathsig(Signal::SIGKILL)
        .map_err(|errno| format!("die with the parent: {errno}"))?;
    if getppid().as_raw() != parent {
        return Err("whoever started the unpacker has ended".into());
    }
    install_violation_reporter().map_err(|error| error.to_string())?;
    let status = domain
        .restrict_self()
        .map_err(|error| format!("enter a Landlock domain: {error}"))?;
    if status.ruleset == RulesetStatus::NotEnforced && !allow_missing_landlock {
        return Err("this host has no Landlock: --allow-missing=landlock goes on without".into());
    }
    let role = if job == Job::Image {
        Role::Unpacker
    } else {
        Role::Archive
    };
    install(role, Stage::Sealed).map_err(|error| error.to_string())?;
    Ok(streams)
}

/// A domain that ends at the working directory, or that allows nothing.
fn landlock_domain(job: Job) -> Result<landlock::RulesetCreated, String> {
    let allowed: BitFlags<AccessFs> = match job {
        Job::Package => AccessFs::MakeDir | AccessFs::MakeReg | AccessFs::WriteFile,
        Job::Index => AccessFs::ReadFile | AccessFs::MakeReg | AccessFs::WriteFile,
        Job::Image => BitFlags::EMPTY,
    };
    let failed = |error: &dyn std::fmt::Display| format!("make a Landlock domain: {error}");
    let domain = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK_ABI))
        .and_then(Ruleset::create)
        .map_err(|error| failed(&error))?;
    if allowed.is_empty() {
        return Ok(domain);
    }
    let here = PathFd::new(".").map_err(|error| failed(&error))?;
    domain
        .add_rule(PathBeneath::new(here, allowed))
        .map_err(|error| failed(&error))
}

/// Closes what our starter's starter may have left open. Comes first: nothing of our own is open yet.
fn close_inherited() {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    let numbers: Vec<i32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    for number in numbers {
        if number > libc::STDERR_FILENO {
            let _ = close(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn a_childs_words_cannot_steer_a_terminal() {
        assert_eq!(plain(b"bad \x1b[31mfile\x07\nsecond line"), "bad [31mfile");
        assert_eq!(plain(b"\xff\xfe"), "\u{fffd}\u{fffd}");
        assert_eq!(plain("x".repeat(10_000).as_bytes()).len(), 500);
    }
}

//! The command line.

use std::os::fd::RawFd;

use casemate_broker::{MachineId, MachineIdError};
use lexopt::{Arg, Parser, ValueExt};
use thiserror::Error;

use crate::config::Level;
use crate::logging;

/// What `--help` prints.
pub const HELP: &str = "\
Usage: casemate-vmm [--api-sock PATH] [--config-file FILE] [OPTION...]
       casemate-vmm --no-api --config-file FILE [OPTION...]
Runs one microVM. Its first serial port is standard input and output.

  --api-sock PATH     the Unix socket of the API [/run/firecracker.socket]; in a jail the jailer makes it
  --no-api            no API: start from the config file alone
  --config-file FILE  the machine, in Firecracker's config-file schema: start it at once
  --metadata FILE     what the metadata service has at the start, as JSON
  --http-api-max-payload-size N
                      most bytes of a request's body [51200]
  --mmds-size-limit N most bytes of metadata [as --http-api-max-payload-size]
  --id ID             its name: 1 to 64 letters, digits and hyphens [anonymous-instance]
  --enable-pci        virtio devices sit on a PCI bus, not in MMIO windows
  --handover-fd N     what the jailer opened (given by the jailer)
  --log-path FILE     append the log to FILE [standard error]
  --level LEVEL       off, error, warn (or warning), info, debug or trace, in any case
                      [info to a file, warn to standard error]
  --show-level        show each line's level
  --show-log-origin   show each line's place in the source
  --module MODULES    log this module alone (`virtio::net`), or give modules levels of their own
                      (`virtio::net=debug,boot=trace`)
  --metrics-path FILE write metrics to FILE or a named pipe: a JSON line each minute
  --boot-timer        let the guest say that it has booted, by writing the byte 123 to 0xc0000000
  --start-time-us N, --start-time-cpu-us N, --parent-cpu-time-us N
                      when the start began (CLOCK_MONOTONIC), and CPU time spent since, for the metrics
  --snapshot-version  print the version of the snapshots that it writes
  --describe-snapshot FILE
                      print the version of a snapshot's state or memory file, whose it is and what is in it
  --verify-snapshot STATE MEMORY
                      read all of a snapshot's two files, and compare them with their checksums and each other
  --merge-memory FILE DIFF NEW
                      make NEW of a snapshot's memory file and one of what has changed since (Diff)
  --version           print the version
  --help              print this

Exit codes: 0 the guest powered off, 1 the VMM failed while it ran, 2 bad arguments, config or
resources (nothing was started), 10 the guest asked for a reset, 11 the guest crashed, 12 ended by
SIGTERM or SIGINT (of a guest from a config file the first presses the power button), 13 the machine
has moved to another VMM, 159 seccomp violation.";

/// Where the API listens unless said otherwise: where Firecracker's does.
pub const DEFAULT_API_SOCK: &str = "/run/firecracker.socket";
/// Most bytes of the body of a request, unless said otherwise.
pub const DEFAULT_MAX_PAYLOAD: usize = 51200;
/// Most that can be asked for, so that all clients together have no more than a few dozen times that.
const MAX_PAYLOAD: usize = 64 << 20;

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Arguments {
    /// Print [`HELP`].
    Help,
    /// Print the version.
    Version,
    /// Print the version of the snapshots that it writes.
    SnapshotVersion,
    /// Look at a snapshot.
    Look(Look),
    /// Make the last of these files of the memory in the first and the changes in the second.
    MergeMemory([String; 3]),
    /// Run a machine.
    Run(Box<RunArguments>),
}

/// How to look at a snapshot.
#[derive(Debug, PartialEq, Eq)]
pub struct Look {
    /// What is to be said of it.
    pub what: What,
    /// The jailer's table, which then has the files.
    pub handover_fd: Option<RawFd>,
}

/// What is to be said of a snapshot.
#[derive(Debug, PartialEq, Eq)]
pub enum What {
    /// What this file is.
    Describe(String),
    /// Whether these two are whole: the state, and the memory.
    Verify(String, String),
}

/// How to run a machine.
#[derive(Debug, PartialEq, Eq)]
pub struct RunArguments {
    /// Where the config is. Without one, the API has it.
    pub config_file: Option<String>,
    /// Where the API listens, if it does.
    pub api_sock: Option<String>,
    /// Most bytes of the body of a request.
    pub max_payload: usize,
    /// Where metadata is that the guest finds from the start.
    pub metadata: Option<String>,
    /// Most bytes of metadata, as JSON.
    pub mmds_size_limit: usize,
    /// The machine's name.
    pub id: MachineId,
    /// Whether virtio devices sit on a PCI bus.
    pub enable_pci: bool,
    /// The jailer's table.
    pub handover_fd: Option<RawFd>,
    /// Where the log goes, if not to standard error.
    pub log_path: Option<String>,
    /// How the log looks.
    pub logging: logging::Options,
    /// Where metrics go, if anywhere.
    pub metrics_path: Option<String>,
    /// Whether there is a boot timer.
    pub boot_timer: bool,
    /// When the start began.
    pub start_times: StartTimes,
}

/// When whoever started this process began, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StartTimes {
    /// By CLOCK_MONOTONIC.
    pub start_us: Option<u64>,
    /// By this process's CPU clock: what its program before exec had used.
    pub start_cpu_us: Option<u64>,
    /// CPU time of the process that started it.
    pub parent_cpu_us: Option<u64>,
}

/// Why the command line is refused.
#[derive(Debug, Error)]
pub enum Error {
    /// Not an option, or without its value.
    #[error("{0}; see --help")]
    Syntax(#[from] lexopt::Error),
    /// An id that cannot be.
    #[error("--id: {0}")]
    Id(#[from] MachineIdError),
    /// A filter that is none.
    #[error("--module: {0}")]
    Module(#[from] logging::FilterError),
    /// A value that is none.
    #[error("{option} {value:?}: use {allowed}")]
    Value {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// Given twice.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// An option that is not optional.
    #[error("{0}; see --help")]
    Missing(&'static str),
}

/// Reads the command line, without the program's name.
///
/// # Errors
/// See [`Error`].
pub fn parse<I>(arguments: I) -> Result<Arguments, Error>
where
    I: IntoIterator,
    I::Item: Into<std::ffi::OsString>,
{
    let mut parser = Parser::from_args(arguments);
    let (mut no_api, mut config_file, mut id) = (false, None, None);
    let (mut api_sock, mut max_payload) = (None, None);
    let (mut handover_fd, mut log_path, mut level) = (None, None, None);
    let (mut show_level, mut show_origin, mut module) = (false, false, None);
    let (mut metrics_path, mut boot_timer, mut enable_pci) = (None, false, false);
    let mut start_times = StartTimes::default();
    let (mut metadata, mut mmds_size_limit) = (None, None);
    let mut look = None;
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(Arguments::Help),
            Arg::Long("version") | Arg::Short('V') => return Ok(Arguments::Version),
            Arg::Long("no-api") => no_api = true,
            Arg::Long("enable-pci") => enable_pci = true,
            Arg::Long("show-level") => show_level = true,
            Arg::Long("show-log-origin") => show_origin = true,
            Arg::Long("boot-timer") => boot_timer = true,
            Arg::Long("module") => {
                set(&mut module, "--module", parser.value()?.string()?.parse()?)?
            }
            Arg::Long("metrics-path") => {
                set(
                    &mut metrics_path,
                    "--metrics-path",
                    parser.value()?.string()?,
                )?;
            }
            Arg::Long("start-time-us") => {
                microseconds(&mut start_times.start_us, "--start-time-us", &mut parser)?;
            }
            Arg::Long("start-time-cpu-us") => {
                microseconds(
                    &mut start_times.start_cpu_us,
                    "--start-time-cpu-us",
                    &mut parser,
                )?;
            }
            Arg::Long("parent-cpu-time-us") => {
                microseconds(
                    &mut start_times.parent_cpu_us,
                    "--parent-cpu-time-us",
                    &mut parser,
                )?;
            }
            Arg::Long("api-sock") => set(&mut api_sock, "--api-sock", parser.value()?.string()?)?,
            Arg::Long("metadata") => set(&mut metadata, "--metadata", parser.value()?.string()?)?,
            Arg::Long("http-api-max-payload-size") => {
                bytes(&mut max_payload, "--http-api-max-payload-size", &mut parser)?;
            }
            Arg::Long("mmds-size-limit") => {
                bytes(&mut mmds_size_limit, "--mmds-size-limit", &mut parser)?;
            }
            Arg::Long("snapshot-version") => return Ok(Arguments::SnapshotVersion),
            Arg::Long("describe-snapshot") => {
                look = Some(What::Describe(parser.value()?.string()?));
            }
            Arg::Long("verify-snapshot") => {
                let state = parser.value()?.string()?;
                look = Some(What::Verify(state, parser.value()?.string()?));
            }
            Arg::Long("merge-memory") => {
                let mut path = || Ok::<_, Error>(parser.value()?.string()?);
                return Ok(Arguments::MergeMemory([path()?, path()?, path()?]));
            }
            Arg::Long("config-file") => {
                set(&mut config_file, "--config-file", parser.value()?.string()?)?;
            }
            Arg::Long("id") => set(&mut id, "--id", parser.value()?.string()?.parse()?)?,
            Arg::Long("log-path") => set(&mut log_path, "--log-path", parser.value()?.string()?)?,
            Arg::Long("handover-fd") => {
                let option = "--handover-fd";
                let allowed = "the number of an open descriptor, 3 or higher";
                let fd = value(option, parser.value()?.string()?, allowed, |text| {
                    text.parse().ok().filter(|fd| *fd > 2)
                })?;
                set(&mut handover_fd, option, fd)?;
            }
            Arg::Long("level") => {
                let option = "--level";
                let allowed = "off, error, warn, info, debug or trace";
                let parsed = value(option, parser.value()?.string()?, allowed, Level::named)?;
                set(&mut level, option, parsed.0)?;
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if let Some(what) = look {
        return Ok(Arguments::Look(Look { what, handover_fd }));
    }
    if no_api && api_sock.is_some() {
        return Err(Error::Missing("--no-api and --api-sock exclude each other"));
    }
    if no_api && config_file.is_none() {
        return Err(Error::Missing("--config-file is missing, with --no-api"));
    }
    let max_payload = max_payload.unwrap_or(DEFAULT_MAX_PAYLOAD);
    let api_sock = api_sock.unwrap_or_else(|| DEFAULT_API_SOCK.to_owned());
    Ok(Arguments::Run(Box::new(RunArguments {
        config_file,
        api_sock: (!no_api).then_some(api_sock),
        max_payload,
        metadata,
        mmds_size_limit: mmds_size_limit.unwrap_or(max_payload),
        id: match id {
            Some(id) => id,
            None => "anonymous-instance".parse()?,
        },
        enable_pci,
        handover_fd,
        log_path,
        logging: logging::Options {
            level,
            show_level,
            show_origin,
            filter: module.unwrap_or_default(),
        },
        metrics_path,
        boot_timer,
        start_times,
    })))
}

fn microseconds(
    slot: &mut Option<u64>,
    option: &'static str,
    parser: &mut Parser,
) -> Result<(), Error> {
    let text = parser.value()?.string()?;
    let count = value(option, text, "a number of microseconds", |text| {
        text.parse().ok()
    })?;
    set(slot, option, count)
}

fn bytes(slot: &mut Option<usize>, option: &'static str, parser: &mut Parser) -> Result<(), Error> {
    let allowed = "a number of bytes, 1 to 67108864";
    let count = value(option, parser.value()?.string()?, allowed, |text| {
        text.parse().ok().filter(|n| (1..=MAX_PAYLOAD).contains(n))
    })?;
    set(slot, option, count)
}

fn set<T>(slot: &mut Option<T>, option: &'static str, value: T) -> Result<(), Error> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(Error::Twice(option)),
    }
}

fn value<T>(
    option: &'static str,
    text: String,
    allowed: &'static str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<T, Error> {
    parse(&text).ok_or(Error::Value {
        option,
        value: text,
        allowed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::LevelFilter;

    fn refused(arguments: &[&str]) -> String {
        let error = parse(arguments).expect_err("should be refused").to_string();
        assert!(!error.contains('\n'), "{error}");
        error
    }

    #[test]
    fn reads_what_a_jailer_says() {
        let arguments = "--id vm-1 --handover-fd 5 --no-api --config-file config --level debug";
        let Arguments::Run(run) = parse(arguments.split(' ')).unwrap() else {
            panic!("not a run");
        };
        assert_eq!(run.id.as_str(), "vm-1");
        assert_eq!(run.handover_fd, Some(5));
        assert!(!run.enable_pci);
        assert_eq!(run.config_file.as_deref(), Some("config"));
        assert_eq!(run.api_sock, None);
        assert_eq!(run.logging.level, Some(LevelFilter::Debug));
        assert_eq!(parse(["--help"]).unwrap(), Arguments::Help);
        let Arguments::Run(run) = parse(None::<&str>).unwrap() else {
            panic!("not a run");
        };
        assert_eq!(run.api_sock.as_deref(), Some("/run/firecracker.socket"));
        assert_eq!(run.id.as_str(), "anonymous-instance");
        assert_eq!(run.logging.level, None);
        assert_eq!(
            (run.config_file, run.max_payload, run.mmds_size_limit),
            (None, 51200, 51200)
        );
        let arguments = "--api-sock /x --http-api-max-payload-size 7 --mmds-size-limit 8";
        let Arguments::Run(run) = parse(arguments.split(' ')).unwrap() else {
            panic!("not a run");
        };
        assert_eq!(run.api_sock.as_deref(), Some("/x"));
        assert_eq!((run.max_payload, run.mmds_size_limit), (7, 8));
        assert_eq!(parse(["--version"]).unwrap(), Arguments::Version);
    }

    #[test]
    fn reads_what_other_tools_say() {
        let arguments = "--metadata m --show-level --show-log-origin --level Warning --start-time-us 1 \
             --start-time-cpu-us 2 --parent-cpu-time-us 3";
        let Arguments::Run(run) = parse(arguments.split_whitespace()).unwrap() else {
            panic!("not a run");
        };
        assert_eq!(run.metadata.as_deref(), Some("m"));
        let logging = &run.logging;
        assert!(logging.show_level && logging.show_origin);
        assert_eq!(logging.level, Some(LevelFilter::Warn));
        let times = StartTimes {
            start_us: Some(1),
            start_cpu_us: Some(2),
            parent_cpu_us: Some(3),
        };
        assert_eq!(run.start_times, times);
        for (name, level) in [("Off", LevelFilter::Off), ("TRACE", LevelFilter::Trace)] {
            let Arguments::Run(run) = parse(["--level", name]).unwrap() else {
                panic!("not a run");
            };
            assert_eq!(run.logging.level, Some(level));
        }
    }

    #[test]
    fn reads_what_is_asked_of_snapshots() {
        let version = parse(["--id", "x", "--snapshot-version"]).unwrap();
        assert_eq!(version, Arguments::SnapshotVersion);
        let look = |what, handover_fd| Arguments::Look(Look { what, handover_fd });
        let describe = || What::Describe("/s".to_owned());
        for (arguments, wanted) in [
            (&["--describe-snapshot", "/s"][..], look(describe(), None)),
            (&["--describe-snapshot=/s"], look(describe(), None)),
            (
                // As the jailer starts it.
                &[
                    "--id",
                    "x",
                    "--handover-fd",
                    "5",
                    "--describe-snapshot",
                    "/s",
                ],
                look(describe(), Some(5)),
            ),
            (
                &["--verify-snapshot", "/s", "/m"],
                look(What::Verify("/s".to_owned(), "/m".to_owned()), None),
            ),
        ] {
            assert_eq!(parse(arguments).unwrap(), wanted);
        }
        let merged = ["a", "b", "c"].map(str::to_owned);
        let arguments = ["--merge-memory", "a", "b", "c"];
        assert_eq!(parse(arguments).unwrap(), Arguments::MergeMemory(merged));
    }

    #[test]
    fn says_what_is_wrong() {
        for (arguments, text) in [
            (&["--no-api"][..], "--config-file is missing"),
            (&["--config-file"], "--config-file"),
            (&["--bogus"], "--bogus"),
            (&["stray"], "stray"),
            (&["--no-api", "--api-sock", "/x"], "--api-sock"),
            (&["--http-api-max-payload-size", "0"], "payload-size"),
            (&["--mmds-size-limit", "all"], "--mmds-size-limit"),
            (&["--describe-snapshot"], "--describe-snapshot"),
            (&["--verify-snapshot", "/s"], "--verify-snapshot"),
            (&["--merge-memory", "a", "b"], "--merge-memory"),
            (&["--no-api", "--config-file", "c", "--id", "../x"], "--id"),
            (&["--id", ""], "--id"),
            (&["--id", &"x".repeat(300)], "300"),
            (&["--handover-fd", "2"], "--handover-fd"),
            (&["--handover-fd", "x"], "--handover-fd"),
            (&["--level", "loud"], "--level"),
            (&["--module", "net=loud"], "--module"),
            (&["--start-time-us", "soon"], "--start-time-us"),
            (&["--config-file", "a", "--config-file", "b"], "twice"),
        ] {
            let error = refused(arguments);
            assert!(error.contains(text), "{text:?} in {error:?}");
        }
    }
}

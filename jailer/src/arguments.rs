//! The command line: Firecracker's jailer flags, and ours. Checked here, before anything is done.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Component, Path, PathBuf};

pub use grant::{Creatable, Grant, GrantKind};
pub use helper::{HELP as HELPER_HELP, Helper};

use casemate_broker::{MachineId, MachineIdError};
use grant::{check_names, creatable, grant};
use lexopt::{Arg, ValueExt};

mod grant;
mod helper;

/// What `--help` prints.
pub const HELP: &str = "\
Builds an empty jail around a VMM and execs it there.

usage: casemate-jailer --id ID --exec-file FILE --uid N --gid N [OPTIONS] [-- VMM ARGUMENTS]
       casemate-jailer helper …     a jail for a program beside a VMM; see `casemate-jailer helper --help`

The machine:
  --id ID                   1 to 64 letters, digits and hyphens
  --exec-file FILE          the VMM: a static program; it gets `--id ID --handover-fd N` besides its arguments
  --uid N, --gid N          whom it runs as: not 0, best a pair that no other machine has
  --daemonize               in a session of its own, standard streams closed; returns once the VMM runs.
                            What it then fails at goes to the log of --log-fd, which is its standard error
  --new-pid-ns              in a PID namespace of its own; the jailer stays as its parent
  --die-with-parent[=PID]   the VMM is killed when whoever started the jailer ends; with PID, it is known
                            even if it has ended before the jailer could look

What it may use (descriptors, opened now; names are those of the machine config, PATH itself if not given):
  --grant-ro [NAME=]PATH    a file or block device for reading
  --grant-rw [NAME=]PATH    a file or block device for reading and writing
  --grant-append [NAME=]PATH  a file to append to, made if it is not there, or a named pipe to write to
  --grant-tap [NAME=]IF[:N] an existing tap interface, in --netns if that is given; N queues of it, 1 to 8,
                            under NAME, NAME:1, NAME:2...
  --grant-connect [NAME=]PATH  the Unix socket of a vhost-user back-end, or of a handler that brings a snapshot's memory,
                            connected to here
  --grant-userfaultfd       /dev/userfaultfd, for memory that such a handler brings
  --grant-listen [NAME=]PATH  a Unix socket, made here and owned by --uid; guests' connections
                            go to PATH_<port>. The caller removes it.
  --grant-api [NAME=]PATH   a Unix socket for the VMM's API, made and removed likewise. `--api-sock PATH` among
                            the VMM's arguments means the same, beneath the chroot if there is one
  --log-fd N                an inherited descriptor for the log
  --allow-open PATH         a file, or everything beneath a directory, that may be asked for later
  --allow-create [NAME=]PATH  the same, and it may also be made or replaced, such as a snapshot: PATH is a file, which need not
                            be there, or a directory (DIR/). It, or the file's, must be the --uid's to read and write
  --chroot-base-dir DIR     [/srv/jailer] if DIR/<exec name>/ID/root exists, files beneath it may be asked for, and made
  --netns PATH              where taps are; the VMM itself gets an empty network namespace

How much (cgroups are made at <parent>/ID; the caller removes them):
  --cgroup FILE=VALUE       a setting, such as memory.max=1G; may be given several times
  --cgroup-if-there FILE=VALUE  the same, but passed over where this host has no such file
  --cgroup-version 1|2      where to look for a controller [both]
  --parent-cgroup PATH      [the name of --exec-file]
  --resource-limit no-file=N|fsize=N  [no-file=2048; fsize: the largest --grant-rw file, unless streams,
                            the log or a --grant-append go to a file, or files may be asked for later]

  --allow-missing=landlock  start although the kernel has no Landlock
  --help, --version

Symbolic links are refused in every path here but --netns and those of cgroups.
Exit codes: the VMM's own; 2 bad arguments; 125 a step failed; 128+n the VMM died by signal n.
";

/// Firecracker's default for `no-file`.
const DEFAULT_NO_FILE: u64 = 2048;
/// Firecracker's default for `--chroot-base-dir`.
const DEFAULT_CHROOT_BASE: &str = "/srv/jailer";

/// What was asked for.
#[derive(Debug)]
pub enum Command {
    /// Build a jail.
    Run(Box<Arguments>),
    /// `--help`
    Help,
    /// `helper --help`
    HelperHelp,
    /// `--version`
    Version,
}

/// A jail's description.
#[derive(Debug)]
pub struct Arguments {
    /// `--id`
    pub id: MachineId,
    /// `--exec-file`
    pub exec_file: PathBuf,
    /// Its last component: names the cgroup and the chroot.
    pub exec_name: String,
    /// `--uid`, not 0
    pub uid: u32,
    /// `--gid`, not 0
    pub gid: u32,
    /// `--chroot-base-dir`
    pub chroot_base_dir: PathBuf,
    /// `--netns`
    pub netns: Option<PathBuf>,
    /// `--daemonize`
    pub daemonize: bool,
    /// `--new-pid-ns`
    pub new_pid_ns: bool,
    /// `--die-with-parent`
    pub die_with_parent: bool,
    /// Its value: who started the jailer.
    pub parent: Option<i32>,
    /// `--cgroup`
    pub cgroups: Vec<CgroupSetting>,
    /// `--cgroup-version`
    pub cgroup_version: Option<CgroupVersion>,
    /// `--parent-cgroup`, relative and without `..`
    pub parent_cgroup: Option<PathBuf>,
    /// `--resource-limit`
    pub limits: Limits,
    /// `--grant-…`
    pub grants: Vec<Grant>,
    /// `--grant-userfaultfd`
    pub userfaultfd: bool,
    /// `--allow-open`
    pub allow_open: Vec<PathBuf>,
    /// `--allow-create`
    pub allow_create: Vec<Creatable>,
    /// `--log-fd`
    pub log_fd: Option<RawFd>,
    /// `--allow-missing=landlock`
    pub allow_missing_landlock: bool,
    /// What follows `--`.
    pub vmm_arguments: Vec<OsString>,
    /// `helper`: the program is no VMM.
    pub helper: Option<Helper>,
}

/// One `--cgroup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupSetting {
    /// The file's name up to its first dot.
    pub controller: String,
    /// The file.
    pub file: String,
    /// What is written into it.
    pub value: String,
    /// Passed over where there is no such file.
    pub optional: bool,
}

/// Which kind of cgroup hierarchy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupVersion {
    /// One hierarchy for each controller.
    V1,
    /// The unified hierarchy.
    V2,
}

/// `--resource-limit`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Descriptors.
    pub no_file: u64,
    /// Whether `no_file` was asked for.
    pub no_file_asked: bool,
    /// Size of a file that is written, in bytes.
    pub fsize: Option<u64>,
}

/// Why the command line is refused.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentError {
    /// Not an option, or one without its value.
    #[error(transparent)]
    Usage(#[from] lexopt::Error),
    /// The id.
    #[error("--id: {0}")]
    Id(#[from] MachineIdError),
    /// An option that must be there.
    #[error("--{0} is missing")]
    Missing(&'static str),
    /// An option's value.
    #[error("--{option} {value:?}: {why}")]
    Value {
        /// The option's name.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A name was granted twice.
    #[error("{0:?} is granted twice: give each grant a NAME of its own")]
    Twice(String),
}

/// Reads the arguments (without the program's name).
///
/// # Errors
/// One line that says which option is wrong, and how.
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Command, ArgumentError> {
    let mut own: Vec<OsString> = arguments.collect();
    let vmm_arguments = match own.iter().position(|argument| argument == "--") {
        Some(at) => own.split_off(at).into_iter().skip(1).collect(),
        None => Vec::new(),
    };
    let is_helper = own.first().is_some_and(|first| first == "helper");
    own.drain(..usize::from(is_helper));
    let mut parser = lexopt::Parser::from_args(own);
    let (mut id, mut exec_file, mut uid, mut gid) = (None, None, None, None);
    let mut result = Arguments {
        id: "x".parse()?,
        exec_file: PathBuf::new(),
        exec_name: String::new(),
        uid: 0,
        gid: 0,
        chroot_base_dir: DEFAULT_CHROOT_BASE.into(),
        netns: None,
        daemonize: false,
        new_pid_ns: false,
        die_with_parent: false,
        parent: None,
        cgroups: Vec::new(),
        cgroup_version: None,
        parent_cgroup: None,
        limits: Limits {
            no_file: DEFAULT_NO_FILE,
            no_file_asked: false,
            fsize: None,
        },
        grants: Vec::new(),
        userfaultfd: false,
        allow_open: Vec::new(),
        allow_create: Vec::new(),
        log_fd: None,
        allow_missing_landlock: false,
        vmm_arguments,
        helper: is_helper.then(Helper::new),
    };
    while let Some(argument) = parser.next()? {
        let Arg::Long(option) = argument else {
            return Err(argument.unexpected().into());
        };
        // The parser is asked for the value, so it cannot lend the name meanwhile.
        let option = &option.to_owned();
        if let Some(helper) = &mut result.helper
            && helper.take(option, &mut parser)?
        {
            continue;
        }
        match option.as_str() {
            "help" if is_helper => return Ok(Command::HelperHelp),
            "help" => return Ok(Command::Help),
            "version" => return Ok(Command::Version),
            "id" => id = Some(parser.value()?.string()?.parse::<MachineId>()?),
            "exec-file" => exec_file = Some(PathBuf::from(parser.value()?)),
            "uid" => uid = Some(user_number("uid", &parser.value()?.string()?)?),
            "gid" => gid = Some(user_number("gid", &parser.value()?.string()?)?),
            "chroot-base-dir" => result.chroot_base_dir = parser.value()?.into(),
            "netns" => result.netns = Some(parser.value()?.into()),
            "daemonize" => result.daemonize = true,
            "new-pid-ns" => result.new_pid_ns = true,
            "die-with-parent" => {
                result.die_with_parent = true;
                result.parent = parser
                    .optional_value()
                    .map(|value| process_number(&value.string()?))
                    .transpose()?;
            }
            "cgroup" | "cgroup-if-there" => {
                let optional = option == "cgroup-if-there";
                let text = parser.value()?.string()?;
                result.cgroups.push(cgroup_setting(&text, optional)?);
            }
            "cgroup-version" => {
                result.cgroup_version = Some(match parser.value()?.string()?.as_str() {
                    "1" => CgroupVersion::V1,
                    "2" => CgroupVersion::V2,
                    other => return Err(bad("cgroup-version", other, "1 or 2")),
                });
            }
            "parent-cgroup" => {
                result.parent_cgroup = Some(parent_cgroup(&parser.value()?.string()?)?);
            }
            "resource-limit" => resource_limit(&mut result.limits, &parser.value()?.string()?)?,
            "grant-ro" => result
                .grants
                .push(grant(GrantKind::ReadOnly, parser.value()?)?),
            "grant-rw" => result
                .grants
                .push(grant(GrantKind::ReadWrite, parser.value()?)?),
            "grant-append" => result
                .grants
                .push(grant(GrantKind::Append, parser.value()?)?),
            "grant-tap" => result.grants.push(grant(GrantKind::Tap, parser.value()?)?),
            "grant-listen" => result
                .grants
                .push(grant(GrantKind::Listen, parser.value()?)?),
            "grant-connect" => result
                .grants
                .push(grant(GrantKind::Connect, parser.value()?)?),
            "grant-userfaultfd" => result.userfaultfd = true,
            "grant-api" => result.grants.push(grant(GrantKind::Api, parser.value()?)?),
            "allow-create" => result.allow_create.push(creatable(parser.value()?)?),
            "allow-open" => result.allow_open.push(parser.value()?.into()),
            "log-fd" => result.log_fd = Some(log_fd(&parser.value()?.string()?)?),
            "allow-missing" => match parser.value()?.string()?.as_str() {
                "landlock" => result.allow_missing_landlock = true,
                other => {
                    return Err(bad(
                        "allow-missing",
                        other,
                        "only `landlock` may be missing",
                    ));
                }
            },
            _ => return Err(Arg::Long(option).unexpected().into()),
        }
    }
    result.id = id.ok_or(ArgumentError::Missing("id"))?;
    result.exec_file = exec_file.ok_or(ArgumentError::Missing("exec-file"))?;
    result.uid = uid.ok_or(ArgumentError::Missing("uid"))?;
    result.gid = gid.ok_or(ArgumentError::Missing("gid"))?;
    result.exec_name = exec_name(&result.exec_file)?;
    if let Some(helper) = &result.helper {
        helper::check(&result, helper)?;
    } else if let Some(socket) = api_sock(&result.vmm_arguments) {
        let named = |grant: &Grant| grant.kind == GrantKind::Api && *grant.name == *socket;
        if !result.grants.iter().any(named) {
            result.grants.push(grant(GrantKind::ApiSock, socket)?);
        }
    }
    check_names(&result)?;
    if result.daemonize && result.die_with_parent {
        let why = "a daemon outlives whoever started it: not together with --daemonize";
        return Err(bad("die-with-parent", "", why));
    }
    Ok(Command::Run(Box::new(result)))
}

/// The value of `--api-sock`, if the VMM gets it.
fn api_sock(vmm_arguments: &[OsString]) -> Option<OsString> {
    let mut arguments = vmm_arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--api-sock" {
            return arguments.next().cloned();
        }
        if let Some(value) = argument
            .to_str()
            .and_then(|a| a.strip_prefix("--api-sock="))
        {
            return Some(value.into());
        }
    }
    None
}

fn bad(option: &'static str, value: &str, why: &'static str) -> ArgumentError {
    ArgumentError::Value {
        option,
        value: value.to_owned(),
        why,
    }
}

fn user_number(option: &'static str, text: &str) -> Result<u32, ArgumentError> {
    match text.parse() {
        // u32::MAX is "leave it as it is" to setresuid(2).
        Ok(u32::MAX) | Err(_) => Err(bad(option, text, "a number is needed, 1 to 4294967294")),
        Ok(0) => Err(bad(option, text, "a VMM must not run as root")),
        Ok(number) => Ok(number),
    }
}

fn process_number(text: &str) -> Result<i32, ArgumentError> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(bad("die-with-parent", text, "a process id is needed")),
    }
}

fn log_fd(text: &str) -> Result<RawFd, ArgumentError> {
    match text.parse() {
        Ok(number) if number >= 3 => Ok(number),
        _ => Err(bad(
            "log-fd",
            text,
            "an inherited descriptor's number is needed, 3 or more",
        )),
    }
}

/// `<controller>.<name>=<value>`; the name becomes a path's last component.
fn cgroup_setting(text: &str, optional: bool) -> Result<CgroupSetting, ArgumentError> {
    let form = "FILE=VALUE is needed, such as memory.max=1G";
    let (file, value) = text
        .split_once('=')
        .ok_or_else(|| bad("cgroup", text, form))?;
    let (controller, rest) = file
        .split_once('.')
        .ok_or_else(|| bad("cgroup", text, form))?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    if controller.is_empty() || rest.is_empty() || value.is_empty() || !file.chars().all(plain) {
        return Err(bad("cgroup", text, form));
    }
    if controller == "cgroup" {
        return Err(bad("cgroup", text, "cgroup.* files are the jailer's own"));
    }
    Ok(CgroupSetting {
        controller: controller.to_owned(),
        file: file.to_owned(),
        value: value.to_owned(),
        optional,
    })
}

fn parent_cgroup(text: &str) -> Result<PathBuf, ArgumentError> {
    let path = Path::new(text);
    let plain = |part| matches!(part, Component::Normal(_));
    if text.is_empty() || !path.components().all(plain) || text.contains(char::is_control) {
        let why = "a path below the cgroup's root is needed, without `..` and leading `/`";
        return Err(bad("parent-cgroup", text, why));
    }
    Ok(path.to_owned())
}

fn resource_limit(limits: &mut Limits, text: &str) -> Result<(), ArgumentError> {
    let form = "no-file=N or fsize=N is needed";
    let (name, value) = text
        .split_once('=')
        .ok_or_else(|| bad("resource-limit", text, form))?;
    let value = value
        .parse()
        .map_err(|_| bad("resource-limit", text, form))?;
    match name {
        "no-file" => {
            limits.no_file = value;
            limits.no_file_asked = true;
        }
        "fsize" => limits.fsize = Some(value),
        _ => return Err(bad("resource-limit", text, form)),
    }
    Ok(())
}

fn exec_name(path: &Path) -> Result<String, ArgumentError> {
    let name = path.file_name().and_then(|name| name.to_str());
    match name {
        Some(name) if !name.contains(char::is_control) => Ok(name.to_owned()),
        _ => Err(bad(
            "exec-file",
            &path.to_string_lossy(),
            "a path to a program is needed",
        )),
    }
}

#[cfg(test)]
mod tests;

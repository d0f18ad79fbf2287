//! `casemate-jailer helper`: the options of a jail for a program beside a VMM.

use std::path::{Component, Path, PathBuf};

use caps::Capability;
use lexopt::ValueExt;

use super::{ArgumentError, Arguments, bad};

/// What `helper --help` prints.
pub const HELP: &str = "\
Runs a program in a jail of its own, with only the files that it is linked with or is given: a vhost-user
back-end, for instance.

usage: casemate-jailer helper --id ID --exec-file FILE --uid N --gid N [OPTIONS] [-- ARGUMENTS]

The program:
  --id ID                   1 to 64 letters, digits and hyphens
  --exec-file FILE          an absolute path to an ELF program. Its loader and libraries are found as the loader
                            would find them, and are in the jail, at the same paths
  --uid N, --gid N          whom it runs as: not 0, best a pair that nobody else has. In its user namespace
                            these are uid 0 and gid 0
  --id-count N              [1] N uids and gids from these on are its own, and 0 to N-1 in its user namespace
  --cap NAME                a capability over these ids' files and processes, such as chown; may be given several
                            times. One of: chown dac_override dac_read_search fowner fsetid kill mknod setfcap
                            setgid setpcap setuid sys_chroot
  --daemonize               in a session of its own, standard streams closed; returns once the program runs
  --die-with-parent[=PID]   killed when whoever started the jailer ends

What it may use:
  --bind-ro PATH            a file or directory, for reading, at the same path in the jail
  --bind-rw PATH            a file, directory or block device, for reading and writing
  --listen PATH             a Unix socket, made here, which only its maker may connect to. It is descriptor 3 of
                            the program, the next one 4, and so on. The caller removes it.
  --proc                    a /proc with itself as /proc/self, and /proc/sys/fs/file-max: virtiofsd reads both
  --log-fd N                with --daemonize: an inherited descriptor for what it says on standard error

How much: --cgroup, --cgroup-if-there, --cgroup-version, --parent-cgroup, --resource-limit and
--allow-missing=landlock are as for a VMM (casemate-jailer --help).

Permissions of bound files are as ever: the program is --uid, and has no right that --uid has not.
Symbolic links are refused in every path here. Exit codes: the program's own; 2 bad arguments;
125 a step failed; 128+n the program died by signal n.
";

/// What a file server needs over its own files. None of them is of use beyond: all namespaces but the user's own
/// belong to the host's root.
const CAPABILITIES: [Capability; 12] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_KILL,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETPCAP,
    Capability::CAP_SETUID,
    Capability::CAP_SYS_CHROOT,
];

/// What only a VMM has.
const VMMS: [&str; 12] = [
    "chroot-base-dir",
    "netns",
    "new-pid-ns",
    "grant-ro",
    "grant-rw",
    "grant-append",
    "grant-tap",
    "grant-connect",
    "grant-listen",
    "grant-userfaultfd",
    "allow-open",
    "allow-create",
];

/// Most sockets.
const MAX_LISTENERS: usize = 16;

/// A helper's jail, beyond what every jail has.
#[derive(Debug, Default)]
pub struct Helper {
    /// `--id-count`, 1 or more
    pub ids: u32,
    /// `--cap`
    pub capabilities: Vec<Capability>,
    /// `--bind-ro` and `--bind-rw`: whether it is writable, and absolute paths
    pub binds: Vec<(bool, PathBuf)>,
    /// `--listen`
    pub listeners: Vec<PathBuf>,
    /// `--proc`
    pub proc: bool,
}

impl Helper {
    pub(super) fn new() -> Self {
        Self {
            ids: 1,
            ..Self::default()
        }
    }

    /// Takes an option. False if it is one that every jail has.
    pub(super) fn take(
        &mut self,
        option: &str,
        parser: &mut lexopt::Parser,
    ) -> Result<bool, ArgumentError> {
        match option {
            "id-count" => {
                let text = parser.value()?.string()?;
                let count = text.parse().ok().filter(|count| *count > 0);
                self.ids = count.ok_or_else(|| bad("id-count", &text, "a number of 1 or more"))?;
            }
            "cap" => self
                .capabilities
                .push(capability(&parser.value()?.string()?)?),
            "bind-ro" => self.bind("bind-ro", parser)?,
            "bind-rw" => self.bind("bind-rw", parser)?,
            "listen" => {
                if self.listeners.len() >= MAX_LISTENERS {
                    return Err(bad("listen", "", "16 sockets at most"));
                }
                self.listeners.push(parser.value()?.into());
            }
            "proc" => self.proc = true,
            option if VMMS.contains(&option) || option == "grant-api" => {
                return Err(lexopt::Arg::Long(option).unexpected().into());
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn bind(
        &mut self,
        option: &'static str,
        parser: &mut lexopt::Parser,
    ) -> Result<(), ArgumentError> {
        let path = PathBuf::from(parser.value()?);
        absolute(option, &path)?;
        self.binds.push((option == "bind-rw", path));
        Ok(())
    }
}

/// What only all options together tell.
pub(super) fn check(arguments: &Arguments, helper: &Helper) -> Result<(), ArgumentError> {
    absolute("exec-file", &arguments.exec_file)?;
    for first in [arguments.uid, arguments.gid] {
        // The last number of all is no id.
        if first.checked_add(helper.ids).is_none() {
            let why = "so many from --uid and --gid on do not exist";
            return Err(bad("id-count", &helper.ids.to_string(), why));
        }
    }
    Ok(())
}

/// A path that is the same inside and outside.
fn absolute(option: &'static str, path: &Path) -> Result<(), ArgumentError> {
    let text = path.to_string_lossy();
    let plain = |part| matches!(part, Component::Normal(_) | Component::RootDir);
    let own_name = path.starts_with(crate::helper::root::PROC);
    let why = if !path.is_absolute() {
        "an absolute path is needed: it is the same in the jail"
    } else if !path.components().all(plain) || path.parent().is_none() {
        "a path without `..` is needed, and not the root"
    } else if text.contains(char::is_control) {
        "it contains a control character"
    } else if own_name {
        "/proc is the jail's own: see --proc"
    } else {
        return Ok(());
    };
    Err(bad(option, &text, why))
}

fn capability(text: &str) -> Result<Capability, ArgumentError> {
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("CAP_") {
        name
    } else {
        format!("CAP_{name}")
    };
    let known = name.parse().ok();
    known
        .filter(|known| CAPABILITIES.contains(known))
        .ok_or_else(|| bad("cap", text, "not one that a helper can have: see --help"))
}

//! Starts the command: looks it up, gives it streams or a terminal, a session and an identity.

use crate::protocol::{FailureKind, Spec};
use crate::{Error, say};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::SigSet;
use nix::unistd::{Gid, Pid, Uid, fchown};
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where a command is looked up when its environment has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The running command and our ends of its streams, all non-blocking.
pub struct Child {
    /// Its process id, which is also its session's and process group's.
    pub pid: Pid,
    /// Its standard input, or its terminal.
    pub stdin: Option<OwnedFd>,
    /// Its standard output, or its terminal.
    pub stdout: Option<OwnedFd>,
    /// Its standard error; none with a terminal.
    pub stderr: Option<OwnedFd>,
    /// Whether the streams are a terminal.
    pub tty: bool,
}

/// Runs what the host asked for.
pub fn spawn(spec: &Spec) -> Result<Child, Error> {
    let name = spec
        .argv
        .first()
        .ok_or_else(|| Error::other("no command to run: argv is empty"))?;
    let directory = Path::new(spec.cwd.as_deref().unwrap_or("/"));
    if !directory.is_dir() {
        return Err(Error::other(format!(
            "working directory {}: no such directory",
            directory.display()
        )));
    }
    let program = find(name, spec, directory)?;

    let mut command = Command::new(&program);
    command
        .arg0(name)
        .args(spec.argv.iter().skip(1))
        .current_dir(directory);
    command
        .env_clear()
        .envs(spec.env.iter().map(|(name, value)| (name, value)));
    if let Some(gid) = spec.gid {
        command.gid(gid);
    }
    if let Some(uid) = spec.uid {
        command.uid(uid); // Clears the supplementary groups too.
    }
    let terminal = if spec.tty {
        Some(terminal(spec, &mut command)?)
    } else {
        None
    };
    in_own_session(&mut command, spec.tty);

    let mut child = command
        .spawn()
        .map_err(|error| refused(name, &program, &error))?;
    drop(command); // Our copies of the terminal's other side: while one is open, its end is not seen.
    let pid = Pid::from_raw(child.id().cast_signed());
    let streams = match terminal {
        Some(terminal) => {
            let twin = terminal
                .try_clone()
                .map_err(|error| Error::other(format!("cannot share the terminal: {error}")))?;
            Child {
                pid,
                stdin: Some(twin),
                stdout: Some(terminal),
                stderr: None,
                tty: true,
            }
        }
        None => Child {
            pid,
            stdin: child.stdin.take().map(Into::into),
            stdout: child.stdout.take().map(Into::into),
            stderr: child.stderr.take().map(Into::into),
            tty: false,
        },
    };
    for stream in [&streams.stdin, &streams.stdout, &streams.stderr]
        .into_iter()
        .flatten()
    {
        fcntl(stream, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(|errno| Error::other(format!("cannot make a stream non-blocking: {errno}")))?;
    }
    Ok(streams)
}

/// Finds the program as execvp(3) does (which also hands a script without `#!` to `/bin/sh`), but says which of 126 and 127 a failure is.
fn find(name: &str, spec: &Spec, directory: &Path) -> Result<PathBuf, Error> {
    let not_found = || {
        Error::new(
            FailureKind::NotFound,
            format!("{name}: not found in the guest"),
        )
    };
    if name.is_empty() {
        return Err(not_found());
    }
    if name.contains('/') {
        // An absolute name replaces the directory.
        return match check(&directory.join(name)) {
            Found::Program(path) => Ok(path),
            Found::NotExecutable(why) => Err(Error::new(
                FailureKind::NotExecutable,
                format!("{name}: {why}"),
            )),
            Found::Nothing => Err(not_found()),
        };
    }
    let path = spec
        .env
        .iter()
        .rev()
        .find(|(name, _)| name == "PATH")
        .map_or(DEFAULT_PATH, |(_, value)| value);
    let mut refusal = None;
    for part in path.split(':') {
        match check(&directory.join(part).join(name)) {
            Found::Program(path) => return Ok(path),
            Found::NotExecutable(why) => refusal = refusal.or(Some(why)),
            Found::Nothing => {}
        }
    }
    match refusal {
        Some(why) => Err(Error::new(
            FailureKind::NotExecutable,
            format!("{name}: {why}"),
        )),
        None => Err(not_found()),
    }
}

enum Found {
    Program(PathBuf),
    NotExecutable(&'static str),
    Nothing,
}

fn check(path: &Path) -> Found {
    match fs::metadata(path) {
        Ok(data) if data.is_dir() => Found::NotExecutable("is a directory"),
        Ok(data) if data.permissions().mode() & 0o111 == 0 => {
            Found::NotExecutable("permission denied")
        }
        Ok(_) => Found::Program(path.to_owned()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Found::NotExecutable("permission denied")
        }
        Err(_) => Found::Nothing,
    }
}

/// Why exec (or a step before it) failed for a program that exists.
fn refused(name: &str, program: &Path, error: &io::Error) -> Error {
    let (kind, why) = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => (
            FailureKind::NotFound,
            "its interpreter or dynamic loader is not found in the guest",
        ),
        Some(Errno::EACCES | Errno::EPERM) => (FailureKind::NotExecutable, "permission denied"),
        Some(Errno::E2BIG) => (FailureKind::Other, "arguments and environment are too long"),
        Some(
            errno @ (Errno::ENOEXEC
            | Errno::EINVAL
            | Errno::ELIBBAD
            | Errno::ETXTBSY
            | Errno::ELOOP),
        ) => (FailureKind::NotExecutable, errno.desc()),
        _ => return Error::other(format!("cannot run {}: {error}", program.display())),
    };
    Error::new(kind, format!("{name}: {why}"))
}

/// Opens a terminal of the wanted size, gives one side to the command, returns ours.
fn terminal(spec: &Spec, command: &mut Command) -> Result<OwnedFd, Error> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Error::other(format!("cannot make a terminal: {what}: {error}"))
    };
    let size = Winsize {
        ws_row: spec.rows,
        ws_col: spec.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let OpenptyResult { master, slave } =
        openpty(&size, None).map_err(|errno| failed("openpty", &errno))?;
    // Later processes of the command must not inherit our side.
    fcntl(&master, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .map_err(|errno| failed("close-on-exec", &errno))?;
    fcntl(&slave, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .map_err(|errno| failed("close-on-exec", &errno))?;
    // A command with an identity of its own must be able to open its terminal again by name.
    if let Err(errno) = fchown(&slave, spec.uid.map(Uid::from_raw), None::<Gid>) {
        say(&format!(
            "cannot give the terminal to user {:?}: {errno}",
            spec.uid
        ));
    }
    if let Err(error) = fs::File::from(slave.try_clone().map_err(|error| failed("dup", &error))?)
        .set_permissions(Permissions::from_mode(0o620))
    {
        say(&format!("cannot set the terminal's mode: {error}"));
    }
    let copy = || slave.try_clone().map_err(|error| failed("dup", &error));
    command
        .stdin(Stdio::from(copy()?))
        .stdout(Stdio::from(copy()?))
        .stderr(Stdio::from(copy()?));
    Ok(master)
}

/// A session of its own, and its standard input as the controlling terminal if it is one.
#[allow(unsafe_code)] // Code between fork and exec.
fn in_own_session(command: &mut Command, tty: bool) {
    if !tty {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
    }
    let prepare = move || {
        nix::unistd::setsid()?;
        // The standard library hands our own mask on, and PID 1 collects signals by blocking them.
        SigSet::empty().thread_set_mask()?;
        if tty {
            // SAFETY: an ioctl on descriptor 0 with an integer argument; no memory is involved (tty_ioctl(4)).
            let result = unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: setsid, sigprocmask and ioctl are async-signal-safe, and nothing is allocated or locked between fork and exec.
    unsafe { command.pre_exec(prepare) };
}

/// Tells a terminal its new size; its foreground process group gets SIGWINCH.
#[allow(unsafe_code)] // No safe wrapper.
pub fn resize(terminal: &OwnedFd, rows: u16, cols: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the size is a valid winsize borrowed for the call, the descriptor is open.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) };
    if result != 0 {
        say(&format!(
            "cannot resize the terminal: {}",
            io::Error::last_os_error()
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(path: &str) -> Spec {
        Spec {
            env: vec![("PATH".into(), path.into())],
            ..Spec::default()
        }
    }

    #[test]
    fn lookup_tells_126_from_127() {
        let root = Path::new("/");
        assert!(find("sh", &spec("/nowhere:/bin"), root).is_ok());
        assert!(find("sh", &Spec::default(), root).is_ok());
        assert!(find("bin/sh", &spec(""), root).is_ok());
        let kind = |name: &str, path: &str| find(name, &spec(path), root).unwrap_err().kind;
        assert_eq!(kind("sh", "/nowhere"), FailureKind::NotFound);
        assert_eq!(kind("", "/bin"), FailureKind::NotFound);
        assert_eq!(kind("/nowhere/sh", ""), FailureKind::NotFound);
        assert_eq!(kind("passwd", "/nowhere:/etc"), FailureKind::NotExecutable);
        assert_eq!(kind("/etc/passwd", ""), FailureKind::NotExecutable);
        assert_eq!(kind("/etc", ""), FailureKind::NotExecutable);
    }
}

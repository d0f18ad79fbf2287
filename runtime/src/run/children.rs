//! The two processes of a run: the monitor, and the jailer that becomes the machine.

use std::ffi::OsString;
use std::io::{PipeReader, PipeWriter, pipe};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use nix::sys::stat::{Mode, umask};

use super::Error;
use super::Manner;
use super::plan::Plan;
use crate::cgroups::Hierarchies;
use crate::monitor::wire::{ConsoleMode, Setup};
use crate::state::Machine;
use crate::state::process::signal_pid;

/// Both processes. Dropping this ends them.
pub struct Children {
    /// Started first: it is sealed by the time the guest says anything.
    pub monitor: Child,
    /// The jailer, and by it the machine.
    pub jailer: Child,
    /// The monitor's socket.
    pub control: OwnedFd,
    ended: bool,
}

impl Children {
    /// Starts both.
    pub fn start(
        plan: &Plan,
        manner: &Manner,
        show_console: bool,
        machine: &mut Machine,
        socket: &Path,
        arguments: Vec<OsString>,
        hierarchies: &Hierarchies,
    ) -> Result<Self, Error> {
        let console = pipe().map_err(Error::system("make a pipe"))?;
        let log = pipe().map_err(Error::system("make a pipe"))?;
        let input = if plan.spec.is_none() {
            Some(pipe().map_err(Error::system("make a pipe"))?)
        } else {
            None
        };
        let listener = match plan.spec {
            Some(_) => Some(listen(socket, machine.uid())?),
            None => None,
        };
        let (control, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(Error::errno("make a socket pair"))?;
        let setup = Setup {
            uid: machine.uid(),
            spec: plan.spec.clone(),
            identity: manner.identity.clone(),
            prefix: manner.prefix.clone(),
            console: match (plan.spec.is_none(), show_console) {
                (true, _) => ConsoleMode::Stdio,
                (false, true) => ConsoleMode::Stderr,
                (false, false) => ConsoleMode::Tail,
            },
            allow_missing_landlock: plan.allow_missing_landlock,
        };
        let setup = serde_json::to_vec(&setup).unwrap_or_default();
        send(control.as_raw_fd(), &setup, MsgFlags::MSG_NOSIGNAL)
            .map_err(Error::errno("set up the monitor"))?;

        let (console_read, console_write) = console;
        let (log_read, log_write) = log;
        let (input_read, input_write) = input.unzip();
        let monitor = start_monitor(theirs, listener, console_read, input_write, log_read)?;
        // Before the guest can say anything.
        let confined = hierarchies.confine_monitor(machine.id().as_str(), monitor.id());
        if let Err((path, error)) = confined {
            end(monitor);
            return Err(Error::file("cannot limit the monitor by", &path)(error));
        }
        let stdin = input_read.map_or_else(Stdio::null, Stdio::from);
        let mut command = Command::new(&plan.jailer);
        command
            .args(arguments)
            .stdin(stdin)
            .stdout(Stdio::from(console_write))
            .stderr(Stdio::from(log_write))
            // A Ctrl-C at the terminal is for this process to pass on in its own way.
            .process_group(0);
        let jailer = command.spawn();
        // The pipes' write ends must not stay open here, or their end is never seen.
        drop(command);
        let jailer = match jailer {
            Ok(jailer) => jailer,
            Err(error) => {
                end(monitor);
                return Err(Error::file("cannot start", &plan.jailer)(error));
            }
        };
        let children = Self {
            monitor,
            jailer,
            control,
            ended: false,
        };
        machine.set_jailer(children.jailer.id())?;
        Ok(children)
    }

    /// Both were waited for.
    pub fn set_ended(&mut self) {
        self.ended = true;
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        if !self.ended {
            signal_pid(self.jailer.id(), Signal::SIGKILL);
            signal_pid(self.monitor.id(), Signal::SIGKILL);
            let _ = self.jailer.wait();
            let _ = self.monitor.wait();
        }
    }
}

fn end(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Where the guest's init connects. Only the machine's user may: its broker, for it.
fn listen(socket: &Path, uid: u32) -> Result<UnixListener, Error> {
    let mut path = socket.as_os_str().to_os_string();
    path.push(format!("_{}", casemate_init::protocol::PORT));
    let path = Path::new(&path);
    // From the start, whatever the caller's mask: a connection made before a change would stay.
    let mask = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(mask);
    let listener = listener.map_err(Error::file("cannot listen at", path))?;
    chown(path, Some(uid), Some(uid)).map_err(Error::file("cannot change", path))?;
    Ok(listener)
}

fn start_monitor(
    control: OwnedFd,
    listener: Option<UnixListener>,
    console: PipeReader,
    console_input: Option<PipeWriter>,
    log: PipeReader,
) -> Result<Child, Error> {
    let mut inherited: Vec<(&str, BorrowedFd<'_>)> = vec![
        ("--control", control.as_fd()),
        ("--console", console.as_fd()),
        ("--log", log.as_fd()),
    ];
    inherited.extend(listener.as_ref().map(|fd| ("--listener", fd.as_fd())));
    inherited.extend(
        console_input
            .as_ref()
            .map(|fd| ("--console-input", fd.as_fd())),
    );
    let mut command = Command::new("/proc/self/exe");
    command.arg0("casemate").arg("monitor");
    for (option, fd) in inherited {
        // All of ours are close-on-exec; this process has one thread, so nobody else starts a child in between, and
        // these are closed here when this function returns.
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))
            .map_err(Error::errno("pass a descriptor on"))?;
        command.arg(option).arg(fd.as_raw_fd().to_string());
    }
    // The monitor needs nothing from the environment, which may hold secrets.
    command.env_clear();
    command
        .spawn()
        .map_err(Error::system("cannot start the monitor"))
}

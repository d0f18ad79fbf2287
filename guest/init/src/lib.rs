//! PID 1 of a Linux guest, and the protocol that it speaks with the runtime.
//!
//! There is no program of its own: `casemate` is put into the guest's initrd as `/init` and calls [`main`] there when
//! [`is_init`] says so. One static program, nothing to find or to keep in step at run time, and `cargo build` alone
//! makes all of it. The price is a few megabytes more in the initrd, of which the section headers and debug
//! information are cut off when it is composed.
//!
//! What happens in the guest, top to bottom: [`main`] mounts the early file systems, loads the initrd's modules
//! ([`modules`]), connects to the host, mounts the root and switches to it ([`mounts`]), says `Ready`, takes the `Spec`, runs
//! the command ([`command`]) while streams and signals flow ([`session`]), and powers off ([`power`]).

pub mod button;
pub mod command;
pub mod cpus;
pub mod hardware;
pub mod host;
pub mod modules;
pub mod mounts;
pub mod parameters;
pub mod power;
pub mod protocol;
pub mod session;

use crate::parameters::Parameters;
use crate::protocol::{Decoder, Exited, Failed, FailureKind, Frame, Ready, Sender, Spec};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// How long init waits for the root device, and for the host to accept its connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the guest does not come up or the command does not run; sent to the host as [`Failed`].
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What kind of failure it is.
    pub kind: FailureKind,
    /// One line for a person.
    pub message: String,
}

impl Error {
    /// An error of this kind.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// An error that fits no other kind.
    pub fn other(message: impl Into<String>) -> Self {
        Self::new(FailureKind::Other, message)
    }
}

/// True when this process was started by a guest's kernel as `/init`: it is PID 1 and has that name.
///
/// PID 1 alone is not enough: `casemate` may be the first process of a container.
pub fn is_init() -> bool {
    std::process::id() == 1
        && std::env::args_os()
            .next()
            .is_some_and(|name| name == "/init")
}

/// Runs as PID 1 until the guest is powered off.
pub fn main() -> ! {
    let mut host = None;
    if let Err(error) = guest(&mut host) {
        say(&error.message);
        if let Some(host) = host {
            let failed = Failed {
                kind: error.kind,
                message: error.message,
            };
            session::last_frame(&host, &Frame::Failed(failed));
        }
    }
    power::off()
}

/// The guest's life. Leaves the connection in `host` when it fails, so that the failure can be reported over it.
fn guest(host: &mut Option<OwnedFd>) -> Result<(), Error> {
    mounts::early()?;
    power::ctrl_alt_del_is_a_signal();
    let parameters = Parameters::read()?;
    let problems = modules::load_all()?;
    mounts::prefer_virtio_console();
    let stream = host::connect(PATIENCE).map_err(|error| with_problems(error, &problems))?;
    let stream = host.insert(stream);

    let root = parameters.root.as_deref().ok_or_else(|| {
        Error::new(
            FailureKind::Mount,
            "no root file system: the kernel command line has no casemate.root=",
        )
    })?;
    mounts::root(root, &parameters, PATIENCE).map_err(|error| with_problems(error, &problems))?;
    host::loopback_up();

    let ready = Ready {
        version: protocol::VERSION,
        kernel: kernel_release(),
    };
    session::send(stream, &Frame::Ready(ready))?;
    let mut decoder = Decoder::new(Sender::Host);
    let spec = session::receive_spec(stream, &mut decoder)?;
    set_hostname(&spec);
    let signals = session::Signals::block()?;
    let child = command::spawn(&spec)?;
    let hardware = hardware::Hardware::listen();
    let ended = session::run(
        stream,
        decoder,
        child,
        &signals,
        &hardware,
        &power::kill_everyone,
    )?;
    if let Some(exited) = ended {
        session::last_frame(stream, &Frame::Exited(exited));
    }
    Ok(())
}

/// Adds to an error what went wrong with modules before it, which is most likely its cause.
fn with_problems(mut error: Error, problems: &[String]) -> Error {
    if !problems.is_empty() {
        error.message = format!("{}; earlier: {}", error.message, problems.join("; "));
    }
    error
}

fn kernel_release() -> String {
    match nix::sys::utsname::uname() {
        Ok(name) => name.release().to_string_lossy().into_owned(),
        Err(_) => String::new(),
    }
}

fn set_hostname(spec: &Spec) {
    if !spec.hostname.is_empty()
        && let Err(error) = nix::unistd::sethostname(&spec.hostname)
    {
        say(&format!(
            "cannot set the host name to {:?}: {error}",
            spec.hostname
        ));
    }
}

/// One line to the console.
pub fn say(message: &str) {
    eprintln!("casemate-init: {message}");
}

/// What [`session::run`] gives back: how the command ended, or `None` when the host went away.
pub type Ended = Option<Exited>;

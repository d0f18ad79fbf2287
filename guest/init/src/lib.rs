//! PID 1 of a Linux guest, and the protocol that it speaks with the runtime.
//!
//! There is no program of its own: `casemate` is put into the guest's initrd as `/init` and calls [`main`] there when
//! [`is_init`] says so. One static program, nothing to find or to keep in step at run time, and `cargo build` alone
//! makes all of it. The price is a few megabytes more in the initrd, of which the section headers and debug
//! information are cut off when it is composed.
//!
//! What happens in the guest, top to bottom: [`main`] mounts the early file systems, loads the initrd's modules
//! ([`modules`]), connects to the host, mounts the root and switches to it ([`mounts`]), says `Ready`, takes the `Spec`, runs
//! the command ([`command`]) while streams and signals flow ([`session`]), and powers off ([`power`]). For a snapshot all
//! but this process is held ([`freezer`]); a machine that goes on from one connects again ([`link`]) and becomes another one
//! ([`identity`]) before it lets go.

pub mod button;
pub mod command;
pub mod cpus;
pub mod freezer;
pub mod hardware;
pub mod host;
pub mod identity;
pub mod link;
pub mod modules;
pub mod mounts;
pub mod parameters;
pub mod power;
pub mod protocol;
pub mod session;

use crate::freezer::Freezer;
use crate::link::{Again, Link};
use crate::parameters::Parameters;
use crate::protocol::{Exited, Failed, FailureKind, Frame, Identity, Ready, Spec};
use std::cell::{Cell, OnceCell};
use std::fs::File;
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
    let host = Host::default();
    let mut link = None;
    if let Err(error) = guest(&host, &mut link) {
        say(&error.message);
        if let Some(mut link) = link {
            let failed = Failed {
                kind: error.kind,
                message: error.message,
            };
            link.last_frame(&Frame::Failed(failed));
        }
    }
    power::off()
}

/// The host of this machine, which is another one after a snapshot.
#[derive(Default)]
struct Host {
    /// `/dev/urandom`, whatever becomes of the name.
    random: OnceCell<File>,
    /// It has become another one.
    is_another: Cell<bool>,
}

impl Again for Host {
    fn connect(&self) -> Result<OwnedFd, Error> {
        host::connect(PATIENCE)
    }

    fn take(&self, identity: &Identity) -> Result<(), Error> {
        self.is_another.set(true);
        identity::take(identity, self.random.get())
    }
}

/// The guest's life. Leaves the connection in `link` when it fails, so that the failure can be reported over it.
fn guest<'a>(host: &'a Host, link: &mut Option<Link<'a>>) -> Result<(), Error> {
    mounts::early()?;
    if let Ok(random) = File::options().write(true).open("/dev/urandom") {
        let _ = host.random.set(random);
    }
    power::ctrl_alt_del_is_a_signal();
    let parameters = Parameters::read()?;
    let problems = modules::load_all()?;
    mounts::prefer_virtio_console();
    let connected = Link::new(host).map_err(|error| with_problems(error, &problems))?;
    let link = link.insert(connected);

    let root = parameters.root.as_deref().ok_or_else(|| {
        Error::new(
            FailureKind::Mount,
            "no root file system: the kernel command line has no casemate.root=",
        )
    })?;
    mounts::root(root, &parameters, PATIENCE).map_err(|error| with_problems(error, &problems))?;
    host::loopback_up();

    let freezer = Freezer::listen();
    let ready = Ready {
        version: protocol::VERSION,
        kernel: kernel_release(),
    };
    link.send(&Frame::Ready(ready), false)?;
    let spec = link.receive_spec()?;
    // One that was saved before has another's name already.
    if !host.is_another.get() {
        set_hostname(&spec);
    }
    let signals = session::Signals::block()?;
    let child = freezer::in_group(|| command::spawn(&spec))?;
    let hardware = hardware::Hardware::listen();
    let end_all = &power::kill_everyone;
    let ended = session::run(link, child, &signals, &hardware, freezer, end_all)?;
    if let Some(exited) = ended {
        link.last_frame(&Frame::Exited(exited));
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

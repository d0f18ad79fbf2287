//! A machine's way to another VMM: what both ends know of it.
//!
//! The one that has it offers it; the other one looks whether it could be there, and then takes the memory while the guest
//! runs on. What was written meanwhile follows in rounds, until the rest is small. Then the guest stops, the rest and its state
//! follow, the other end builds the machine, and runs it once it is told to (`Go`). Until that word the first one can go on
//! as if nothing had been; from that word on it never does.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_cpuid_entry2;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd as _;
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::Config;
use crate::kvm;
use crate::snapshot::stream::{self, Decoder, Frame, Kind, frame};
use crate::snapshot::{format, memory};
use crate::virtio::vsock::socket;

/// How often whoever waits looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);
/// How long the other end may take no bytes, or give none.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes that are gathered before they are sent.
const GATHERED: usize = 256 << 10;

/// What is offered: enough to know whether the machine can be elsewhere.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// What the machine was made from.
    pub config: Config,
    /// Whether its devices are on a PCI bus.
    pub enable_pci: bool,
    /// Address and length of each piece of its memory.
    pub memory: Vec<(u64, u64)>,
    /// What its first vCPU was told of its CPU.
    pub cpuid: Vec<kvm_cpuid_entry2>,
}

/// How a machine is to be sent.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// How long the guest may stand still, in milliseconds.
    pub downtime_ms: u32,
    /// After so many rounds it is given up.
    pub max_rounds: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime_ms: 30,
            max_rounds: 30,
        }
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The other end looks at the offer.
    #[default]
    Offered,
    /// The memory is under way while the guest runs.
    Copying,
    /// Another round may begin.
    WantsRound,
    /// The guest may stop.
    WantsStop,
    /// The guest stands still.
    Stopped,
    /// It is built at the other end, and waits.
    Built,
    /// It runs there.
    Moved,
    /// It has failed, and the machine is where it was.
    Failed,
    /// The other end was told to run it, and has not said that it does.
    Unknown,
}

/// The same, with figures.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Progress {
    /// How far.
    pub phase: Phase,
    /// Rounds so far.
    pub round: u32,
    /// Pages that were sent.
    pub sent_pages: u64,
    /// Pages that are left, as far as is known.
    pub left_pages: u64,
    /// Bytes a second in the last round.
    pub bytes_per_second: u64,
    /// How long the guest has stood still, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_us: Option<u64>,
    /// What went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What two threads know of one machine's way.
pub struct Way {
    progress: Mutex<Progress>,
    /// The control thread is to look.
    news: EventFd,
    cancelled: AtomicBool,
}

impl Way {
    /// One that begins. Made while descriptors may be.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            progress: Mutex::default(),
            news: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            cancelled: AtomicBool::new(false),
        }))
    }

    /// From the start again.
    pub fn begin(&self) {
        *self.lock() = Progress::default();
        self.cancelled.store(false, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.lock().clone()
    }

    /// Changes that.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock());
    }

    /// Changes the phase, and has the control thread look.
    pub fn announce(&self, phase: Phase) {
        self.update(|progress| progress.phase = phase);
        // It fails only if the counter is full: then it is looked at.
        let _ = self.news.write(1);
    }

    /// Readable when the control thread is to look.
    pub fn news(&self) -> &EventFd {
        &self.news
    }

    /// It is not wanted any more.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether it is not.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// Why a machine does not go, or does not come.
#[derive(Debug, Error)]
pub enum Error {
    /// The socket.
    #[error("the connection to the other end broke: {0}")]
    Broken(#[source] io::Error),
    /// It ended.
    #[error("the other end has closed the connection")]
    Closed,
    /// Nothing moves.
    #[error("the other end has been silent for {} s", PATIENCE.as_secs())]
    Silent,
    /// What came makes no sense.
    #[error(transparent)]
    Stream(#[from] stream::Error),
    /// Something else was to come.
    #[error("the other end sent {found:?} where {expected} was expected")]
    Unexpected {
        /// What came.
        found: Kind,
        /// What should have.
        expected: &'static str,
    },
    /// The other end does not take it.
    #[error("the other end refuses the machine: {0}")]
    Refused(String),
    /// Another version.
    #[error("the other end speaks version {0} of this protocol, this one {VERSION}", VERSION = stream::VERSION)]
    Version(u64),
    /// It was asked to.
    #[error("it was cancelled")]
    Cancelled,
    /// The guest is too fast.
    #[error(
        "after {rounds} rounds {left} pages are still to be sent at {rate} MB/s: allow a longer standstill (`downtime_ms`) or more rounds (`max_rounds`), or have the guest write less"
    )]
    TooFast {
        /// So many rounds.
        rounds: u32,
        /// Pages left.
        left: u64,
        /// 10⁶ bytes a second.
        rate: u64,
    },
    /// Memory.
    #[error("the memory: {0}")]
    Memory(#[from] memory::Error),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// It cannot be written.
    #[error("it cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// Likewise.
    #[error(transparent)]
    Format(#[from] format::Error),
    /// Nobody knows.
    #[error(
        "the other end was told to run the machine, and has not said that it does ({0}): it stands still here. Look there; only if it does not run there, and cannot any more, let it go on here"
    )]
    Unknown(Box<Error>),
}

impl Error {
    /// Whether the machine may run at the other end.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown(_))
    }
}

/// A stream socket with frames on it.
pub struct Wire {
    socket: UnixStream,
    decoder: Decoder,
    out: Vec<u8>,
    way: Arc<Way>,
    /// When all is to be over, while the guest stands still.
    deadline: Option<Instant>,
}

impl Wire {
    pub(super) fn new(socket: UnixStream, way: Arc<Way>) -> Self {
        Self {
            socket,
            decoder: Decoder::default(),
            out: Vec::new(),
            way,
            deadline: None,
        }
    }

    /// The guest stands still: from here on what is said and heard takes [`PATIENCE`] at most, all together.
    pub(super) fn hurry(&mut self) {
        self.deadline = Instant::now().checked_add(PATIENCE);
    }

    /// Sends a frame, with others if it is small.
    ///
    /// # Errors
    /// When the other end has gone, or does not take it.
    pub fn send(&mut self, kind: Kind, number: u64, payload: &[u8]) -> Result<(), Error> {
        frame(kind, number, payload, &mut self.out);
        match self.out.len() < GATHERED {
            true => Ok(()),
            false => self.flush(),
        }
    }

    /// Sends what was gathered.
    ///
    /// # Errors
    /// When the other end has gone, or does not take it.
    pub fn flush(&mut self) -> Result<(), Error> {
        let mut rest = self.out.as_slice();
        let mut since = Instant::now();
        while !rest.is_empty() {
            match socket::send(&self.socket, [rest, &[]]) {
                Ok(count) => {
                    rest = rest.get(count..).unwrap_or_default();
                    since = Instant::now();
                }
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, since)?,
                Err(error) => return Err(Error::Broken(error.into())),
            }
        }
        self.out.clear();
        Ok(())
    }

    /// The next frame.
    ///
    /// # Errors
    /// When the other end has gone, or says nothing.
    pub fn receive(&mut self) -> Result<Frame, Error> {
        let since = Instant::now();
        let mut chunk = [0; 4096];
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(frame);
            }
            match socket::receive(&self.socket, &mut chunk) {
                Ok(0) => return Err(Error::Closed),
                Ok(count) => self.decoder.feed(chunk.get(..count).unwrap_or_default()),
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLIN, since)?,
                Err(error) => return Err(Error::Broken(error.into())),
            }
        }
    }

    /// The next frame, which has to be of this kind, unless it says why not.
    ///
    /// # Errors
    /// See [`Wire::receive`].
    pub fn expect(&mut self, kind: Kind, expected: &'static str) -> Result<(), Error> {
        let frame = self.receive()?;
        match frame.kind {
            found if found == kind => Ok(()),
            Kind::Refused => Err(Error::Refused(frame.words())),
            found => Err(Error::Unexpected { found, expected }),
        }
    }

    fn wait(&self, events: PollFlags, since: Instant) -> Result<(), Error> {
        if self.way.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let late = self.deadline.is_some_and(|at| at <= Instant::now());
        if late || since.elapsed() > PATIENCE {
            return Err(Error::Silent);
        }
        let mut watched = [PollFd::new(self.socket.as_fd(), events)];
        let timeout = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
        match poll(&mut watched, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(Error::Broken(error.into())),
        }
    }
}

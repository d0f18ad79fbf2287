//! Memory that another process brings, page by page: the handshake with it, which is Firecracker's, and a thread that waits
//! for its end.
//!
//! Whoever touches a page that is not there waits in the kernel until the handler has brought it. A machine whose handler
//! has ended cannot go on: without an end its threads would wait for ever, and without a userfaultfd they would find
//! zeroes. So the thread here ends the machine, and the process, should the control thread be one of those who wait.
//! Before the machine is complete nothing of the guest has run: then waiting is ended by zeroes, and the load refused.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::process::exit;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use casemate_broker::exit::VMM_FAILED;
use casemate_broker::fdpass;
use log::error;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::Serialize;
use thiserror::Error;
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::ending::{End, EndSignal};
use crate::lockdown::{self, Role, Stage};
use crate::memory::userfault::Userfault;
use crate::memory::{self, GuestMemory, HugePages};
use crate::resources::PageHandlerParts;

/// How long the handler may take for the pages that are touched while the machine is built.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the control thread may take to end the machine.
const GRACE: Duration = Duration::from_secs(2);
/// Bytes of a page.
const PAGE: u64 = 4096;

/// Why no machine has its memory from a handler.
#[derive(Clone, Debug, Error)]
pub enum Error {
    /// Pages of the host's pool.
    #[error("`huge_pages` \"2M\" and a page handler (`backend_type` Uffd) do not go together yet")]
    HugePages,
    /// Other processes would find zeroes.
    #[error("a vhost-user back-end and a page handler (`backend_type` Uffd) do not go together")]
    Shared,
    /// The host refuses.
    #[error("cannot {action} a userfaultfd: {source}")]
    Userfault {
        /// What was being done.
        action: &'static str,
        /// What the host said.
        source: Errno,
    },
    /// It does not listen.
    #[error("cannot tell the page handler where the memory is: {0}; is it running?")]
    Send(#[source] Errno),
    /// No thread, or no eventfd for it.
    #[error("cannot watch the page handler: {0}")]
    Watch(#[source] Errno),
    /// It has gone.
    #[error("the page handler has closed its socket or ended: its own output says why")]
    Gone,
    /// It does nothing.
    #[error("the page handler has not brought the first pages within {} s", PATIENCE.as_secs())]
    Silent,
    /// The thread's filter.
    #[error("the thread that watches the page handler: {0}")]
    Seal(String),
}

/// One region as the handler is told of it. Firecracker's names and units: all of them are bytes.
#[derive(Serialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    /// Where its bytes are in the memory file.
    offset: u64,
    page_size: u64,
    page_size_kib: u64,
}

/// What the thread is told.
enum Order {
    /// The machine is complete: seal yourself, and answer.
    Seal(Arc<EndSignal>),
    /// There will be none.
    Stop,
}

/// The handler, as the machine has it.
pub struct PageHandler {
    lost: Arc<OnceLock<Error>>,
    wake: Arc<EventFd>,
    orders: Sender<Order>,
    answers: Receiver<Result<(), Error>>,
    thread: Option<JoinHandle<()>>,
}

impl PageHandler {
    /// Memory in these regions whose pages the handler brings, and the thread that waits for its end.
    ///
    /// # Errors
    /// When the host refuses, or the handler has gone.
    pub fn allocate(
        parts: PageHandlerParts,
        lost: &Arc<OnceLock<Error>>,
        regions: &[(u64, u64)],
        options: memory::Options,
    ) -> Result<(GuestMemory, Self), super::Error> {
        if options.huge_pages == HugePages::TwoMegabytes {
            return Err(Error::HugePages.into());
        }
        if options.shared {
            return Err(Error::Shared.into());
        }
        let memory = memory::allocate_regions(regions, options)?;
        let handler = Self::start(parts, lost, &memory)?;
        Ok((memory, handler))
    }

    fn start(
        parts: PageHandlerParts,
        lost: &Arc<OnceLock<Error>>,
        memory: &GuestMemory,
    ) -> Result<Self, Error> {
        let PageHandlerParts { socket, device } = parts;
        let failed = |action| {
            move |error: std::io::Error| Error::Userfault {
                action,
                source: errno(&error),
            }
        };
        let userfault = Userfault::new(&device).map_err(failed("make"))?;
        userfault.register(memory).map_err(failed("register"))?;
        let mappings = serde_json::to_vec(&mappings(memory));
        let mappings = mappings.map_err(|_| Error::Send(Errno::EINVAL))?;
        fdpass::send(socket.as_fd(), &mappings, Some(userfault.as_fd())).map_err(Error::Send)?;

        let watch = |error: std::io::Error| Error::Watch(errno(&error));
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = EventFd::from_flags(flags).map_err(Error::Watch)?;
        let wake = Arc::new(wake);
        let (orders, to_do) = channel();
        let (results, answers) = channel();
        let watcher = Watcher {
            socket,
            userfault,
            memory: memory.clone(),
            wake: Arc::clone(&wake),
            orders: to_do,
            results,
            lost: Arc::clone(lost),
        };
        let thread = Builder::new().name("watcher".to_owned());
        let thread = thread.spawn(move || watcher.run()).map_err(watch)?;
        Ok(Self {
            lost: Arc::clone(lost),
            wake,
            orders,
            answers,
            thread: Some(thread),
        })
    }

    /// The machine is complete: from now on it ends with the handler.
    ///
    /// # Errors
    /// When the handler has gone meanwhile.
    pub fn settle(&self, ends: &Arc<EndSignal>) -> Result<(), Error> {
        self.tell(Order::Seal(Arc::clone(ends)));
        let answer = self.answers.recv();
        answer.unwrap_or_else(|_| Err(self.lost.get().cloned().unwrap_or(Error::Gone)))
    }

    fn tell(&self, order: Order) {
        // A thread that has ended needs no order.
        let _ = self.orders.send(order);
        let _ = self.wake.write(1);
    }
}

impl Drop for PageHandler {
    fn drop(&mut self) {
        self.tell(Order::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or_default())
}

fn mappings(memory: &GuestMemory) -> Vec<Mapping> {
    let mut offset = 0_u64;
    let mapping = |region: &vm_memory::GuestRegionMmap<memory::DirtyPages>| {
        let mapping = Mapping {
            base_host_virt_addr: region.as_ptr() as u64,
            size: region.len(),
            offset,
            page_size: PAGE,
            page_size_kib: PAGE,
        };
        offset = offset.saturating_add(region.len());
        mapping
    };
    memory.iter().map(mapping).collect()
}

/// The thread that waits. It has the userfaultfd and the socket for as long as the machine lives.
struct Watcher {
    socket: UnixStream,
    userfault: Userfault,
    memory: GuestMemory,
    wake: Arc<EventFd>,
    orders: Receiver<Order>,
    results: Sender<Result<(), Error>>,
    lost: Arc<OnceLock<Error>>,
}

impl Watcher {
    fn run(self) {
        let deadline = Instant::now().checked_add(PATIENCE);
        let ends = loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let lost = match self.wait(left) {
                Wake::Lost => Error::Gone,
                Wake::Late => Error::Silent,
                Wake::Told => match self.orders.try_recv() {
                    Ok(Order::Seal(ends)) => break ends,
                    Ok(Order::Stop) | Err(TryRecvError::Disconnected) => return,
                    Err(TryRecvError::Empty) => continue,
                },
            };
            let _ = self.lost.set(lost);
            // Nobody else touches this memory, and what is made of it is thrown away.
            if let Err(error) = self.userfault.unregister(&self.memory) {
                error!("cannot unregister a userfaultfd: {error}");
            }
            return;
        };
        let sealed = lockdown::enter(Role::Watcher, Stage::Sealed);
        let sealed = sealed.map_err(|error| Error::Seal(error.to_string()));
        let failed = sealed.is_err();
        if self.results.send(sealed).is_err() || failed {
            return;
        }
        loop {
            match self.wait(None) {
                Wake::Lost => break,
                Wake::Told | Wake::Late => match self.orders.try_recv() {
                    Ok(Order::Stop) | Err(TryRecvError::Disconnected) => return,
                    Ok(Order::Seal(_)) | Err(TryRecvError::Empty) => {}
                },
            }
        }
        let why = Error::Gone.to_string();
        ends.announce(End::Failed(why.clone()));
        // A wait that every policy allows.
        let _ = poll(&mut [], milliseconds(GRACE));
        // The control thread waits for a page itself, or for a thread that does.
        error!("the VMM failed: {why}");
        exit(VMM_FAILED.into());
    }

    fn wait(&self, patience: Option<Duration>) -> Wake {
        let timeout = match patience {
            None => PollTimeout::NONE,
            // Rounded up: not to turn around for less than a millisecond.
            Some(left) => milliseconds(left.saturating_add(Duration::from_millis(1))),
        };
        let mut watched = [
            // It has nothing to say: only that it hangs up, which is always told.
            PollFd::new(self.socket.as_fd(), PollFlags::empty()),
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut watched, timeout) {
            Ok(0) => Wake::Late,
            Ok(_) if watched.first().is_some_and(|it| it.any() == Some(true)) => Wake::Lost,
            Ok(_) => {
                let _ = self.wake.read();
                Wake::Told
            }
            Err(_) => Wake::Told,
        }
    }
}

fn milliseconds(time: Duration) -> PollTimeout {
    time.try_into().unwrap_or(PollTimeout::MAX)
}

/// What ended a wait.
enum Wake {
    /// The handler has gone.
    Lost,
    /// Time.
    Late,
    /// An order, maybe.
    Told,
}

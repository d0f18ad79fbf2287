//! What a machine that is configured by requests is made of.
//!
//! A start that fails is tried again: so what is opened for it stays at hand until one succeeds. What is
//! named afterwards comes from what the jailer handed over and nobody has taken, or from the broker.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use log::warn;

use casemate_broker::{
    BrokerPolicy, Client, Handover, HandoverError, Kind, Operation, handover, spawn_unjailed_for,
};

use super::{
    BROKER_PATIENCE, Error, Source, VsockSockets, append, listener, open, open_device, open_file,
    open_listener, open_taps, page_handler, queue_names, shared, tap,
};
use crate::lockdown::{self, Role, Stage};
use crate::virtio::net;

mod creation;

/// Where it comes from.
pub struct Served {
    origin: Origin,
    /// For this thread.
    broker: Option<Client>,
    /// For the device thread.
    device_broker: Option<Arc<Mutex<Client>>>,
    /// Where vsock devices have listened. One that comes may listen where another one has: in a jail nobody else can,
    /// and without one the name is taken as long as the socket is there, which this process cannot remove.
    listeners: BTreeMap<String, Arc<UnixListener>>,
}

enum Origin {
    /// This process opens it, until it is locked down.
    Direct {
        locked: bool,
        /// What a broker cannot give again, by its name.
        kept: BTreeMap<String, OwnedFd>,
    },
    /// The jailer has opened it.
    Jailed {
        handover: Handover,
        /// What of it the machine has.
        shared: Vec<String>,
        /// The queues of its taps. They are the jail's until it ends: a card that comes may have one that another card
        /// has had.
        taps: BTreeMap<String, Arc<File>>,
    },
}

impl Served {
    /// Without a jail: forks a broker that may do what this user may, so the process may have one thread
    /// only, and nothing open that the broker should not have.
    ///
    /// # Errors
    /// When there is no broker.
    pub fn direct() -> Result<Self, Error> {
        let policy = BrokerPolicy {
            unconfined: true,
            tap: Some(tap::open_queue),
            listen: Some(listener::make),
            ..BrokerPolicy::default()
        };
        let seal = || lockdown::enter(Role::UnjailedBroker, Stage::Sealed);
        let [ours, devices] = spawn_unjailed_for(policy, seal)?;
        Ok(Self {
            origin: Origin::Direct {
                locked: false,
                kept: BTreeMap::new(),
            },
            broker: Some(Client::new(ours)),
            device_broker: shared(Some(Client::new(devices))),
            listeners: BTreeMap::new(),
        })
    }

    /// In a jail.
    ///
    /// # Errors
    /// When the brokers' descriptors are none.
    pub fn jailed(mut handover: Handover) -> Result<Self, Error> {
        let mut socket = |name| match handover.take(name, &[Kind::Broker]) {
            Ok(socket) => Ok(Some(socket)),
            Err(HandoverError::Missing(..)) => Ok(None),
            Err(source) => Err(Error::Handover {
                what: "broker",
                source,
            }),
        };
        let device_broker = shared(socket(handover::BROKER)?.map(Client::new));
        let broker = socket(handover::CONTROL_BROKER)?.map(Client::new);
        let names = handover.remaining();
        let names = names.filter(|(_, kind)| *kind == Kind::Tap);
        let names: Vec<String> = names.map(|(name, _)| name.to_owned()).collect();
        let mut taps = BTreeMap::new();
        for name in names {
            if let Ok(queue) = handover.take(&name, &[Kind::Tap]) {
                taps.insert(name, Arc::new(queue.into()));
            }
        }
        Ok(Self {
            listeners: BTreeMap::new(),
            device_broker,
            broker,
            origin: Origin::Jailed {
                handover,
                shared: Vec::new(),
                taps,
            },
        })
    }

    /// The API's socket: in a jail it was made by the jailer.
    ///
    /// # Errors
    /// When it was not, or cannot be made.
    pub fn api_listener(&mut self, path: &str) -> Result<UnixListener, Error> {
        let what = "--api-sock";
        let listener = match &mut self.origin {
            Origin::Direct { .. } => open_listener(what, path)?,
            Origin::Jailed { handover, .. } => {
                let taken = handover.take(path, &[Kind::Listener]);
                taken
                    .map_err(|source| Error::Handover { what, source })?
                    .into()
            }
        };
        let nonblocking = listener.set_nonblocking(true);
        nonblocking.map_err(|source| open(what, path, source))?;
        Ok(listener)
    }

    /// The device thread's way to the broker.
    pub(super) fn device_broker(&self) -> Option<Arc<Mutex<Client>>> {
        self.device_broker.clone()
    }

    pub(super) fn kvm(&mut self) -> Result<File, Error> {
        self.unique("KVM", "kvm", Kind::Kvm, || {
            open_device("/dev/kvm").map(OwnedFd::from)
        })
        .map(File::from)
    }

    /// Gives up what was kept for another start, if it is of no use any more and there can be another one.
    pub(super) fn forget_if(&mut self, name: &str, is_useless: fn(BorrowedFd<'_>) -> bool) {
        if let Origin::Direct {
            locked: false,
            kept,
        } = &mut self.origin
            && kept.get(name).is_some_and(|fd| is_useless(fd.as_fd()))
        {
            kept.remove(name);
        }
    }

    /// What makes userfaultfds.
    pub(super) fn userfaultfd(&mut self) -> Result<File, Error> {
        let (what, name) = ("userfaultfd", handover::USERFAULTFD);
        let device = self.unique(what, name, Kind::Userfaultfd, || {
            page_handler::open_device().map(OwnedFd::from)
        });
        device.map(File::from)
    }

    /// The queues of a tap; see [`Source::open`].
    pub(super) fn taps(&mut self, name: &str, queues: u8) -> Result<Vec<Arc<File>>, Error> {
        let names: Vec<String> = queue_names(name, queues).collect();
        if let Origin::Jailed { handover, taps, .. } = &mut self.origin {
            return handed_over(taps, handover, &names);
        }
        if let Origin::Direct { kept, locked } = &mut self.origin
            && !names.iter().all(|name| kept.contains_key(name))
            && !*locked
        {
            // All at once, and none is in the way of another number of them.
            kept.retain(|other, _| other != name && !other.starts_with(&format!("{name}:")));
            let opened = open_taps(name, queues)?;
            kept.extend(
                names
                    .iter()
                    .cloned()
                    .zip(opened.into_iter().map(OwnedFd::from)),
            );
        }
        let late = |name: &String| Error::TooLate {
            what: "tap",
            name: name.clone(),
        };
        let queues = names.iter().map(|name| {
            let queue = self.unique("tap", name, Kind::Tap, || Err(late(name)))?;
            Ok(Arc::new(queue.into()))
        });
        queues.collect()
    }

    /// Prepares the taps that were handed over for cards that come later, when it cannot be done any more.
    pub(super) fn prepare_taps(&mut self) {
        if let Origin::Jailed { taps, .. } = &mut self.origin {
            taps.retain(|name, queue| {
                let prepared = net::prepare(queue, false);
                prepared
                    .inspect_err(|error| warn!("tap {name:?} cannot be used: {error}"))
                    .is_ok()
            });
        }
    }

    /// The queues of a tap, prepared, after the start: those that were handed over, or else from the broker.
    ///
    /// # Errors
    /// When they cannot be had; in a jail the error names the jailer's flag that grants them.
    pub fn taps_later(&mut self, name: &str, queues: u8) -> Result<Vec<Arc<File>>, Error> {
        if let Origin::Jailed { handover, taps, .. } = &mut self.origin {
            let names: Vec<String> = queue_names(name, queues).collect();
            return handed_over(taps, handover, &names);
        }
        let queue = |_| {
            let op = Operation::Tap {
                name: name.to_owned(),
                several: queues > 1,
            };
            Ok(Arc::new(self.call("tap", name, op)?.into()))
        };
        (0..queues).map(queue).collect()
    }

    /// A connection to another process, such as a vhost-user back-end. After a start that failed that one has been spoken
    /// to, and may not take another one.
    pub(super) fn connection(
        &mut self,
        what: &'static str,
        name: &str,
    ) -> Result<UnixStream, Error> {
        let connected = self.unique(what, name, Kind::Stream, || {
            let connected = UnixStream::connect(name);
            connected
                .map(OwnedFd::from)
                .map_err(|source| open(what, name, source))
        });
        connected.map(UnixStream::from)
    }

    /// Where a vsock device or a debugger's stub listens, before the start and after it. What was handed over or comes
    /// from the broker is non-blocking.
    pub(super) fn listener(
        &mut self,
        what: &'static str,
        path: &str,
    ) -> Result<Arc<UnixListener>, Error> {
        if let Some(listener) = self.listeners.get(path) {
            return Ok(Arc::clone(listener));
        }
        let listener: UnixListener = match &mut self.origin {
            Origin::Direct { locked: false, .. } => open_listener(what, path)?,
            Origin::Direct { .. } => {
                let path = path.to_owned();
                self.call(what, &path.clone(), Operation::Listen { path })?
                    .into()
            }
            Origin::Jailed { handover, .. } => {
                let taken = handover.take(path, &[Kind::Listener]);
                taken
                    .map_err(|source| Error::Handover { what, source })?
                    .into()
            }
        };
        let listener = Arc::new(listener);
        self.listeners
            .insert(path.to_owned(), Arc::clone(&listener));
        Ok(listener)
    }

    /// What a vsock device works with, after the start.
    ///
    /// # Errors
    /// When nobody can listen there.
    pub fn vsock_later(&mut self, path: &str) -> Result<VsockSockets, Error> {
        Ok(VsockSockets {
            listener: self.listener("vsock", path)?,
            broker: self.device_broker(),
        })
    }

    /// Where lines are appended.
    pub(super) fn append(&mut self, what: &'static str, name: &str) -> Result<File, Error> {
        match &mut self.origin {
            Origin::Direct { locked: false, .. } => {
                append::open(name).map_err(|source| open(what, name, source))
            }
            Origin::Direct { .. } => Err(Error::TooLate {
                what,
                name: name.to_owned(),
            }),
            Origin::Jailed { handover, .. } => {
                let found = handover.share(name, &[Kind::Append]);
                found
                    .map(File::from)
                    .map_err(|source| Error::Handover { what, source })
            }
        }
    }

    /// A file, before the start.
    pub(super) fn file(
        &mut self,
        what: &'static str,
        name: &str,
        write: bool,
    ) -> Result<File, Error> {
        match &mut self.origin {
            Origin::Direct { locked: false, .. } => open_file(what, name, write),
            Origin::Direct { .. } => self.ask(what, name, write),
            Origin::Jailed {
                handover, shared, ..
            } => match handover.share(name, file_kinds(write)) {
                Err(HandoverError::Missing(..)) if self.broker.is_some() => {
                    self.ask(what, name, write)
                }
                found => {
                    shared.push(name.to_owned());
                    found
                        .map(File::from)
                        .map_err(|source| Error::Handover { what, source })
                }
            },
        }
    }

    /// A file, after the start: one that was handed over and is not in use, or else from the broker.
    ///
    /// # Errors
    /// When it is neither; the error names the jailer's flag that grants it.
    pub fn file_later(
        &mut self,
        what: &'static str,
        name: &str,
        write: bool,
    ) -> Result<File, Error> {
        if let Origin::Jailed { handover, .. } = &mut self.origin {
            match handover.take(name, file_kinds(write)) {
                Err(HandoverError::Missing(..)) if self.broker.is_some() => {}
                found => {
                    return found
                        .map(File::from)
                        .map_err(|source| Error::Handover { what, source });
                }
            }
        }
        self.ask(what, name, write)
    }

    fn ask(&mut self, what: &'static str, name: &str, write: bool) -> Result<File, Error> {
        let op = Operation::Open {
            name: name.to_owned(),
            write,
        };
        self.call(what, name, op).map(File::from)
    }

    fn call(&mut self, what: &'static str, name: &str, op: Operation) -> Result<OwnedFd, Error> {
        let Some(broker) = &mut self.broker else {
            let source = io::ErrorKind::PermissionDenied.into();
            return Err(open(what, name, source));
        };
        broker
            .call(op, BROKER_PATIENCE)
            .map_err(|source| Error::Broker {
                what,
                name: name.to_owned(),
                source,
            })
    }

    /// What there is once, and is needed again if the start fails.
    fn unique(
        &mut self,
        what: &'static str,
        name: &str,
        kind: Kind,
        open_it: impl FnOnce() -> Result<OwnedFd, Error>,
    ) -> Result<OwnedFd, Error> {
        match &mut self.origin {
            Origin::Jailed {
                handover, shared, ..
            } => {
                let found = handover.share(name, &[kind]);
                shared.push(name.to_owned());
                found.map_err(|source| Error::Handover { what, source })
            }
            Origin::Direct { kept, locked } => {
                let first = match kept.get(name) {
                    Some(first) => first,
                    None if *locked => {
                        let name = name.to_owned();
                        return Err(Error::TooLate { what, name });
                    }
                    None => {
                        let opened = open_it()?;
                        kept.entry(name.to_owned()).or_insert(opened)
                    }
                };
                first.try_clone().map_err(|source| open(what, name, source))
            }
        }
    }

    /// Nothing may be opened from here on: everything that is needed has been, or the broker gives it.
    ///
    /// # Errors
    /// When the kernel refuses a wall.
    pub fn lock_down(&mut self) -> Result<(), lockdown::Error> {
        if let Origin::Direct { locked, .. } = &mut self.origin
            && !*locked
        {
            lockdown::lock_down()?;
            *locked = true;
        }
        Ok(())
    }

    /// The machine has started: what it is made of is its own.
    pub fn settle(&mut self) {
        match &mut self.origin {
            Origin::Direct { kept, .. } => kept.clear(),
            Origin::Jailed {
                handover, shared, ..
            } => {
                for name in shared.drain(..) {
                    let all = [Kind::Kvm, Kind::FileRo, Kind::FileRw];
                    let all = [&all[..], &[Kind::Stream, Kind::Userfaultfd]].concat();
                    // It closes here, and what is of another kind was not shared.
                    drop(handover.take(&name, &all));
                }
            }
        }
    }

    /// A start failed: what was shared for it may be left out of the next one.
    pub fn forget(&mut self) {
        if let Origin::Jailed { shared, .. } = &mut self.origin {
            shared.clear();
        }
    }
}

/// What only a machine that is configured by requests needs to be told; to the others it is nothing, but
/// for the walls.
impl Source {
    /// See [`Served::lock_down`].
    ///
    /// # Errors
    /// When the kernel refuses a wall.
    pub fn lock_down(&mut self) -> Result<(), lockdown::Error> {
        match self {
            Self::Direct => lockdown::lock_down(),
            // Before the hand-over was read.
            Self::Jailed(_) => Ok(()),
            Self::Served(served) => served.lock_down(),
        }
    }

    /// See [`Served::settle`].
    pub fn settle(&mut self) {
        if let Self::Served(served) = self {
            served.settle();
        }
    }

    /// See [`Served::forget`].
    pub fn forget(&mut self) {
        if let Self::Served(served) = self {
            served.forget();
        }
    }

    /// See [`Served::taps_later`].
    ///
    /// # Errors
    /// When they cannot be had.
    pub fn taps_later(&mut self, name: &str, queues: u8) -> Result<Vec<Arc<File>>, Error> {
        match self {
            Self::Served(served) => served.taps_later(name, queues),
            other => other.taps(name, queues),
        }
    }

    /// See [`Served::vsock_later`].
    ///
    /// # Errors
    /// When nobody can listen there.
    pub fn vsock_later(&mut self, path: &str) -> Result<VsockSockets, Error> {
        match self {
            Self::Served(served) => served.vsock_later(path),
            other => Ok(VsockSockets {
                listener: other.listener("vsock", path)?,
                broker: None,
            }),
        }
    }

    /// See [`Served::file_later`].
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn file_later(
        &mut self,
        what: &'static str,
        name: &str,
        write: bool,
    ) -> Result<File, Error> {
        match self {
            Self::Served(served) => served.file_later(what, name, write),
            other => other.file(what, name, write),
        }
    }
}

/// Those of the jail's taps, by the names of their queues.
fn handed_over(
    taps: &BTreeMap<String, Arc<File>>,
    handover: &mut Handover,
    names: &[String],
) -> Result<Vec<Arc<File>>, Error> {
    let queue = |name: &String| match taps.get(name) {
        Some(queue) => Ok(Arc::clone(queue)),
        // All that were handed over are there: the error says what to grant.
        None => {
            let taken = handover.take(name, &[Kind::Tap]);
            let taken = taken.map(|queue| Arc::new(queue.into()));
            taken.map_err(|source| Error::Handover {
                what: "tap",
                source,
            })
        }
    };
    names.iter().map(queue).collect()
}

fn file_kinds(write: bool) -> &'static [Kind] {
    if write {
        &[Kind::FileRw]
    } else {
        &[Kind::FileRo, Kind::FileRw]
    }
}

//! Devices whose work another process does: the front-end of vhost-user.
//!
//! The back-end maps the guest's memory, sees the guest's rings, and is told of doorbells by an eventfd for
//! each queue; it tells of used buffers by another. This device passes both on, so it works behind every
//! transport. A back-end can do to the guest whatever it likes, and to this process nothing: what it says is
//! checked, addresses that it is given are the guest's, and no call waits for it for long.

mod connection;
mod kind;
#[cfg(test)]
pub(super) mod testing;

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use self::connection::Error as BackEndError;
use self::connection::{Connection, Request};
pub use self::kind::{Kind, TAG_LEN};
use super::config_space::ConfigSpace;
use super::device::{
    self, COMMON_FEATURES, DeviceIo, DeviceType, Event, Queues, Traits, VirtioDevice,
};
use super::queue::{Progress, QueueState, QueueStates};
use crate::event_loop::EventSet;
use crate::memory::GuestMemory;

/// How long a back-end may take for an answer. It ends what it has in flight before one of them.
const PATIENCE: Duration = Duration::from_secs(5);
/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_USER_PROTOCOL_F_MQ, _REPLY_ACK and _CONFIG.
const MQ: u64 = 1 << 0;
const REPLY_ACK: u64 = 1 << 3;
const CONFIG: u64 = 1 << 9;
/// Most regions of memory in one message.
const MAX_REGIONS: usize = 8;
/// Keys of what a running device watches: the socket, then one for each queue.
const SOCKET_KEY: u32 = 0;

/// Most queues of a back-end.
pub const MAX_QUEUES: u16 = 8;
const QUEUE_SIZES: &[u16] = &[256; MAX_QUEUES as usize];

/// A device and its back-end.
#[derive(Debug)]
pub struct VhostUserOptions {
    /// Its name in errors.
    pub id: String,
    /// Connected to the back-end.
    pub socket: UnixStream,
    /// What it is.
    pub kind: Kind,
}

/// Why a back-end cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// It does not speak as it must.
    #[error("vhost-user device {id}: {source}")]
    BackEnd {
        /// The device.
        id: String,
        /// What is wrong.
        source: BackEndError,
    },
    /// It cannot do what every device here does.
    #[error("vhost-user device {id}: its back-end has no {what}")]
    Lacks {
        /// The device.
        id: String,
        /// What is missing.
        what: &'static str,
    },
    /// No eventfd.
    #[error("vhost-user device {id}: cannot make an eventfd: {source}")]
    EventFd {
        /// The device.
        id: String,
        /// What the host said.
        source: io::Error,
    },
}

/// A device that another process works for.
pub struct VhostUser {
    id: String,
    connection: Connection,
    device_type: DeviceType,
    features: u64,
    /// Those of them that the back-end knows nothing of.
    own_features: u64,
    config: Arc<ConfigSpace>,
    queues: Vec<Wires>,
    running: Option<(QueueStates, DeviceIo)>,
    /// Whether the back-end failed: it gets no further chance.
    gone: bool,
}

/// The eventfds of one queue.
struct Wires {
    /// From the driver to the back-end.
    kick: EventFd,
    /// From the back-end to the driver.
    call: EventFd,
}

impl VhostUser {
    /// Takes up the conversation with a back-end. Called before the thread is sealed: a sealed one gets no
    /// eventfds.
    ///
    /// # Errors
    /// When the back-end cannot do what is needed, or does not answer.
    pub fn new(options: VhostUserOptions) -> Result<Self, Error> {
        Self::with_patience(options, PATIENCE)
    }

    pub(super) fn with_patience(
        options: VhostUserOptions,
        patience: Duration,
    ) -> Result<Self, Error> {
        let VhostUserOptions { id, socket, kind } = options;
        let mut connection = Connection::new(socket, patience);
        let (features, protocol) = greet(&mut connection, &id)?;
        let bad = |source| Error::BackEnd {
            id: id.clone(),
            source,
        };
        let Some(offer) = kind.offer(&connection, features, protocol).map_err(bad)? else {
            let what = "configuration to read (VHOST_USER_PROTOCOL_F_CONFIG)";
            return Err(Error::Lacks { id, what });
        };
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let wires = |_| {
            Ok(Wires {
                kick: eventfd()?,
                call: eventfd()?,
            })
        };
        let queues = (0..offer.queues.clamp(1, MAX_QUEUES)).map(wires);
        let queues = queues.collect::<io::Result<_>>();
        Ok(Self {
            queues: queues.map_err(|source| Error::EventFd {
                id: id.clone(),
                source,
            })?,
            id,
            connection,
            device_type: offer.device_type,
            features: offer.features,
            own_features: offer.own_features,
            config: ConfigSpace::new(offer.config),
            running: None,
            gone: false,
        })
    }

    /// Sets everything up for a driver.
    fn set_up(&self, states: &QueueStates, features: u64, io: &DeviceIo) -> Result<(), SetUpError> {
        let connection = &self.connection;
        let features = features & !self.own_features | PROTOCOL_FEATURES;
        connection.tell(Request::SetFeatures, &features.to_le_bytes(), &[])?;
        let (table, fds) = memory_table(&io.memory)?;
        connection.tell(Request::SetMemTable, &table, &fds)?;
        for ((index, state), wires) in (0..).zip(states).zip(&self.queues) {
            let Some(state) = state else { continue };
            let word = |value: u32| pair(index, value);
            let tell =
                |request, payload: &[u8], fds: &[RawFd]| connection.tell(request, payload, fds);
            tell(Request::SetVringNum, &word(state.size.into()), &[])?;
            tell(
                Request::SetVringBase,
                &word(state.next_available.into()),
                &[],
            )?;
            tell(Request::SetVringAddr, &addresses(index, state), &[])?;
            let index = u64::from(index).to_le_bytes();
            tell(Request::SetVringCall, &index, &[wires.call.as_raw_fd()])?;
            tell(Request::SetVringKick, &index, &[wires.kick.as_raw_fd()])?;
            tell(Request::SetVringEnable, &word(1), &[])?;
        }
        Ok(())
    }

    /// Has the back-end stop a queue; the next available chain then.
    fn stop_queue(&self, index: u32) -> Result<u16, BackEndError> {
        let mut answer = [0; 8];
        let request = Request::GetVringBase;
        self.connection.ask(request, &pair(index, 0), &mut answer)?;
        let [i0, i1, i2, i3, next @ ..] = answer;
        let next = u16::try_from(u32::from_le_bytes(next)).ok();
        next.filter(|_| u32::from_le_bytes([i0, i1, i2, i3]) == index)
            .ok_or(BackEndError::Nonsense(request))
    }

    fn failed(
        &mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> device::Error {
        self.gone = true;
        device::Error::Host {
            what: "vhost-user back-end",
            source: io::Error::other(format!("{}: {}", self.id, source.into())),
        }
    }
}

/// Why a back-end could not be set up for a driver.
#[derive(Debug, Error)]
enum SetUpError {
    #[error(transparent)]
    BackEnd(#[from] BackEndError),
    #[error("the guest's memory cannot be shared")]
    NotShared,
}

/// Agrees on the protocol: the back-end's features of the device and of the protocol.
fn greet(connection: &mut Connection, id: &str) -> Result<(u64, u64), Error> {
    let talk = |connection: &mut Connection| {
        connection.tell(Request::SetOwner, &[], &[])?;
        let features = connection.ask_u64(Request::GetFeatures)?;
        if features & PROTOCOL_FEATURES == 0 {
            return Ok((features, 0));
        }
        let protocol = connection.ask_u64(Request::GetProtocolFeatures)?;
        let protocol = protocol & (MQ | REPLY_ACK | CONFIG);
        connection.tell(Request::SetProtocolFeatures, &protocol.to_le_bytes(), &[])?;
        connection.acknowledges = protocol & REPLY_ACK != 0;
        Ok((features, protocol))
    };
    let (features, protocol) = talk(connection).map_err(|source| Error::BackEnd {
        id: id.to_owned(),
        source,
    })?;
    let lacks = |what| Error::Lacks {
        id: id.to_owned(),
        what,
    };
    if features & PROTOCOL_FEATURES == 0 {
        return Err(lacks("protocol features"));
    }
    if features & COMMON_FEATURES != COMMON_FEATURES {
        return Err(lacks(
            "VIRTIO_F_VERSION_1, event index or indirect descriptors",
        ));
    }
    Ok((features, protocol))
}

/// The guest's memory as the back-end maps it. The addresses by which it is asked for things are the guest's,
/// so it learns none of this process's.
fn memory_table(memory: &GuestMemory) -> Result<(Vec<u8>, Vec<RawFd>), SetUpError> {
    let count = memory.num_regions();
    if count > MAX_REGIONS {
        return Err(SetUpError::NotShared);
    }
    let mut table = pair(count as u32, 0).to_vec();
    let mut fds = Vec::with_capacity(count);
    for region in memory.iter() {
        // Of a private mapping the back-end would have the file, and not the memory.
        let is_shared = region.flags() & libc::MAP_SHARED != 0;
        let file = region.file_offset().filter(|_| is_shared);
        let file = file.ok_or(SetUpError::NotShared)?;
        let start = region.start_addr().0;
        for number in [start, region.len(), start, file.start()] {
            table.extend(number.to_le_bytes());
        }
        fds.push(file.file().as_raw_fd());
    }
    Ok((table, fds))
}

fn addresses(index: u32, state: &QueueState) -> Vec<u8> {
    let mut bytes = pair(index, 0).to_vec();
    for number in [state.descriptors, state.used, state.available, 0] {
        bytes.extend(number.to_le_bytes());
    }
    bytes
}

fn pair(one: u32, two: u32) -> [u8; 8] {
    (u64::from(two) << 32 | u64::from(one)).to_le_bytes()
}

impl VirtioDevice for VhostUser {
    fn traits(&self) -> Traits {
        Traits {
            device_type: self.device_type,
            features: self.features,
            queue_sizes: QUEUE_SIZES.get(..self.queues.len()).unwrap_or_default(),
        }
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, queues: Queues, features: u64, io: DeviceIo) -> Result<(), device::Error> {
        if self.gone {
            return Err(self.failed(BackEndError::Gone));
        }
        let states = device::states(&queues);
        self.running = Some((states, io.clone()));
        let started = self.set_up(&states, features, &io);
        if let Err(error) = started {
            let error = self.failed(error);
            self.stop();
            return Err(error);
        }
        // Who is told by these descriptors need not read them: each write is an event of its own.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let socket = io
            .events
            .watch(self.connection.socket(), SOCKET_KEY, EventSet::IN);
        let wires = (1..).zip(&self.queues);
        let mut watched = wires.map(|(key, wires)| io.events.watch(&wires.call, key, edge));
        if let Err(error) = socket.and_then(|()| watched.try_for_each(|watched| watched)) {
            self.stop();
            return Err(error.into());
        }
        Ok(())
    }

    fn stop(&mut self) -> QueueStates {
        let Some((mut states, io)) = self.running.take() else {
            return QueueStates::default();
        };
        io.events.unwatch(self.connection.socket());
        for (index, state) in (0..).zip(&mut states) {
            let Some(state) = state else { continue };
            let next = if self.gone {
                None
            } else {
                self.stop_queue(index)
                    .inspect_err(|_| self.gone = true)
                    .ok()
            };
            // The used ring's index, which the back-end wrote; the driver has the same one.
            let used = state.used.checked_add(2).map(GuestAddress);
            let used = used.and_then(|at| io.memory.read_obj::<u16>(at).ok());
            state.next_used = used.unwrap_or(state.next_used);
            // What a back-end that is gone had taken is served again.
            state.next_available = next.unwrap_or(state.next_used);
        }
        for wires in &self.queues {
            io.events.unwatch(&wires.call);
        }
        states
    }

    /// What the back-end has in flight is its own.
    fn hold(&mut self) -> Option<QueueStates> {
        None
    }

    fn obstacle(&self) -> Option<&'static str> {
        Some("its back-end keeps what it has of it")
    }

    fn handle(&mut self, event: Event) -> Result<Progress, device::Error> {
        let Some((_, io)) = &self.running else {
            return Ok(Progress::Done);
        };
        match event {
            Event::Queue(index) => {
                if let Some(wires) = self.queues.get(usize::from(index)) {
                    // It fails only if the counter is full; then the back-end is told already.
                    let _ = wires.kick.write(1);
                }
            }
            Event::Ready {
                key: SOCKET_KEY, ..
            } => {
                self.connection
                    .unasked()
                    .map_err(|error| self.failed(error))?;
            }
            Event::Ready { key, .. } => {
                if let Ok(queue) = u16::try_from(key.saturating_sub(1)) {
                    io.signal.used(queue);
                }
            }
        }
        Ok(Progress::Done)
    }
}

#[cfg(test)]
#[path = "vhost_user_tests.rs"]
mod tests;

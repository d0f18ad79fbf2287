//! All connections of a machine: who they belong to, and whose turn it is.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use log::{debug, log, warn};

use super::connection::{BUFFER, Connection, Ports, SMALL_BUFFER, State};
use super::connector::Connector;
use super::handshake::{self, Handshake};
use super::packet::Header;
use crate::event_loop::{self, EventSet, Registrar};
use crate::metrics::fields::VsockMetrics;
use crate::virtio::device::LogBudget;
use crate::virtio::queue::Progress;

/// Most connections at a time, with those that only the host still knows.
pub const MAX_CONNECTIONS: usize = 1023;
/// Most connections with a large buffer: all of them together hold less than 16 MiB for host
/// programs that do not read.
pub const MAX_LARGE: usize = 128;
/// Most host programs that have not said which port they want; the oldest makes room.
pub const MAX_HANDSHAKES: usize = 64;
/// Most refusals that wait for a guest which takes no packets; more are dropped.
pub const MAX_REFUSALS: usize = 256;
/// Connections accepted, and broker's answers taken, before the other devices get their turn.
const BUDGET: usize = 32;
/// Where the host's ports for its own calls start, beyond those that programs choose.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Keys in the event loop; those of streams follow.
const LISTENER: u32 = 0;
const BROKER: u32 = 1;
const FIRST_STREAM: u32 = 2;

/// Edge-triggered, all of it: what cannot go on now must not wake us until something changes.
const STREAM_EVENTS: EventSet = EventSet::from_bits_truncate(
    EventSet::IN.bits()
        | EventSet::OUT.bits()
        | EventSet::READ_HANG_UP.bits()
        | EventSet::EDGE_TRIGGERED.bits(),
);

/// What a stream's key stands for.
enum Stream {
    Handshake(Handshake),
    Connection(Ports),
    /// A connection that the guest has forgotten, with data that the host's program is to get.
    Orphan(Box<Connection>),
}

/// The connections.
pub struct Hub {
    pub(super) guest_cid: u64,
    listener: Arc<UnixListener>,
    pub(super) connector: Option<Box<dyn Connector>>,
    pub(super) connections: BTreeMap<Ports, Connection>,
    streams: BTreeMap<u32, Stream>,
    handshakes: usize,
    orphans: usize,
    /// There are callers whom the host had no descriptor for.
    callers_wait: bool,
    /// Connections with something for the guest, in the order of their turns.
    pub(super) ready: VecDeque<Ports>,
    /// Connections that ended and of which the guest is to be told by an RST. None is dropped: a guest
    /// that takes no packets gets no new connections instead, so there are at most two for each that
    /// is allowed.
    pub(super) endings: VecDeque<Ports>,
    /// RSTs that belong to no connection.
    pub(super) refusals: VecDeque<Header>,
    next_key: u32,
    next_port: u32,
    failures: LogBudget,
    /// What it counts.
    pub(super) metrics: Arc<VsockMetrics>,
}

impl Hub {
    /// A hub without connections.
    pub fn new(
        guest_cid: u64,
        listener: Arc<UnixListener>,
        connector: Option<Box<dyn Connector>>,
    ) -> Self {
        Self {
            guest_cid,
            listener,
            connector,
            connections: BTreeMap::new(),
            streams: BTreeMap::new(),
            handshakes: 0,
            orphans: 0,
            callers_wait: false,
            ready: VecDeque::new(),
            endings: VecDeque::new(),
            refusals: VecDeque::new(),
            next_key: FIRST_STREAM,
            next_port: FIRST_HOST_PORT,
            failures: LogBudget::default(),
            metrics: Arc::default(),
        }
    }

    /// Begins to listen.
    ///
    /// # Errors
    /// When the kernel refuses to watch the sockets.
    pub fn start(&mut self, events: &Registrar) -> Result<(), event_loop::Error> {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        events.watch(&self.listener, LISTENER, edge)?;
        if let Some(connector) = &self.connector {
            events
                .watch(connector.as_ref(), BROKER, edge)
                .inspect_err(|_| events.unwatch(&self.listener))?;
        }
        Ok(())
    }

    /// Ends every connection and stops listening. Connections do not outlive the device's reset.
    pub fn stop(&mut self, events: &Registrar) {
        events.unwatch(&self.listener);
        if let Some(connector) = &self.connector {
            events.unwatch(connector.as_ref());
        }
        self.connections.clear();
        self.streams.clear();
        self.handshakes = 0;
        self.orphans = 0;
        self.ready.clear();
        self.endings.clear();
        self.refusals.clear();
    }

    /// Does what an event on one of the sockets asks for.
    pub fn handle(&mut self, events: &Registrar, key: u32, set: EventSet) -> Progress {
        match key {
            LISTENER => return self.accept(events),
            BROKER => return self.take_answers(events),
            _ => {}
        }
        match self.streams.get_mut(&key) {
            Some(&mut Stream::Connection(ports)) => {
                if let Some(connection) = self.connections.get_mut(&ports) {
                    connection.ready(set);
                    if connection.state == State::Calling && connection.is_hung_up() {
                        // The one who called has gone before the guest answered.
                        self.reset(events, ports);
                    } else {
                        self.settle(events, ports);
                    }
                }
            }
            Some(Stream::Handshake(_)) => self.proceed(events, key, set),
            Some(Stream::Orphan(orphan)) => {
                orphan.ready(set);
                if !orphan.owes_host() {
                    self.bury(events, key);
                }
            }
            // Closed since the event was fetched.
            None => {}
        }
        Progress::Done
    }

    /// Accepts those who could not be accepted when they called: something may have been closed
    /// since.
    pub fn accept_waiting(&mut self, events: &Registrar) -> Progress {
        if std::mem::take(&mut self.callers_wait) {
            self.accept(events)
        } else {
            Progress::Done
        }
    }

    fn accept(&mut self, events: &Registrar) -> Progress {
        for _ in 0..BUDGET {
            match self.listener.accept() {
                Ok((stream, _)) => self.greet(events, stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Progress::Done;
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    // Out of descriptors. The listener reports nobody twice.
                    self.callers_wait = true;
                    log!(
                        self.failures.level(),
                        "vsock: cannot accept a connection: {error}"
                    );
                    return Progress::Done;
                }
            }
        }
        Progress::More
    }

    /// Waits for a new caller's line, at the expense of the one that keeps us waiting longest.
    fn greet(&mut self, events: &Registrar, stream: UnixStream) {
        if self.handshakes >= MAX_HANDSHAKES {
            let oldest = self
                .streams
                .iter()
                .find_map(|(&key, stream)| matches!(stream, Stream::Handshake(_)).then_some(key));
            if let Some(key) = oldest {
                self.streams.remove(&key);
                self.handshakes = self.handshakes.saturating_sub(1);
            }
        }
        let key = self.new_key();
        // The line may be there already: being watched reports it.
        if let Err(error) = events.watch(&stream, key, STREAM_EVENTS) {
            log!(self.failures.level(), "vsock: {error}");
            return;
        }
        let handshake = Stream::Handshake(Handshake::new(stream));
        self.streams.insert(key, handshake);
        self.handshakes = self.handshakes.saturating_add(1);
    }

    fn proceed(&mut self, events: &Registrar, key: u32, set: EventSet) {
        let Some(Stream::Handshake(handshake)) = self.streams.remove(&key) else {
            return;
        };
        if set.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            // Nobody is there to be told that the guest accepted. This was the last news of that
            // socket: a connection made of it would stay for as long as the guest likes.
            self.handshakes = self.handshakes.saturating_sub(1);
            return;
        }
        match handshake.proceed() {
            handshake::Progress::Waiting(handshake) => {
                self.streams.insert(key, Stream::Handshake(handshake));
            }
            handshake::Progress::Failed(stream) => {
                self.handshakes = self.handshakes.saturating_sub(1);
                events.unwatch(&stream);
            }
            handshake::Progress::Port(stream, port) => {
                self.handshakes = self.handshakes.saturating_sub(1);
                let room = self.room(events);
                match room.and_then(|buffer| Some((self.new_port(port)?, buffer))) {
                    Some((ports, buffer)) => {
                        let connection = Connection::from_host(stream, key, buffer);
                        self.metrics.conns_added.inc();
                        self.connections.insert(ports, connection);
                        self.streams.insert(key, Stream::Connection(ports));
                        self.enqueue(ports);
                    }
                    None => events.unwatch(&stream),
                }
            }
        }
    }

    fn take_answers(&mut self, events: &Registrar) -> Progress {
        for _ in 0..BUDGET {
            let Some(connector) = &mut self.connector else {
                return Progress::Done;
            };
            match connector.receive() {
                Ok(Some((request, result))) => self.answered(events, request, result),
                Ok(None) => return Progress::Done,
                Err(error) => {
                    warn!("vsock: the guest can connect to the host no more: {error}");
                    events.unwatch(connector.as_ref());
                    self.connector = None;
                    self.reset_all(events, |state| matches!(state, State::Asked { .. }));
                }
            }
        }
        Progress::More
    }

    fn answered(
        &mut self,
        events: &Registrar,
        request: u64,
        result: Result<std::os::fd::OwnedFd, String>,
    ) {
        let asked = State::Asked { request };
        let found = self
            .connections
            .iter()
            .find_map(|(&ports, connection)| (connection.state == asked).then_some(ports));
        // The guest may have given up meanwhile; the new socket is then closed right here.
        let Some(ports) = found else { return };
        let connected = result.and_then(|descriptor| {
            let stream = UnixStream::from(descriptor);
            let key = self.new_key();
            events
                .watch(&stream, key, STREAM_EVENTS)
                .map_err(|error| error.to_string())?;
            Ok((stream, key))
        });
        match connected {
            Ok((stream, key)) => {
                self.streams.insert(key, Stream::Connection(ports));
                if let Some(connection) = self.connections.get_mut(&ports) {
                    connection.connected(stream, key);
                }
                self.enqueue(ports);
            }
            Err(error) => {
                debug!("vsock: no connection to port {}: {error}", ports.host);
                self.reset(events, ports);
            }
        }
    }

    /// After something happened to a connection: ends it if it is over, or lets it have a turn.
    pub(super) fn settle(&mut self, events: &Registrar, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        if connection.is_finished() {
            self.reset(events, ports);
        } else if connection.has_output() {
            self.enqueue(ports);
        }
    }

    fn enqueue(&mut self, ports: Ports) {
        if let Some(connection) = self.connections.get_mut(&ports)
            && !connection.queued
        {
            connection.queued = true;
            self.ready.push_back(ports);
        }
    }

    /// Ends a connection and tells the guest.
    pub(super) fn reset(&mut self, events: &Registrar, ports: Ports) {
        self.metrics.conns_killed.inc();
        self.remove(events, ports);
        self.endings.push_back(ports);
    }

    fn reset_all(&mut self, events: &Registrar, which: impl Fn(State) -> bool) {
        let found: Vec<Ports> = self
            .connections
            .iter()
            .filter_map(|(&ports, connection)| which(connection.state).then_some(ports))
            .collect();
        for ports in found {
            self.reset(events, ports);
        }
    }

    fn remove(&mut self, events: &Registrar, ports: Ports) {
        self.hang_up(events, ports);
        self.forget(ports);
    }

    fn forget(&mut self, ports: Ports) -> Option<Connection> {
        let connection = self.connections.remove(&ports)?;
        self.metrics.conns_removed.inc();
        if connection.queued {
            self.ready.retain(|&other| other != ports);
        }
        Some(connection)
    }

    /// The guest knows a connection no more.
    pub(super) fn guest_forgets(&mut self, events: &Registrar, ports: Ports) {
        let owes_host = self
            .connections
            .get(&ports)
            .is_some_and(Connection::owes_host);
        if !owes_host {
            self.remove(events, ports);
        } else if let Some(connection) = self.forget(ports) {
            self.orphans = self.orphans.saturating_add(1);
            self.streams
                .insert(connection.key, Stream::Orphan(Box::new(connection)));
        }
    }

    /// Closes the socket of an orphan.
    fn bury(&mut self, events: &Registrar, key: u32) {
        if let Some(Stream::Orphan(mut orphan)) = self.streams.remove(&key) {
            self.orphans = self.orphans.saturating_sub(1);
            if let Some(stream) = orphan.take_stream() {
                events.unwatch(&stream);
            }
        }
    }

    /// Closes the socket of a connection.
    pub(super) fn hang_up(&mut self, events: &Registrar, ports: Ports) {
        if let Some(connection) = self.connections.get_mut(&ports)
            && let Some(stream) = connection.take_stream()
        {
            events.unwatch(&stream);
            self.streams.remove(&connection.key);
        }
    }

    /// Makes sure that one more connection is allowed: one that only one side still knows makes
    /// room. First one whose host program is gone, then the oldest that the guest has forgotten.
    /// Returns how much the new one may hold for its host program.
    pub(super) fn room(&mut self, events: &Registrar) -> Option<u32> {
        if self.endings.len() >= MAX_CONNECTIONS {
            return None;
        }
        if self.connections.len().saturating_add(self.orphans) >= MAX_CONNECTIONS {
            let lingering = self.connections.iter().find_map(|(&ports, connection)| {
                (connection.state == State::Lingering).then_some(ports)
            });
            match lingering {
                Some(ports) => self.reset(events, ports),
                None => {
                    let key = self.streams.iter().find_map(|(&key, stream)| {
                        matches!(stream, Stream::Orphan(_)).then_some(key)
                    })?;
                    self.bury(events, key);
                }
            }
        }
        let forgotten = self.streams.values().filter_map(|stream| match stream {
            Stream::Orphan(orphan) => Some(orphan.as_ref()),
            _ => None,
        });
        let all = self.connections.values().chain(forgotten);
        let large = all.filter(|connection| connection.is_large()).count();
        Some(if large < MAX_LARGE {
            BUFFER
        } else {
            SMALL_BUFFER
        })
    }

    /// A key that no stream has.
    fn new_key(&mut self) -> u32 {
        // There are fewer streams than keys, so it ends.
        loop {
            let key = self.next_key;
            self.next_key = key.checked_add(1).unwrap_or(FIRST_STREAM);
            if !self.streams.contains_key(&key) {
                return key;
            }
        }
    }

    /// A host port that has no connection to this port of the guest.
    fn new_port(&mut self, guest: u32) -> Option<Ports> {
        (0..=MAX_CONNECTIONS).find_map(|_| {
            let host = self.next_port;
            self.next_port = host.wrapping_add(1) | FIRST_HOST_PORT;
            let ports = Ports { host, guest };
            (host != u32::MAX && !self.connections.contains_key(&ports)).then_some(ports)
        })
    }

    /// Connections there are, for tests.
    #[cfg(test)]
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.connections.len(), self.handshakes, self.streams.len())
    }
}

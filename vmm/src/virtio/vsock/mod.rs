//! The socket device (virtio 1.2, section 5.10), in user space over Unix sockets of the host, by
//! Firecracker's convention:
//!
//! - A program on the host connects to `uds_path`, sends `CONNECT <port>\n`, reads `OK <port>\n` once
//!   the guest accepted, and then has the connection.
//! - A program in the guest connects to CID 2 and a port; the host's end is a Unix socket that
//!   listens on `<uds_path>_<port>`. The [broker](connector::Broker) connects there, for the sealed
//!   device thread cannot.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use casemate_broker::client::Client;
use serde_json::Value;
use thiserror::Error;

use self::connector::{Broker, Connector};
use self::hub::Hub;
use super::config_space::ConfigSpace;
use super::device::{
    self, DeviceIo, DeviceType, Event, Queues, RestoreError, Traits, VirtioDevice, states,
};
use super::queue::{Progress, Queue, QueueStates, Verdict};
use crate::memory::iovec::IoVecBuffer;
use crate::metrics::Source;

mod connection;
mod connector;
mod handshake;
mod hub;
mod packet;
pub(crate) mod socket;
#[cfg(test)]
pub(super) mod testing;
mod traffic;

/// Receive, transmit, and event queue.
const QUEUE_SIZES: &[u16] = &[256, 256, 16];
const RX: u16 = 0;
const TX: u16 = 1;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (section 5.10.6.7), the one event that there is.
const TRANSPORT_RESET: u32 = 0;
/// Packets moved in one direction before the other devices get their turn.
const BUDGET: usize = 64;
/// Smallest CID of a guest.
const FIRST_CID: u64 = 3;

/// A socket device.
pub struct VsockOptions {
    /// The guest's address: 3 or more, and less than 2^32 - 1.
    pub guest_cid: u64,
    /// Where the host's sockets are.
    pub uds_path: String,
    /// Listens on `uds_path`.
    pub listener: Arc<UnixListener>,
    /// Connects to `<uds_path>_<port>`; without one, the guest can only be called.
    pub broker: Option<Arc<Mutex<Client>>>,
}

/// Why a socket device could not be made.
#[derive(Debug, Error)]
pub enum Error {
    /// The address is reserved or does not fit.
    #[error("guest CID {0} is not between 3 and 4294967294")]
    Cid(u64),
    /// The listener cannot be used.
    #[error("cannot make the vsock listener non-blocking: {0}")]
    Listener(#[source] io::Error),
}

/// The socket device.
pub struct Vsock {
    guest_cid: u64,
    hub: Hub,
    running: Option<(Queues, DeviceIo)>,
    pieces: IoVecBuffer,
    /// The guest has to be told that all its connections are gone.
    was_restored: bool,
}

impl Vsock {
    /// A device without connections.
    ///
    /// # Errors
    /// When the CID is reserved, or the listener cannot be made non-blocking.
    pub fn new(options: VsockOptions) -> Result<Self, Error> {
        let nonblocking = options.listener.set_nonblocking(true);
        nonblocking.map_err(Error::Listener)?;
        Self::on_prepared(options)
    }

    /// The same on a listener that is non-blocking already: a sealed thread cannot change that.
    ///
    /// # Errors
    /// When the CID is reserved.
    pub fn on_prepared(options: VsockOptions) -> Result<Self, Error> {
        let VsockOptions {
            guest_cid,
            uds_path,
            listener,
            broker,
        } = options;
        let connector =
            broker.map(|client| Box::new(Broker::new(client, uds_path)) as Box<dyn Connector>);
        Self::with(guest_cid, listener, connector)
    }

    fn with(
        guest_cid: u64,
        listener: Arc<UnixListener>,
        connector: Option<Box<dyn Connector>>,
    ) -> Result<Self, Error> {
        if !(FIRST_CID..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(Error::Cid(guest_cid));
        }
        Ok(Self {
            guest_cid,
            hub: Hub::new(guest_cid, listener, connector),
            running: None,
            pieces: IoVecBuffer::default(),
            was_restored: false,
        })
    }

    /// Has the guest told, as soon as its driver listens, that its connections are gone and its
    /// address may be another: for a device that goes on from another one's state, whose peers it has not.
    pub fn announce_reset(&mut self) {
        self.was_restored = true;
    }
}

/// Tells the driver of the reset, if it has given a buffer for it.
fn tell_of_reset(queue: &mut Queue, io: &DeviceIo) -> Result<bool, device::Error> {
    let mut told = false;
    queue.process(&io.memory, io.signal.as_ref(), BUDGET, |chain| {
        if told {
            return Ok(Verdict::Keep);
        }
        chain.write_at(&io.memory, 0, &TRANSPORT_RESET.to_le_bytes())?;
        told = true;
        Ok(Verdict::Used(4))
    })?;
    Ok(told)
}

impl VirtioDevice for Vsock {
    fn traits(&self) -> Traits {
        Traits {
            device_type: DeviceType::Vsock,
            features: 0,
            queue_sizes: QUEUE_SIZES,
        }
    }

    fn config(&self) -> Arc<ConfigSpace> {
        ConfigSpace::new(self.guest_cid.to_le_bytes().to_vec())
    }

    fn start(&mut self, queues: Queues, _: u64, io: DeviceIo) -> Result<(), device::Error> {
        self.hub.start(&io.events)?;
        self.running = Some((queues, io));
        Ok(())
    }

    fn stop(&mut self) -> QueueStates {
        let Some((queues, io)) = self.running.take() else {
            return QueueStates::default();
        };
        self.hub.stop(&io.events);
        states(&queues)
    }

    /// The guest's connections stay with this machine: on the other one it is told that they are gone.
    fn hold(&mut self) -> Option<QueueStates> {
        self.running.as_ref().map(|(queues, _)| states(queues))
    }

    fn restore(&mut self, _: &Value) -> Result<(), RestoreError> {
        self.announce_reset();
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Result<Progress, device::Error> {
        let Some((queues, io)) = &mut self.running else {
            return Ok(Progress::Done);
        };
        match event {
            Event::Queue(TX) => self.hub.metrics.tx_queue_event_count.inc(),
            Event::Queue(RX) => self.hub.metrics.rx_queue_event_count.inc(),
            _ => {}
        }
        let [receive, transmit, events, ..] = queues;
        let mut progress = Progress::Done;
        if let (true, Some(queue)) = (self.was_restored, events) {
            self.was_restored = !tell_of_reset(queue, io)?;
        }
        match (event, transmit) {
            (Event::Queue(TX), Some(queue)) => {
                progress = queue.process(&io.memory, io.signal.as_ref(), BUDGET, |chain| {
                    self.hub
                        .take_packet(&io.events, &mut self.pieces, &io.memory, chain);
                    Ok(Verdict::Used(0))
                })?;
            }
            (Event::Ready { key, events }, _) => {
                progress = self.hub.handle(&io.events, key, events);
            }
            (Event::Queue(_), _) => {}
        }
        progress = progress.or(self.hub.accept_waiting(&io.events));
        // Whatever happened, there may be something for the guest now, or room in its ring.
        if let Some(queue) = receive {
            let sent = queue.process(&io.memory, io.signal.as_ref(), BUDGET, |chain| {
                self.hub
                    .give_packet(&io.events, &mut self.pieces, &io.memory, chain)
            })?;
            progress = progress.or(sent);
        }
        Ok(progress)
    }

    fn metrics(&self) -> Option<Source> {
        Some(Source::new("vsock", self.hub.metrics.clone()))
    }
}

#[cfg(test)]
#[path = "vsock_tests.rs"]
mod tests;

#[cfg(test)]
mod accounting_tests;

#[cfg(test)]
mod broker_tests;

#[cfg(test)]
mod reset_tests;

//! Who connects to the host's sockets for the guest: the broker, for a sealed VMM connects to
//! nothing.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use casemate_broker::client::Client;
use casemate_broker::protocol::Operation;

/// Somebody who connects.
pub trait Connector: AsRawFd + Send {
    /// Asks for a connection to the host's socket for `port` and returns the request's id, or why
    /// it cannot be asked for now. Never waits.
    fn connect(&mut self, port: u32) -> Result<u64, String>;

    /// The next answer: the request's id and the connection or why there is none.
    ///
    /// # Errors
    /// When there will be no answer any more.
    fn receive(&mut self) -> Result<Option<Answer>, String>;
}

/// The id of a request, and the connection or why there is none.
pub type Answer = (u64, Result<OwnedFd, String>);

/// The broker, which connects to `<uds_path>_<port>`.
pub struct Broker {
    /// It outlives the device: another one that comes goes on with it.
    client: Arc<Mutex<Client>>,
    uds_path: String,
}

impl Broker {
    /// Connects for the device with this `uds_path`.
    pub fn new(client: Arc<Mutex<Client>>, uds_path: String) -> Self {
        Self { client, uds_path }
    }

    fn client(&self) -> MutexGuard<'_, Client> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for Broker {
    fn as_raw_fd(&self) -> RawFd {
        self.client().as_raw_fd()
    }
}

impl Connector for Broker {
    fn connect(&mut self, port: u32) -> Result<u64, String> {
        let device = self.uds_path.clone();
        self.client()
            .submit(Operation::Connect { device, port })
            .map_err(|error| error.to_string())
    }

    fn receive(&mut self) -> Result<Option<Answer>, String> {
        self.client()
            .receive()
            .map(|answer| answer.map(|answer| (answer.id, answer.result)))
            .map_err(|error| error.to_string())
    }
}

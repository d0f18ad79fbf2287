//! The API's socket and its clients, as part of the control thread's event loop: nothing here waits.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use log::{debug, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Request};
use super::http::{Response, Status};

/// Most clients at once. One more takes the place of the one that has been idle longest, or is turned away.
pub const MAX_CLIENTS: usize = 16;
/// Clients accepted in one turn.
const ACCEPTS: usize = 4;
/// How long clients wait for a process that has no descriptor left.
const PATIENCE: Duration = Duration::from_millis(100);

/// Where a client's place begins among an event loop's tokens; the listener's is this one.
pub const TOKENS: u64 = 1 << 32;

/// The listener and whoever is connected.
pub struct Server {
    listener: UnixListener,
    clients: Vec<Option<Client>>,
    max_body: usize,
    /// The listener is not watched until then: it would wake us for ever, for clients that cannot be accepted.
    deaf_until: Option<Instant>,
    /// A connection that has become something else.
    upgraded: Option<(UnixStream, Vec<u8>)>,
}

struct Client {
    connection: Connection,
    /// What its socket is watched for.
    interest: EventSet,
}

impl Server {
    /// Serves `listener`, which is non-blocking; a request's body may have `max_body` bytes.
    ///
    /// # Errors
    /// When the kernel refuses to watch the listener.
    pub fn new(listener: UnixListener, max_body: usize, epoll: &Epoll) -> io::Result<Self> {
        let event = EpollEvent::new(EventSet::IN, TOKENS);
        epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
        Ok(Self {
            listener,
            clients: (0..MAX_CLIENTS).map(|_| None).collect(),
            max_body,
            deaf_until: None,
            upgraded: None,
        })
    }

    /// Takes note of an event. Whether it was one of the server's.
    pub fn on_event(&mut self, token: u64, events: EventSet, epoll: &Epoll) -> bool {
        let Some(place) = token.checked_sub(TOKENS) else {
            return false;
        };
        let Some(place) = place.checked_sub(1) else {
            self.accept(epoll);
            return true;
        };
        let slot = usize::try_from(place)
            .ok()
            .and_then(|place| self.clients.get_mut(place));
        if let Some(Some(client)) = slot {
            // A client that has gone is noticed by whichever of them is due.
            if client.connection.is_sending() {
                client.connection.send();
            } else if !events.is_empty() {
                client.connection.receive(self.max_body);
            }
        }
        self.tidy(epoll);
        true
    }

    /// Serves at most one request of each client, by `serve`. Whether there may be more at once.
    pub fn serve(&mut self, epoll: &Epoll, mut serve: impl FnMut(Request) -> Response) -> bool {
        let mut more = false;
        for slot in &mut self.clients {
            let Some(client) = slot else { continue };
            let connection = &mut client.connection;
            if let Some(request) = connection.next(self.max_body) {
                let close = request.head.close;
                let response = serve(request);
                let is_upgrade = response.status == Status::SwitchingProtocols;
                connection.answer(&response, close && !is_upgrade);
                more = true;
                if is_upgrade && let Some(client) = slot.take() {
                    let event = EpollEvent::default();
                    let fd = client.connection.as_raw_fd();
                    // It is watched, so this does not fail.
                    let _ = epoll.ctl(ControlOperation::Delete, fd, event);
                    self.upgraded = client.connection.into_parts();
                }
            }
        }
        self.tidy(epoll);
        more
    }

    /// The connection of a client that was answered by [`Response::upgrade`], and what it has sent since.
    pub fn take_upgraded(&mut self) -> Option<(UnixStream, Vec<u8>)> {
        self.upgraded.take()
    }

    /// When [`Server::expire`] is to be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let clients = self.clients.iter().flatten();
        let deadlines = clients.filter_map(|client| client.connection.deadline());
        deadlines.chain(self.deaf_until).min()
    }

    /// Ends the connections whose time is up.
    pub fn expire(&mut self, epoll: &Epoll) {
        let now = Instant::now();
        if self.deaf_until.is_some_and(|until| until <= now) {
            self.deaf_until = None;
            self.listen_for(EventSet::IN, epoll);
        }
        for client in self.clients.iter_mut().flatten() {
            client.connection.expire(now);
        }
        self.tidy(epoll);
    }

    fn accept(&mut self, epoll: &Epoll) {
        for _ in 0..ACCEPTS {
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Out of descriptors, say: whoever waits in the listener is asked again.
                    debug!("API: cannot accept a client: {error}");
                    self.deaf_until = Instant::now().checked_add(PATIENCE);
                    self.listen_for(EventSet::empty(), epoll);
                    return;
                }
            };
            let mut connection = Connection::new(socket);
            let Some(place) = self.place(epoll) else {
                let why = format!("{MAX_CLIENTS} clients are connected: end one of them");
                connection.refuse(&Response::fault(Status::Unavailable, &why));
                continue;
            };
            let interest = EventSet::IN;
            let token = token(place);
            let event = EpollEvent::new(interest, token);
            if let Err(error) = epoll.ctl(ControlOperation::Add, connection.as_raw_fd(), event) {
                warn!("API: cannot watch a client: {error}");
                continue;
            }
            if let Some(slot) = self.clients.get_mut(place) {
                *slot = Some(Client {
                    connection,
                    interest,
                });
            }
        }
    }

    fn listen_for(&self, events: EventSet, epoll: &Epoll) {
        let event = EpollEvent::new(events, TOKENS);
        // It is watched, so this does not fail.
        let _ = epoll.ctl(ControlOperation::Modify, self.listener.as_raw_fd(), event);
    }

    /// A free place, or that of the client that has been idle longest.
    fn place(&mut self, epoll: &Epoll) -> Option<usize> {
        if let Some(free) = self.clients.iter().position(Option::is_none) {
            return Some(free);
        }
        let idle = self.clients.iter().enumerate();
        let idle = idle.filter_map(|(place, client)| Some((place, &client.as_ref()?.connection)));
        let idle = idle.filter(|(_, connection)| connection.is_idle());
        let (place, _) = idle.min_by_key(|(_, connection)| connection.last_used())?;
        self.drop_client(place, epoll);
        Some(place)
    }

    /// Lets ended connections go, and watches the others for what they wait for.
    fn tidy(&mut self, epoll: &Epoll) {
        for place in 0..self.clients.len() {
            let Some(Some(client)) = self.clients.get_mut(place) else {
                continue;
            };
            if client.connection.is_closed() {
                self.drop_client(place, epoll);
                continue;
            }
            let wanted = if client.connection.is_sending() {
                EventSet::OUT
            } else {
                EventSet::IN
            };
            if wanted != client.interest {
                client.interest = wanted;
                let event = EpollEvent::new(wanted, token(place));
                let fd = client.connection.as_raw_fd();
                if epoll.ctl(ControlOperation::Modify, fd, event).is_err() {
                    self.drop_client(place, epoll);
                }
            }
        }
    }

    fn drop_client(&mut self, place: usize, epoll: &Epoll) {
        if let Some(client) = self.clients.get_mut(place).and_then(Option::take) {
            let event = EpollEvent::default();
            let fd = client.connection.as_raw_fd();
            // It is watched, so this does not fail.
            let _ = epoll.ctl(ControlOperation::Delete, fd, event);
        }
    }
}

fn token(place: usize) -> u64 {
    let place = u64::try_from(place).unwrap_or(u64::MAX >> 1);
    TOKENS.saturating_add(1).saturating_add(place)
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;

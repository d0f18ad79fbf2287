//! The TCP/IP stack that a network card lends to the service: smoltcp between two short queues of
//! frames.
//!
//! Every byte that it sees is a guest's. What a client of the service has no use for is thrown away
//! before smoltcp looks at it, and every buffer has its size from the start.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant as Time};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Cidr, Ipv4Packet};

use super::connection::Connection;
use super::service::Service;
use super::token;

/// The service's Ethernet address: no other card's, because the guest sees it on its own wire only.
const MAC: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);
const PORT: u16 = 80;
/// Clients at a time. Those beyond are refused.
const CONNECTIONS: usize = 16;
const RECEIVE_BUFFER: usize = 2048;
const SEND_BUFFER: usize = 8192;
/// Frames that wait for the guest to take them. While there are as many, nothing is read or sent.
const MAX_OUTGOING: usize = 8;
/// Largest frame from the guest: more than fits in a receive buffer with every header.
const MAX_INCOMING: usize = 4096;
const SHORTEST_WAIT: Duration = Duration::from_millis(1);
/// Largest MTU that is made use of.
const MAX_MTU: u16 = 1500;

const ETHERNET_HEADER: usize = 14;
const ETHERTYPE: std::ops::Range<usize> = 12..14;
const ARP: &[u8] = &[0x08, 0x06];
const IPV4: &[u8] = &[0x08, 0x00];
/// Where the target's address is in an ARP packet, and the destination's in an IPv4 one, counted
/// from the start of the frame.
const ARP_TARGET: std::ops::Range<usize> = 38..42;
const IPV4_DESTINATION: std::ops::Range<usize> = 30..34;
/// The flags and offset of an IPv4 fragment, but for "don't fragment".
const IPV4_FRAGMENT: std::ops::Range<usize> = 20..22;
const FRAGMENT_BITS: u16 = 0x3fff;
const IPV4_PROTOCOL: usize = 23;
const TCP: u8 = 6;

/// Bytes at the start of a frame that tell whether it is for the service.
pub const PEEK: usize = 42;

/// A service on one network card.
pub struct Stack {
    service: Arc<Service>,
    start: Instant,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<(SocketHandle, Connection)>,
}

impl Stack {
    /// A stack for a card whose driver sends and receives packets of at most `mtu` bytes.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn new(service: Arc<Service>, mtu: u16) -> io::Result<Self> {
        let mut wire = Wire {
            mtu: mtu.min(MAX_MTU),
            incoming: Vec::with_capacity(MAX_INCOMING),
            outgoing: VecDeque::with_capacity(MAX_OUTGOING),
        };
        let mut seed = [0; 8];
        token::random(&mut seed)?;
        let mut config = Config::new(MAC.into());
        // Initial sequence numbers come of it.
        config.random_seed = u64::from_ne_bytes(seed);
        let mut interface = Interface::new(config, &mut wire, Time::ZERO);
        interface.update_ip_addrs(|addresses| {
            // Whatever address the guest has, it is on this wire. There is room for one more.
            let _ = addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(service.address(), 0)));
        });
        let mut sockets = SocketSet::new(Vec::with_capacity(CONNECTIONS));
        let connections = (0..CONNECTIONS)
            .map(|_| (sockets.add(socket()), Connection::default()))
            .collect();
        Ok(Self {
            service,
            start: Instant::now(),
            wire,
            interface,
            sockets,
            connections,
        })
    }

    /// Whether the frame that starts with `head`, [`PEEK`] bytes of it if it has as many, is for
    /// the service and not for the world.
    pub fn wants(&self, head: &[u8]) -> bool {
        let address = self.service.address().octets();
        let has = |at| head.get(at) == Some(&address[..]);
        match head.get(ETHERTYPE) {
            Some(ARP) => has(ARP_TARGET),
            Some(IPV4) => has(IPV4_DESTINATION),
            _ => false,
        }
    }

    /// Takes a frame from the guest, of `len` bytes, which `copy` copies. It may be lost, as frames
    /// may be.
    pub fn receive(&mut self, len: usize, copy: impl FnOnce(&mut [u8]) -> bool, now: Instant) {
        let metrics = &self.service.metrics;
        metrics.rx_count.inc();
        if len > MAX_INCOMING {
            metrics.rx_accepted_unusual.inc();
            return;
        }
        let frame = &mut self.wire.incoming;
        frame.clear();
        frame.resize(len, 0);
        // As a copy it is looked at again: the guest may have changed it since.
        if copy(frame) && is_for_tcp(&self.wire.incoming) && self.wants(&self.wire.incoming) {
            metrics.rx_accepted.inc();
            let now_there = self.time(now);
            self.interface
                .poll_ingress_single(now_there, &mut self.wire, &mut self.sockets);
        } else {
            metrics.rx_accepted_unusual.inc();
        }
        self.wire.incoming.clear();
        self.go_on(now);
    }

    /// The next frame for the guest.
    pub fn outgoing(&self) -> Option<&[u8]> {
        self.wire.outgoing.front().map(Vec::as_slice)
    }

    /// The guest has it.
    pub fn sent(&mut self) {
        if let Some(frame) = self.wire.outgoing.pop_front() {
            let metrics = &self.service.metrics;
            metrics.tx_count.inc();
            metrics.tx_frames.inc();
            metrics.tx_bytes.add(frame.len() as u64);
        }
    }

    /// Does what is to be done by `now`: after frames were sent, and when [`Stack::next_turn`] says.
    pub fn go_on(&mut self, now: Instant) {
        let there = self.time(now);
        for (handle, connection) in &mut self.connections {
            let socket = self.sockets.get_mut(*handle);
            connection.drive(socket, &self.service, now);
        }
        // Each turn sends a frame, and there is only so much room for them.
        while self
            .interface
            .poll_egress(there, &mut self.wire, &mut self.sockets)
            == PollResult::SocketStateChanged
        {}
        if self.wire.is_full() {
            return;
        }
        for (handle, connection) in &mut self.connections {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(*handle);
            // A client that the service took leave of has been told so by now. Waiting for a
            // late segment of it, as TCP does, would keep the next client out.
            if matches!(socket.state(), tcp::State::Closed | tcp::State::TimeWait) {
                connection.reset();
                socket.abort();
                // It cannot fail: the port is not zero and the socket is closed.
                let _ = socket.listen(PORT);
            }
        }
    }

    /// When to go on even if nothing comes from the guest.
    pub fn next_turn(&mut self, now: Instant) -> Option<Instant> {
        // The guest has to take frames first.
        if self.wire.is_full() {
            return None;
        }
        let there = self.time(now);
        let timer = self.interface.poll_at(there, &self.sockets).map(|at| {
            // Never at once, which would be for ever if it changed nothing.
            let wait = (at.max(there) - there).max(SHORTEST_WAIT);
            now.checked_add(wait.into()).unwrap_or(now)
        });
        let deadlines = self.connections.iter();
        let deadlines = deadlines.filter_map(|(_, connection)| connection.deadline());
        timer.into_iter().chain(deadlines).min()
    }

    /// Forgets every client and every frame: the guest's driver starts anew.
    pub fn reset(&mut self) {
        self.wire.outgoing.clear();
        for (handle, connection) in &mut self.connections {
            connection.reset();
            *self.sockets.get_mut(*handle) = socket();
        }
    }

    fn time(&self, now: Instant) -> Time {
        let micros = now.saturating_duration_since(self.start).as_micros();
        Time::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }
}

fn socket() -> tcp::Socket<'static> {
    let receive = tcp::SocketBuffer::new(vec![0; RECEIVE_BUFFER]);
    let mut socket = tcp::Socket::new(receive, tcp::SocketBuffer::new(vec![0; SEND_BUFFER]));
    // An answer is whole when it is sent, and a request is answered at once.
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    // As above: it cannot fail.
    let _ = socket.listen(PORT);
    socket
}

/// Whether it is ARP, or a TCP segment in one piece.
fn is_for_tcp(frame: &[u8]) -> bool {
    if frame.get(ETHERTYPE) == Some(ARP) {
        return true;
    }
    let fragment = frame
        .get(IPV4_FRAGMENT)
        .and_then(|bytes| bytes.try_into().ok());
    let whole = fragment.is_some_and(|bits| u16::from_be_bytes(bits) & FRAGMENT_BITS == 0);
    whole && frame.get(IPV4_PROTOCOL) == Some(&TCP)
}

/// Frames in both directions.
struct Wire {
    mtu: u16,
    /// The frame being received; none if it is empty.
    incoming: Vec<u8>,
    outgoing: VecDeque<Vec<u8>>,
}

impl Wire {
    fn is_full(&self) -> bool {
        self.outgoing.len() >= MAX_OUTGOING
    }
}

struct Incoming<'a>(&'a [u8]);
struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl Device for Wire {
    type RxToken<'a> = Incoming<'a>;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Time) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        // Every frame may have an answer.
        let ready = !self.incoming.is_empty() && !self.is_full();
        ready.then_some((Incoming(&self.incoming), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: Time) -> Option<Outgoing<'_>> {
        (!self.is_full()).then_some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = usize::from(self.mtu).saturating_add(ETHERNET_HEADER);
        // A guest leaves the checksum to its card, and this wire damages nothing.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

impl RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        // At most an MTU and a header.
        let mut frame = vec![0; len];
        let result = fill(&mut frame);
        limit_to_one_hop(&mut frame);
        self.0.push_back(frame);
        result
    }
}

/// Whatever smoltcp sends, resets too, dies at the first router.
fn limit_to_one_hop(frame: &mut [u8]) {
    if frame.get(ETHERTYPE) != Some(IPV4) {
        return;
    }
    let packet = frame.get_mut(ETHERNET_HEADER..).unwrap_or_default();
    if let Ok(mut packet) = Ipv4Packet::new_checked(packet) {
        packet.set_hop_limit(1);
        packet.fill_checksum();
    }
}

#[cfg(test)]
#[path = "stack_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "hostile_tests.rs"]
mod hostile_tests;

use super::super::http::MAX_REQUEST;
use super::super::service::tests::service;
use super::super::service::{ServiceOptions, Version};
use super::super::store::Store;
use super::super::{DEFAULT_ADDRESS, Service};
use super::*;
use proptest::prelude::*;
use serde_json::json;
use smoltcp::socket::tcp::State;
use smoltcp::wire::Ipv4Address;
use std::time::Duration as Pause;

pub const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 9];
pub const GUEST_ADDRESS: Ipv4Address = Ipv4Address::new(172, 16, 0, 2);

/// A guest's own stack, at the other end of the wire.
pub struct Guest {
    pub wire: Wire,
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    next_port: u16,
}

impl Guest {
    pub fn new() -> Self {
        let mut wire = Wire {
            mtu: MAX_MTU,
            incoming: Vec::new(),
            outgoing: VecDeque::new(),
        };
        let config = Config::new(EthernetAddress(GUEST).into());
        let mut interface = Interface::new(config, &mut wire, Time::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::Ipv4(Ipv4Cidr::new(GUEST_ADDRESS, 0)))
                .unwrap();
        });
        Self {
            wire,
            interface,
            sockets: SocketSet::new(Vec::new()),
            next_port: 50000,
        }
    }

    pub fn connect(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 65536]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        self.next_port += 1;
        socket
            .connect(
                self.interface.context(),
                (DEFAULT_ADDRESS, PORT),
                self.next_port,
            )
            .unwrap();
        self.sockets.add(socket)
    }

    pub fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }
}

/// A service and a guest, and the time that they live in.
pub struct World {
    pub stack: Stack,
    pub guest: Guest,
    pub now: Instant,
}

impl World {
    pub fn new(service: Service) -> Self {
        Self {
            stack: Stack::new(Arc::new(service), 1500).unwrap(),
            guest: Guest::new(),
            now: Instant::now(),
        }
    }

    /// Carries frames to and fro until neither side has any; true if there were any.
    fn settle(&mut self) -> bool {
        let (mut moved, mut waited) = (false, false);
        for _ in 0..1000 {
            let there = self.stack.time(self.now);
            let guest = &mut self.guest;
            guest
                .interface
                .poll(there, &mut guest.wire, &mut guest.sockets);
            let mut quiet = true;
            while let Some(frame) = self.guest.wire.outgoing.pop_front() {
                quiet = false;
                if self.stack.wants(&frame) {
                    self.give(&frame);
                }
            }
            while let Some(frame) = self.stack.outgoing() {
                quiet = false;
                assert_one_hop(frame);
                self.guest.wire.incoming = frame.to_vec();
                self.stack.sent();
                let guest = &mut self.guest;
                guest
                    .interface
                    .poll_ingress_single(there, &mut guest.wire, &mut guest.sockets);
                guest.wire.incoming.clear();
            }
            self.stack.go_on(self.now);
            if !quiet || self.stack.outgoing().is_some() {
                (moved, waited) = (true, false);
            } else if !waited {
                // The guest acknowledges after a while.
                self.now += Pause::from_millis(20);
                waited = true;
            } else {
                return moved;
            }
        }
        panic!("they never come to an end");
    }

    pub fn give(&mut self, frame: &[u8]) {
        let copy = |to: &mut [u8]| {
            to.copy_from_slice(frame);
            true
        };
        self.stack.receive(frame.len(), copy, self.now);
    }

    pub fn after(&mut self, pause: Pause) {
        self.now += pause;
        self.stack.go_on(self.now);
        self.settle();
    }

    /// Sends `text` and returns all that comes back, and whether the connection is over then.
    fn say(&mut self, handle: SocketHandle, text: &str) -> (String, bool) {
        self.settle();
        let mut rest = text.as_bytes();
        let mut answer = Vec::new();
        loop {
            let socket = self.guest.socket(handle);
            let count = socket.send_slice(rest).unwrap_or(rest.len());
            rest = &rest[count..];
            let moved = self.settle();
            let socket = self.guest.socket(handle);
            while socket.can_recv() {
                socket
                    .recv(|bytes| {
                        answer.extend_from_slice(bytes);
                        (bytes.len(), ())
                    })
                    .unwrap();
            }
            if !moved && rest.is_empty() {
                let over = !socket.may_recv();
                return (String::from_utf8(answer).unwrap(), over);
            }
        }
    }

    /// One request on a connection of its own.
    pub fn ask(&mut self, text: &str) -> (String, bool) {
        let handle = self.guest.connect();
        let answer = self.say(handle, text);
        self.guest.socket(handle).close();
        self.settle();
        self.guest.sockets.remove(handle);
        answer
    }

    /// How many connections wait for a client.
    pub fn free(&mut self) -> usize {
        let handles: Vec<_> = self.stack.connections.iter().map(|(h, _)| *h).collect();
        let is_free = |h: &SocketHandle| {
            self.stack.sockets.get::<tcp::Socket<'_>>(*h).state() == State::Listen
        };
        handles.iter().filter(|handle| is_free(handle)).count()
    }
}

pub fn assert_one_hop(frame: &[u8]) {
    if frame[ETHERTYPE] == *IPV4 {
        let packet = Ipv4Packet::new_checked(&frame[ETHERNET_HEADER..]).unwrap();
        assert_eq!(packet.hop_limit(), 1);
        assert!(packet.verify_checksum());
    } else {
        assert_eq!(frame[ETHERTYPE], *ARP);
    }
}

pub fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

#[test]
fn answers_one_request_after_another() {
    let mut world = World::new(service(Version::V1, false));
    let client = world.guest.connect();
    let get = "GET /latest/meta-data/id HTTP/1.1\r\nHost: x\r\n\r\n";
    for _ in 0..3 {
        let (answer, over) = world.say(client, get);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert_eq!((body(&answer), over), ("i-1", false));
    }
    // Two at once, and half of one.
    let (answer, _) = world.say(client, &[get, get, &get[..9]].concat());
    assert_eq!(answer.matches("200 OK").count(), 2);
    let (answer, _) = world.say(client, &get[9..]);
    assert_eq!(answer.matches("200 OK").count(), 1);
    // The last word of either side ends it.
    world.guest.socket(client).close();
    world.settle();
    assert_eq!(world.free(), CONNECTIONS);
}

#[test]
fn a_session_has_a_token() {
    let mut world = World::new(service(Version::V2, false));
    let (answer, _) = world.ask("GET /latest HTTP/1.1\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    let put = "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 30\r\n";
    let (answer, _) = world.ask(&format!("{put}X-Forwarded-For: 1.2.3.4\r\n\r\n"));
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    let (answer, _) = world.ask(&format!("{put}Connection: close\r\n\r\n"));
    assert!(
        answer.contains("X-metadata-token-ttl-seconds: 30\r\n"),
        "{answer}"
    );
    let token = body(&answer).to_owned();
    let get = format!("GET /latest HTTP/1.1\r\nX-aws-ec2-metadata-token: {token}\r\n\r\n");
    assert_eq!(body(&world.ask(&get).0), "meta-data/");
    world.after(Pause::from_secs(31));
    assert!(world.ask(&get).0.starts_with("HTTP/1.1 401 "));
}

#[test]
fn an_answer_larger_than_every_buffer_arrives_whole() {
    let store = Arc::new(Store::new(1 << 20));
    let long = "0123456789".repeat(50_000);
    store.put(json!({"a": long})).unwrap();
    let service = Service::new(ServiceOptions {
        store,
        address: DEFAULT_ADDRESS,
        version: Version::V1,
        imds_compat: false,
    });
    let mut world = World::new(service.unwrap());
    let (answer, over) = world.ask("GET /a HTTP/1.0\r\n\r\n");
    assert!(over);
    assert_eq!(body(&answer), long);
    assert_eq!(world.free(), CONNECTIONS);
}

#[test]
fn clients_that_end_make_room_for_the_next_at_once() {
    let mut world = World::new(service(Version::V1, false));
    for _ in 0..CONNECTIONS * 4 {
        let (answer, over) = world.ask("GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
        assert_eq!((body(&answer), over), ("latest/", true));
    }
}

#[test]
fn clients_that_do_nothing_are_ended() {
    let mut world = World::new(service(Version::V1, false));
    let clients: Vec<_> = (0..CONNECTIONS).map(|_| world.guest.connect()).collect();
    world.settle();
    assert_eq!(world.free(), 0);
    // One more is refused, not kept waiting.
    let (answer, over) = world.ask("GET / HTTP/1.1\r\n\r\n");
    assert_eq!((answer.as_str(), over), ("", true));
    let next = world.stack.next_turn(world.now).unwrap();
    assert!(next > world.now && next <= world.now + Pause::from_secs(10));
    // Half a request is something, once.
    world.say(clients[0], "GET /");
    world.after(Pause::from_secs(6));
    world.say(clients[0], "latest");
    world.after(Pause::from_secs(6));
    assert_eq!(world.free(), CONNECTIONS - 1);
    assert_eq!(world.guest.socket(clients[1]).state(), State::Closed);
    world.after(Pause::from_secs(6));
    assert_eq!(world.free(), CONNECTIONS);
    assert_eq!(
        world.stack.next_turn(world.now),
        None,
        "it has nothing to wait for"
    );
}

#[test]
fn a_client_that_says_too_much_is_told_and_ended() {
    let mut world = World::new(service(Version::V1, false));
    let long = "x".repeat(MAX_REQUEST * 3);
    let (answer, over) = world.ask(&format!("GET /{long} HTTP/1.1\r\n\r\n"));
    assert!(answer.starts_with("HTTP/1.1 413 ") && over, "{answer}");
    let (answer, over) = world.ask("no HTTP\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 400 ") && over, "{answer}");
    world.after(Pause::from_secs(11));
    assert_eq!(world.free(), CONNECTIONS);
}

#[test]
fn a_client_that_half_closes_still_gets_its_answer() {
    let mut world = World::new(service(Version::V1, false));
    let client = world.guest.connect();
    world.settle();
    let socket = world.guest.socket(client);
    socket.send_slice(b"GET /latest HTTP/1.1\r\n\r\n").unwrap();
    socket.close();
    let (answer, over) = world.say(client, "");
    assert_eq!((body(&answer), over), ("meta-data/", true));
    assert_eq!(world.free(), CONNECTIONS);
}

#[test]
fn a_guest_that_takes_no_frames_fills_nothing() {
    let mut world = World::new(service(Version::V1, false));
    let clients: Vec<_> = (0..4).map(|_| world.guest.connect()).collect();
    world.settle();
    for client in &clients {
        let get = "GET /latest HTTP/1.1\r\n\r\n".repeat(20);
        world
            .guest
            .socket(*client)
            .send_slice(get.as_bytes())
            .unwrap();
    }
    for _ in 0..50 {
        let there = world.stack.time(world.now);
        let guest = &mut world.guest;
        guest
            .interface
            .poll(there, &mut guest.wire, &mut guest.sockets);
        while let Some(frame) = world.guest.wire.outgoing.pop_front() {
            world.give(&frame);
        }
        assert!(world.stack.wire.outgoing.len() <= MAX_OUTGOING);
        world.now += Pause::from_millis(100);
    }
    assert!(world.stack.wire.is_full());
    assert_eq!(
        world.stack.next_turn(world.now),
        None,
        "only the guest can change anything"
    );
    // It goes on where it was as soon as frames are taken.
    let (answer, _) = world.say(clients[3], "");
    assert_eq!(answer.matches("meta-data/").count(), 20);
}

#[test]
fn a_new_driver_finds_no_client() {
    let mut world = World::new(service(Version::V1, false));
    let client = world.guest.connect();
    world.say(client, "GET /la");
    world.stack.reset();
    assert_eq!(world.free(), CONNECTIONS);
    assert_eq!(world.stack.outgoing(), None);
    let (answer, over) = world.say(client, "test HTTP/1.1\r\n\r\n");
    assert_eq!((answer.as_str(), over), ("", true), "reset");
}

#[test]
fn only_frames_for_the_service_are_wanted() {
    let world = World::new(service(Version::V1, false));
    let mut arp = [0u8; PEEK];
    arp[ETHERTYPE].copy_from_slice(ARP);
    assert!(!world.stack.wants(&arp));
    arp[ARP_TARGET].copy_from_slice(&DEFAULT_ADDRESS.octets());
    assert!(world.stack.wants(&arp));
    let mut ip = [0u8; 34];
    ip[ETHERTYPE].copy_from_slice(IPV4);
    ip[IPV4_DESTINATION].copy_from_slice(&[169, 254, 169, 253]);
    assert!(!world.stack.wants(&ip));
    ip[IPV4_DESTINATION].copy_from_slice(&DEFAULT_ADDRESS.octets());
    assert!(world.stack.wants(&ip));
    for len in 0..34 {
        assert!(!world.stack.wants(&ip[..len]));
    }
    ip[ETHERTYPE].copy_from_slice(&[0x86, 0xdd]);
    assert!(!world.stack.wants(&ip));
}

#[test]
fn what_is_neither_arp_nor_tcp_is_not_looked_at() {
    let mut world = World::new(service(Version::V1, false));
    let mut frame = vec![0; 60];
    frame[..6].copy_from_slice(&MAC.0);
    frame[6..12].copy_from_slice(&GUEST);
    frame[ETHERTYPE].copy_from_slice(IPV4);
    frame[14] = 0x45;
    frame[17] = 46;
    frame[22] = 64;
    frame[26..30].copy_from_slice(&GUEST_ADDRESS.octets());
    frame[IPV4_DESTINATION].copy_from_slice(&DEFAULT_ADDRESS.octets());
    for protocol in [1, 17, 2, 0, 255] {
        frame[IPV4_PROTOCOL] = protocol;
        frame[24..26].fill(0);
        Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
        world.give(&frame);
        assert_eq!(world.stack.outgoing(), None);
    }
    // A fragment of a segment neither.
    frame[IPV4_PROTOCOL] = TCP;
    frame[20] = 0x20;
    assert!(!is_for_tcp(&frame));
    frame[20] = 0x40;
    assert!(is_for_tcp(&frame));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn every_mtu_works(mtu in 68..u16::MAX) {
        let mut world = World::new(service(Version::V1, false));
        world.stack = Stack::new(Arc::new(service(Version::V1, false)), mtu).unwrap();
        let (answer, _) = world.ask("GET /latest HTTP/1.1\r\n\r\n");
        prop_assert_eq!(body(&answer), "meta-data/");
    }
}

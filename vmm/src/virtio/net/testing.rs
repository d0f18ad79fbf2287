//! Cards for tests: their taps are sockets that keep frames apart.

use super::*;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

/// The queues of the first pair.
pub const RX: u16 = 0;
pub const TX: u16 = 1;

/// A card whose tap is one end of a socket that keeps frames apart.
pub struct Fake(pub Net);

impl VirtioDevice for Fake {
    fn traits(&self) -> Traits {
        self.0.traits()
    }
    fn config(&self) -> std::sync::Arc<ConfigSpace> {
        self.0.config()
    }
    fn start(&mut self, queues: Queues, features: u64, io: DeviceIo) -> Result<(), device::Error> {
        self.0.run(queues, features, io)
    }
    fn stop(&mut self) -> QueueStates {
        self.0.stop()
    }
    fn hold(&mut self) -> Option<QueueStates> {
        self.0.hold()
    }
    fn handle(&mut self, event: Event) -> Result<Progress, device::Error> {
        self.0.handle(event)
    }
}

fn card(tap: File) -> Net {
    Net {
        id: "eth0".to_owned(),
        metrics: Arc::default(),
        taps: vec![Arc::new(tap)],
        mac: Some([2, 0, 0, 0, 0, 7]),
        mtu: Some(1400),
        extra_features: 0,
        rx_limiter: RateLimiter::default(),
        tx_limiter: RateLimiter::default(),
        detour: None,
        running: None,
        pairs_at_start: 1,
        pieces: IoVecBuffer::default(),
    }
}

/// A card, and the other end of its tap.
pub fn fake() -> (impl VirtioDevice + 'static, File) {
    let (card, tap) = socket();
    (Fake(card), tap)
}

/// A [`fake`] with several pairs of queues. What the control queue asks of such taps, they refuse.
pub fn fake_with_pairs(count: usize) -> (impl VirtioDevice + 'static, Vec<File>) {
    let (card, taps) = pairs(count);
    (Fake(card), taps)
}

/// A [`fake`] that leads to a metadata service.
pub fn fake_with_service() -> (impl VirtioDevice + 'static, File) {
    let (card, tap) = service();
    (Fake(card), tap)
}

/// A card with one pair of queues, and the other end of its tap.
pub fn socket() -> (Net, File) {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_NONBLOCK,
    )
    .unwrap();
    (card(theirs.into()), ours.into())
}

/// A card with so many pairs of queues, and the other ends of its taps.
pub fn pairs(count: usize) -> (Net, Vec<File>) {
    let (mut card, first) = socket();
    let mut peers = vec![first];
    for _ in 1..count {
        let (mut other, peer) = socket();
        card.taps.append(&mut other.taps);
        peers.push(peer);
    }
    (card, peers)
}

/// A frame of so many bytes behind an empty header.
pub fn frame(len: usize, fill: u8) -> Vec<u8> {
    let mut frame = vec![fill; HEADER_LEN + len];
    frame[..HEADER_LEN].fill(0);
    frame
}

/// A card that leads to a metadata service.
pub fn service() -> (Net, File) {
    let (mut card, tap) = socket();
    let store = Arc::new(crate::mmds::Store::new(1000));
    let service = crate::mmds::Service::new(crate::mmds::ServiceOptions {
        store,
        address: crate::mmds::DEFAULT_ADDRESS,
        version: crate::mmds::Version::V1,
        imds_compat: false,
    });
    let stack = Stack::new(Arc::new(service.unwrap()), 1500).unwrap();
    card.detour = Some(Detour::new(stack));
    (card, tap)
}

/// An ARP request for an address, behind a header.
pub fn who_has(address: [u8; 4]) -> Vec<u8> {
    let sender = [2, 0, 0, 0, 0, 7];
    let arp = [0, 1, 8, 0, 6, 4, 0, 1];
    [
        &[0; HEADER_LEN][..],
        &[0xff; 6],
        &sender,
        &[8, 6],
        &arp,
        &sender,
        &[10, 0, 0, 2],
        &[0; 6],
        &address,
    ]
    .concat()
}

//! A guest that does its worst.

use std::time::Duration as Pause;

use proptest::prelude::*;

use super::super::DEFAULT_ADDRESS;
use super::super::service::Version;
use super::super::service::tests::service;
use super::tests::{GUEST, GUEST_ADDRESS, Guest, World, assert_one_hop, body};
use super::*;

/// What a hostile guest may do to a frame of a conversation, or in its place.
#[derive(Clone, Debug)]
enum Act {
    /// Sends it as it is.
    Send,
    /// Not at all.
    Drop,
    /// Twice.
    Repeat,
    /// Changed: a byte at so many thousandths of it.
    Change(usize, u8),
    /// Shorter.
    Cut(usize),
    /// Sends a segment of its own instead.
    Segment {
        flags: u8,
        sequence: i64,
        acknowledge: i64,
        window: u16,
        options: Vec<u8>,
        data: usize,
    },
    /// Takes none of the service's frames for a while.
    Deafness,
    /// Lets time pass.
    Wait(u64),
    /// Sends bytes.
    Noise(Vec<u8>),
}

fn act() -> impl Strategy<Value = Act> {
    let near = || prop_oneof![-70000..70000i64, -3..3i64, any::<i32>().prop_map(i64::from)];
    prop_oneof![
        6 => Just(Act::Send),
        1 => Just(Act::Drop),
        1 => Just(Act::Repeat),
        2 => (0..1000usize, any::<u8>()).prop_map(|(at, byte)| Act::Change(at, byte)),
        1 => (0..1000usize).prop_map(Act::Cut),
        6 => (any::<u8>(), near(), near(), any::<u16>(), options(), 0..3000usize).prop_map(
            |(flags, sequence, acknowledge, window, options, data)| {
                Act::Segment { flags, sequence, acknowledge, window, options, data }
            },
        ),
        1 => Just(Act::Deafness),
        2 => prop_oneof![0..2000u64, 0..100_000u64].prop_map(Act::Wait),
        1 => prop::collection::vec(any::<u8>(), 0..100).prop_map(Act::Noise),
    ]
}

/// TCP options: well-formed ones, and bytes.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let words = prop_oneof![
        any::<u16>().prop_map(|mss| [&[2, 4][..], &mss.to_be_bytes()].concat()),
        any::<u8>().prop_map(|shift| vec![3, 3, shift, 1]),
        Just(vec![4, 2, 1, 1]),
        (any::<u32>(), any::<u32>()).prop_map(|(a, b)| [
            &[1, 1, 5, 10][..],
            &a.to_be_bytes(),
            &b.to_be_bytes()
        ]
        .concat()),
        any::<[u8; 8]>().prop_map(|stamps| [&[1, 1, 8, 10][..], &stamps].concat()),
        any::<[u8; 4]>().prop_map(|bytes| bytes.to_vec()),
    ];
    prop::collection::vec(words, 0..4).prop_map(|words| {
        let mut options = words.concat();
        options.truncate(40);
        options
    })
}

/// A hostile guest and the connection that it spoils.
struct Hostile {
    world: World,
    /// The last segment's place in both directions, for segments that nearly fit.
    sequence: u32,
    acknowledge: u32,
    port: u16,
}

impl Hostile {
    fn note(&mut self, frame: &[u8], from_guest: bool) {
        let Some(tcp) = frame.get(34..54).filter(|_| frame[ETHERTYPE] == *IPV4) else {
            return;
        };
        let sequence = u32::from_be_bytes(tcp[4..8].try_into().unwrap());
        if from_guest {
            self.sequence = sequence;
            self.port = u16::from_be_bytes(tcp[..2].try_into().unwrap());
        } else {
            self.acknowledge = sequence;
        }
    }

    fn segment(&self, act: &Act) -> Vec<u8> {
        let Act::Segment {
            flags,
            sequence,
            acknowledge,
            window,
            options,
            data,
        } = act
        else {
            return Vec::new();
        };
        let near = |base: u32, by: i64| base.wrapping_add(by as u32).to_be_bytes();
        let tcp_len = 20 + options.len() + data;
        let mut frame = [&MAC.0[..], &GUEST, IPV4].concat();
        frame.extend([0x45, 0]);
        frame.extend(((20 + tcp_len) as u16).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, TCP, 0, 0]);
        frame.extend(GUEST_ADDRESS.octets());
        frame.extend(DEFAULT_ADDRESS.octets());
        Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
        frame.extend(self.port.to_be_bytes());
        frame.extend(PORT.to_be_bytes());
        frame.extend(near(self.sequence, *sequence));
        frame.extend(near(self.acknowledge, *acknowledge));
        frame.extend([((20 + options.len()) / 4 * 16) as u8, *flags]);
        frame.extend(window.to_be_bytes());
        frame.extend([0; 4]);
        frame.extend(options);
        frame.extend(b"GET / HTTP/1.1\r\n\r\n".iter().cycle().take(*data));
        frame
    }

    /// Carries the frames of one turn, each spoiled as the next act says.
    fn turn(&mut self, acts: &mut impl Iterator<Item = Act>) {
        let there = self.world.stack.time(self.world.now);
        let guest = &mut self.world.guest;
        guest
            .interface
            .poll(there, &mut guest.wire, &mut guest.sockets);
        let mut frames: Vec<Vec<u8>> = guest.wire.outgoing.drain(..).collect();
        // Something has to happen for the acts to be used up.
        frames.push(Vec::new());
        let mut deaf = false;
        for mut frame in frames {
            self.note(&frame, true);
            let Some(act) = acts.next() else { return };
            match act {
                Act::Send => {}
                Act::Drop => continue,
                Act::Repeat => self.world.give(&frame),
                Act::Change(at, byte) => {
                    let at = at * frame.len() / 1000;
                    if let Some(place) = frame.get_mut(at) {
                        *place = byte;
                    }
                }
                Act::Cut(at) => frame.truncate(at * frame.len() / 1000),
                Act::Segment { .. } => frame = self.segment(&act),
                Act::Deafness => deaf = true,
                Act::Wait(millis) => self.world.now += Pause::from_millis(millis),
                Act::Noise(ref bytes) => frame = bytes.clone(),
            }
            self.world.give(&frame);
        }
        if !deaf {
            self.hear();
        }
        self.world.stack.go_on(self.world.now);
        let next = self.world.stack.next_turn(self.world.now);
        assert!(
            next.is_none_or(|at| at > self.world.now),
            "it would never rest"
        );
    }

    fn hear(&mut self) {
        let there = self.world.stack.time(self.world.now);
        while let Some(frame) = self.world.stack.outgoing().map(<[u8]>::to_vec) {
            assert!(frame.len() <= 1514);
            assert_one_hop(&frame);
            self.note(&frame, false);
            self.world.stack.sent();
            let guest = &mut self.world.guest;
            guest.wire.incoming = frame;
            guest
                .interface
                .poll_ingress_single(there, &mut guest.wire, &mut guest.sockets);
            guest.wire.incoming.clear();
        }
        self.world.stack.go_on(self.world.now);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever the guest sends, the service neither panics nor keeps a connection, and the next
    /// honest client is answered.
    #[test]
    fn a_hostile_guest_harms_only_itself(acts in prop::collection::vec(act(), 1..120)) {
        let world = World::new(service(Version::V1, false));
        let mut hostile = Hostile { world, sequence: 0, acknowledge: 0, port: 50001 };
        let mut acts = acts.into_iter().peekable();
        while acts.peek().is_some() {
            if hostile.world.guest.sockets.iter().count() < 4 {
                let handle = hostile.world.guest.connect();
                let get = b"GET /latest HTTP/1.1\r\n\r\n";
                let _ = hostile.world.guest.socket(handle).send_slice(get);
            }
            hostile.turn(&mut acts);
        }
        let mut world = hostile.world;
        world.guest = Guest::new();
        // Nobody acknowledges anything, for as long as it takes.
        for _ in 0..3 {
            world.after(Pause::from_secs(11));
        }
        prop_assert_eq!(world.free(), CONNECTIONS);
        let (answer, _) = world.ask("GET /latest HTTP/1.1\r\n\r\n");
        prop_assert_eq!(body(&answer), "meta-data/");
    }
}

use super::kind::{BLOCK_FEATURES, BLOCK_MQ};
use super::testing::{Heard, message, reply};
use super::*;
use crate::memory::{self, allocate_with};
use crate::virtio::testing::{Driver, Rig};
use std::io::{Read as _, Write as _};
use std::sync::mpsc::{Receiver, Sender, channel};

const SOON: Duration = Duration::from_millis(200);

/// What a back-end is told: the request and its payload.
type Told = (u32, Vec<u8>);

/// How a back-end behaves: given a request and the reply that a good one would send (whole message), what
/// it sends. `None` hangs up.
type Manners = fn(u32, Vec<u8>) -> Option<Vec<u8>>;

fn good(_: u32, reply: Vec<u8>) -> Option<Vec<u8>> {
    Some(reply)
}

/// Serves one front-end until it is gone.
fn serve(mut socket: UnixStream, manners: Manners, told: &Sender<Told>) -> Option<()> {
    loop {
        let heard = Heard::on(&socket)?;
        let (request, answer) = (heard.request, heard.answer());
        told.send((request, heard.payload)).ok()?;
        if let Some(answer) = answer {
            let reply = manners(request, reply(request, &answer))?;
            socket.write_all(&reply).ok()?;
        }
    }
}

fn back_end(manners: Manners) -> (UnixStream, Receiver<Told>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (told, heard) = channel();
    std::thread::spawn(move || serve(theirs, manners, &told));
    (ours, heard)
}

fn block(manners: Manners, queues: u16) -> (Result<VhostUser, Error>, Receiver<Told>) {
    let (socket, heard) = back_end(manners);
    let options = VhostUserOptions {
        id: "far".into(),
        socket,
        kind: Kind::Block { queues },
    };
    (VhostUser::with_patience(options, SOON), heard)
}

/// A device that is started on shared memory.
fn started(manners: Manners) -> (Rig<VhostUser>, Receiver<Told>, Result<(), device::Error>) {
    let (device, heard) = block(manners, 2);
    let mut device = device.unwrap();
    let memory = allocate_with(
        0x40_0000,
        memory::Options {
            shared: true,
            ..memory::Options::default()
        },
    )
    .unwrap();
    let drivers: Vec<_> = (0..2).map(|i| Driver::new(&memory, i, 16)).collect();
    let events = crate::event_loop::EventLoop::new().unwrap();
    let signal = Arc::<crate::virtio::testing::Counter>::default();
    let mut queues = Queues::default();
    for (queue, driver) in queues.iter_mut().zip(&drivers) {
        *queue = Some(driver.queue(256, true));
    }
    let io = DeviceIo {
        memory: memory.clone(),
        signal: signal.clone(),
        events: events.registrar(0),
    };
    let result = device.start(queues, COMMON_FEATURES, io);
    let rig = Rig {
        device,
        drivers,
        signal,
        events,
        memory,
    };
    (rig, heard, result)
}

#[test]
fn shows_the_guest_what_the_back_end_offers_and_no_more() {
    let (device, _) = block(good, 8);
    let device = device.unwrap();
    let traits = device.traits();
    assert_eq!(traits.features, BLOCK_FEATURES);
    assert_eq!(traits.queue_sizes.len(), 4, "as many as it has");
    let config = device.config().bytes();
    assert_eq!(config.len(), 60);
    assert_eq!(config[..8], 1000_u64.to_le_bytes());
    assert_eq!(config[34..36], [4, 0]);
    let (device, _) = block(good, 1);
    assert_eq!(device.unwrap().traits().features & BLOCK_MQ, 0);
    let (socket, _heard) = back_end(good);
    let kind = Kind::Fs { tag: "host".into() };
    let id = "fs".into();
    let device = VhostUser::new(VhostUserOptions { id, socket, kind }).unwrap();
    let config = device.config().bytes();
    assert_eq!((&config[..5], config.len()), (&b"host\0"[..], 40));
    assert_eq!(device.traits().queue_sizes.len(), 2);
}

fn net(mac: Option<[u8; 6]>, mtu: Option<u16>) -> (VhostUser, Receiver<Told>) {
    let (socket, heard) = back_end(|request, reply| {
        // Offers, among all else, what is not its own.
        Some(if request == 1 {
            message(1, 5, &u64::MAX.to_le_bytes())
        } else {
            reply
        })
    });
    let options = VhostUserOptions {
        id: "card".into(),
        socket,
        kind: Kind::Net { mac, mtu },
    };
    (VhostUser::with_patience(options, SOON).unwrap(), heard)
}

#[test]
fn a_cards_address_and_mtu_are_the_configs() {
    use crate::virtio::net::{F_MAC, F_MTU, OFFLOADS};
    let (card, _heard) = net(None, None);
    assert_eq!(card.traits().features, OFFLOADS);
    let mac = [6, 0, 0, 0, 0, 1];
    let (card, _heard) = net(Some(mac), Some(1400));
    let traits = card.traits();
    assert_eq!(traits.features, OFFLOADS | F_MAC | F_MTU);
    assert_eq!(
        (traits.device_type, traits.queue_sizes.len()),
        (DeviceType::Net, 2)
    );
    let config = card.config().bytes().to_vec();
    assert_eq!(
        (&config[..6], &config[10..]),
        (&mac[..], &1400_u16.to_le_bytes()[..])
    );
}

/// Nor is it told of features that it has not got.
#[test]
fn a_card_keeps_what_is_its_own() {
    use crate::virtio::net::{F_MAC, F_MTU};
    let (mut card, heard) = net(Some([6; 6]), Some(1400));
    let memory = memory::Options {
        shared: true,
        ..memory::Options::default()
    };
    let events = crate::event_loop::EventLoop::new().unwrap();
    let io = DeviceIo {
        memory: allocate_with(0x40_0000, memory).unwrap(),
        signal: Arc::<crate::virtio::testing::Counter>::default(),
        events: events.registrar(0),
    };
    let agreed = COMMON_FEATURES | F_MAC | F_MTU | 1;
    card.start(Queues::default(), agreed, io).unwrap();
    let told = heard
        .try_iter()
        .find(|told| told.0 == Request::SetFeatures as u32);
    let expected = COMMON_FEATURES | PROTOCOL_FEATURES | 1;
    assert_eq!(told.unwrap().1, expected.to_le_bytes());
}

/// The addresses that a back-end is told are the guest's: it learns nothing of where this process has what.
#[test]
fn tells_the_back_end_where_the_rings_are() {
    let (mut rig, heard, result) = started(good);
    result.unwrap();
    let told: Vec<Told> = heard.try_iter().collect();
    let of = |request: Request| {
        let told = told.iter().filter(move |told| told.0 == request as u32);
        told.map(|told| told.1.clone()).collect::<Vec<_>>()
    };
    assert_eq!(
        of(Request::SetFeatures),
        [(COMMON_FEATURES | PROTOCOL_FEATURES).to_le_bytes()]
    );
    let table: Vec<u64> = of(Request::SetMemTable)[0]
        .chunks(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(table, [1, 0, 0x40_0000, 0, 0]);
    let state = rig.drivers[1].state;
    let addresses: Vec<u64> = of(Request::SetVringAddr)[1]
        .chunks(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(
        addresses,
        [1, state.descriptors, state.used, state.available, 0]
    );
    assert_eq!(of(Request::SetVringEnable).len(), 2);
    // A doorbell reaches the back-end's eventfd, and its eventfd the driver.
    rig.kick(1);
    assert_eq!(rig.device.queues[1].kick.read().unwrap(), 1);
    for round in 1..4 {
        rig.device.queues[1].call.write(1).unwrap();
        rig.poll();
        assert_eq!(rig.signal.count(), round);
    }
    // What the back-end says at the end is where the queue goes on.
    rig.memory
        .write_obj(5_u16, GuestAddress(state.used + 2))
        .unwrap();
    let states = rig.device.stop();
    let state = states[1].unwrap();
    assert_eq!((state.next_available, state.next_used), (7, 5));
    assert_eq!(rig.device.stop(), QueueStates::default());
}

#[test]
fn memory_that_is_not_shared_is_not_pretended_to_be() {
    let (device, _) = block(good, 1);
    let mut rig = Rig {
        device: device.unwrap(),
        drivers: Vec::new(),
        signal: Arc::default(),
        events: crate::event_loop::EventLoop::new().unwrap(),
        memory: crate::virtio::testing::memory(),
    };
    let io = DeviceIo {
        memory: rig.memory.clone(),
        signal: rig.signal.clone(),
        events: rig.events.registrar(0),
    };
    assert!(rig.device.start(Queues::default(), 0, io).is_err());
}

#[test]
fn a_back_end_that_says_nonsense_is_refused() {
    let hostile: [(&str, Manners); 12] = [
        ("hangs up", |_, _| None),
        ("hangs up later", |request, reply| {
            (request != 24).then_some(reply)
        }),
        ("is silent", |_, _| Some(Vec::new())),
        ("says half", |_, reply| {
            Some(reply[..reply.len() - 1].to_vec())
        }),
        ("says half a header", |_, reply| Some(reply[..5].to_vec())),
        ("answers another question", |request, reply| {
            Some([&(request ^ 2).to_le_bytes()[..], &reply[4..]].concat())
        }),
        ("does not reply", |_, mut reply| {
            reply[4] = 1;
            Some(reply)
        }),
        ("speaks another version", |_, mut reply| {
            reply[4] = 2 | 4;
            Some(reply)
        }),
        ("says too much", |_, mut reply| {
            reply[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
            Some(reply)
        }),
        ("says too little", |request, _| {
            Some(message(request, 5, &[0; 4]))
        }),
        ("has no features", |request, reply| {
            Some(match request {
                1 => message(1, 5, &0_u64.to_le_bytes()),
                _ => reply,
            })
        }),
        ("has another configuration", |request, mut reply| {
            if request == 24 {
                reply[12] = 9;
            }
            Some(reply)
        }),
    ];
    for (what, manners) in hostile {
        let began = std::time::Instant::now();
        let (device, _) = block(manners, 2);
        assert!(device.is_err(), "{what}");
        assert!(began.elapsed() < SOON * 20, "{what}");
    }
}

#[test]
fn a_back_end_that_goes_away_is_noticed_once_and_never_asked_again() {
    for (what, manners) in [
        (
            "refuses the memory",
            (|request, reply| {
                Some(match request {
                    5 => message(5, 5, &1_u64.to_le_bytes()),
                    _ => reply,
                })
            }) as Manners,
        ),
        ("hangs up at the memory", |request, reply| {
            (request != 5).then_some(reply)
        }),
    ] {
        let (mut rig, _, result) = started(manners);
        assert!(result.is_err(), "{what}");
        assert_eq!(rig.device.stop(), QueueStates::default());
        let io = DeviceIo {
            memory: rig.memory.clone(),
            signal: rig.signal.clone(),
            events: rig.events.registrar(0),
        };
        assert!(rig.device.start(Queues::default(), 0, io).is_err());
    }
    // While the device runs: as an event, which stops it.
    let (mut rig, _, result) = started(good);
    result.unwrap();
    rig.device
        .connection
        .socket()
        .shutdown(std::net::Shutdown::Both)
        .unwrap();
    let event = Event::Ready {
        key: SOCKET_KEY,
        events: EventSet::IN,
    };
    let error = rig.device.handle(event).unwrap_err().to_string();
    assert!(error.contains("far: it has gone away"), "{error}");
    rig.memory
        .write_obj(3_u16, GuestAddress(rig.drivers[0].state.used + 2))
        .unwrap();
    let state = rig.device.stop()[0].unwrap();
    assert_eq!((state.next_available, state.next_used), (3, 3));
}

#[test]
fn a_back_end_that_does_not_stop_holds_nobody_up_for_long() {
    for manners in [
        (|request, reply| Some(if request == 11 { Vec::new() } else { reply })) as Manners,
        // Another queue than the one that was asked about; a number that is no index.
        |request, mut reply| {
            if request == 11 {
                reply[12] ^= 1;
            }
            Some(reply)
        },
        |request, mut reply| {
            if request == 11 {
                reply[18] = 1;
            }
            Some(reply)
        },
    ] {
        let (mut rig, _, result) = started(manners);
        result.unwrap();
        let began = std::time::Instant::now();
        let state = rig.device.stop()[1].unwrap();
        assert_eq!((state.next_available, state.next_used), (0, 0));
        assert!(began.elapsed() < SOON * 20);
        assert!(rig.device.gone);
    }
}

#[test]
fn what_nobody_asked_for_ends_the_conversation() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let connection = Connection::new(ours, SOON);
    connection.unasked().unwrap();
    theirs.write_all(b"x").unwrap();
    assert!(matches!(connection.unasked(), Err(BackEndError::Unasked)));
    drop(theirs);
    assert!(matches!(connection.unasked(), Err(BackEndError::Gone)));
    let told = connection.tell(Request::SetOwner, &[], &[]);
    assert!(matches!(told, Err(BackEndError::Gone)));
}

/// A good back-end behind a wire that is cut after so many bytes of its own.
fn cut_after(count: u64) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (inner, served) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let (told, _heard) = channel();
        serve(served, good, &told)
    });
    let (mut from, mut to) = (theirs.try_clone().unwrap(), inner.try_clone().unwrap());
    std::thread::spawn(move || std::io::copy(&mut from, &mut to));
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut (&inner).take(count), &mut &theirs);
        let _ = theirs.shutdown(std::net::Shutdown::Both);
        let _ = inner.shutdown(std::net::Shutdown::Both);
    });
    ours
}

#[test]
fn a_back_end_may_hang_up_after_any_byte() {
    let began = std::time::Instant::now();
    let (mut refused, mut made) = (0, 0);
    for count in 0..220 {
        let options = VhostUserOptions {
            id: "far".into(),
            socket: cut_after(count),
            kind: Kind::Block { queues: 2 },
        };
        match VhostUser::with_patience(options, SOON) {
            Err(Error::BackEnd { .. }) => refused += 1,
            Err(other) => panic!("{count}: {other}"),
            Ok(mut device) => {
                made += 1;
                let shared = memory::Options {
                    shared: true,
                    ..memory::Options::default()
                };
                let io = DeviceIo {
                    memory: allocate_with(0x1_0000, shared).unwrap(),
                    signal: Arc::<crate::virtio::testing::Counter>::default(),
                    events: crate::event_loop::EventLoop::new().unwrap().registrar(0),
                };
                // Whether it starts or not, it stops.
                let _ = device.start(Queues::default(), COMMON_FEATURES, io);
                device.stop();
            }
        }
    }
    assert!(refused > 100 && made > 10, "{refused} {made}");
    assert!(began.elapsed() < SOON * 100);
}

#[test]
fn descriptors_that_nobody_asked_for_are_not_taken() {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (read, write) = nix::unistd::pipe().unwrap();
    let thread = std::thread::spawn(move || {
        let mut request = [0; 12];
        theirs.read_exact(&mut request).unwrap();
        let reply = message(Request::GetFeatures as u32, 5, &7_u64.to_le_bytes());
        let fds = [read.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let slice = [io::IoSlice::new(&reply)];
        let fd = theirs.as_raw_fd();
        sendmsg::<()>(fd, &slice, &rights, MsgFlags::empty(), None).unwrap();
    });
    let connection = Connection::new(ours, SOON);
    assert_eq!(connection.ask_u64(Request::GetFeatures).unwrap(), 7);
    thread.join().unwrap();
    // Nobody has the end that was sent.
    let error = nix::unistd::write(&write, b"x").unwrap_err();
    assert_eq!(error, nix::errno::Errno::EPIPE);
}

#[test]
fn a_back_end_that_lies_about_its_queues_gets_some_that_there_can_be() {
    for (manners, count) in [
        (
            (|request, reply| {
                Some(match request {
                    17 => message(17, 5, &0_u64.to_le_bytes()),
                    _ => reply,
                })
            }) as Manners,
            1,
        ),
        (
            |request, reply| {
                Some(match request {
                    17 => message(17, 5, &u64::MAX.to_le_bytes()),
                    _ => reply,
                })
            },
            3,
        ),
    ] {
        let device = block(manners, 3).0.unwrap();
        assert_eq!(device.traits().queue_sizes.len(), count);
    }
}

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::output::{CAPACITY, STALLED};
use super::*;
use crate::devices::serial::Offer;
use crate::virtio::testing::{DATA, END, Rig};

const RX: usize = 0;
const TX: usize = 1;

/// A console whose output goes nowhere yet.
fn console() -> (Rig<Console>, Arc<Port>, Arc<Output>) {
    let port = Port::new(Size::default()).unwrap();
    let output = Arc::new(Output::new().unwrap());
    let device = Console::new(Arc::clone(&port), Arc::clone(&output));
    (Rig::new(device), port, output)
}

/// Empties `output` into a channel; each piece waits for a word on the other one.
fn reader(output: &Arc<Output>) -> (Sender<()>, Receiver<Vec<u8>>) {
    let (go, wait) = channel();
    let (pieces, said) = channel();
    let output = Arc::clone(output);
    std::thread::spawn(move || {
        output.run(|bytes| {
            wait.recv().map_err(std::io::Error::other)?;
            pieces.send(bytes.to_vec()).map_err(std::io::Error::other)?;
            Ok(bytes.len())
        })
    });
    (go, said)
}

/// Reads `len` bytes of it.
fn read(go: &Sender<()>, said: &Receiver<Vec<u8>>, len: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < len {
        go.send(()).unwrap();
        all.extend(said.recv_timeout(Duration::from_secs(20)).unwrap());
    }
    all
}

#[test]
fn what_the_guest_says_is_written_in_order() {
    let (mut rig, _, output) = console();
    let (go, said) = reader(&output);
    rig.drivers[TX].put(DATA, b"one two three");
    rig.drivers[TX].add(&[(DATA, 4, false), (DATA + 4, 4, false)]);
    rig.drivers[TX].add(&[(DATA + 8, 5, false)]);
    rig.kick(1);
    assert_eq!(rig.drivers[TX].used(), Some((0, 0)));
    assert_eq!(rig.drivers[TX].used(), Some((2, 0)));
    assert_eq!(read(&go, &said, 13), b"one two three");
}

#[test]
fn a_chain_longer_than_the_buffer_goes_through_piece_by_piece() {
    let (mut rig, _, output) = console();
    let (go, said) = reader(&output);
    let len = (3 * CAPACITY) as u32;
    let text: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
    rig.drivers[TX].put(DATA, &text);
    rig.drivers[TX].add(&[(DATA, len, false)]);
    rig.kick(1);
    assert_eq!(rig.drivers[TX].used_pending(), None, "it waits for room");
    let mut all = Vec::new();
    while all.len() < text.len() {
        all.extend(read(&go, &said, 1));
        rig.poll();
    }
    assert!(all == text);
    assert_eq!(rig.drivers[TX].used(), Some((0, 0)));
}

#[test]
fn a_reader_that_went_away_stops_nothing_and_grows_nothing() {
    let (mut rig, _, output) = console();
    // As much as a guest can describe at once, many times over.
    let fill = |rig: &mut Rig<Console>| {
        rig.drivers[TX].add(&[(0, END as u32, false), (0, END as u32, false)]);
    };
    fill(&mut rig);
    rig.kick(1);
    assert_eq!(rig.drivers[TX].used(), None, "the reader may just be slow");
    std::thread::sleep(STALLED);
    rig.kick(1);
    assert_eq!(rig.drivers[TX].used(), Some((0, 0)));
    for _ in 0..100 {
        fill(&mut rig);
        rig.kick(1);
        assert!(rig.drivers[TX].used().is_some(), "it no longer waits");
    }
    // Of what was said, the buffer's worth is left, and no more.
    let (go, said) = reader(&output);
    read(&go, &said, CAPACITY);
    assert!(said.recv_timeout(STALLED).is_err());
    // And it is heard again.
    rig.drivers[TX].put(DATA, b"again");
    rig.drivers[TX].add(&[(DATA, 5, false)]);
    rig.kick(1);
    assert_eq!(read(&go, &said, 5), b"again");
}

#[test]
fn output_that_nobody_takes_any_more_is_lost_at_once() {
    let (mut rig, _, output) = console();
    let thread = Arc::clone(&output);
    std::thread::spawn(move || thread.run(|_| Err(std::io::ErrorKind::BrokenPipe.into())));
    for _ in 0..100 {
        rig.drivers[TX].add(&[(0, END as u32, false)]);
        let began = Instant::now();
        while rig.drivers[TX].used().is_none() {
            rig.kick(1);
            assert!(began.elapsed() < Duration::from_secs(20));
        }
    }
    output.finish();
}

#[test]
fn the_end_waits_for_a_reader_that_reads() {
    let output = Arc::new(Output::new().unwrap());
    output.finish();
    assert_eq!(output.push(b"last words"), 10);
    // Nobody is there: it gives up.
    output.finish();
    let (go, said) = reader(&output);
    let waiting = std::thread::spawn(move || output.finish());
    go.send(()).unwrap();
    waiting.join().unwrap();
    assert_eq!(said.try_recv().unwrap(), b"last words");
}

#[test]
fn what_is_typed_waits_for_buffers_and_then_goes_on() {
    let (mut rig, port, _) = console();
    assert!(port.is_running());
    assert_eq!(port.offer(b"hello"), Offer::Taken(5));
    rig.poll();
    rig.drivers[RX].add(&[(DATA, 2, true), (DATA + 0x100, 1, true)]);
    rig.drivers[RX].add(&[(DATA + 0x200, 64, true)]);
    rig.drivers[RX].add(&[(DATA + 0x300, 64, true)]);
    rig.kick(0);
    let driver = &mut rig.drivers[RX];
    assert_eq!((driver.used(), driver.used()), (Some((0, 3)), Some((2, 2))));
    assert_eq!(driver.get(DATA, 2), b"he");
    assert_eq!(driver.get(DATA + 0x100, 2), b"l\0");
    assert_eq!(driver.get(DATA + 0x200, 3), b"lo\0");
    assert_eq!(driver.used(), None);
    assert_eq!(port.offer(b"!"), Offer::Taken(1));
    rig.poll();
    assert_eq!(rig.drivers[RX].used(), Some((3, 1)));
}

#[test]
fn whoever_types_too_much_waits() {
    let (mut rig, port, _) = console();
    let _ = port.room().read();
    let typed = vec![b'x'; 2 * port::CAPACITY];
    assert_eq!(port.offer(&typed), Offer::Taken(port::CAPACITY));
    assert_eq!(port.offer(&typed), Offer::Full);
    assert!(port.room().read().is_err());
    rig.drivers[RX].add(&[(DATA, 1, true)]);
    rig.kick(0);
    assert!(port.room().read().is_ok());
    assert_eq!(port.offer(&typed), Offer::Taken(1));
}

#[test]
fn receive_buffers_without_room_lose_no_input() {
    let (mut rig, port, _) = console();
    rig.drivers[RX].add(&[(DATA, 8, false)]);
    rig.drivers[RX].add(&[(DATA, 8, true)]);
    port.offer(b"abc");
    rig.poll();
    assert_eq!(rig.drivers[RX].used(), Some((0, 0)));
    assert_eq!(rig.drivers[RX].used(), Some((1, 3)));
}

#[test]
fn transmit_buffers_that_are_writable_or_empty_say_nothing() {
    let (mut rig, _, output) = console();
    rig.drivers[TX].add(&[(DATA, 8, true)]);
    rig.drivers[TX].add(&[(DATA, 0, false)]);
    rig.kick(1);
    assert_eq!(rig.drivers[TX].used(), Some((0, 0)));
    assert_eq!(rig.drivers[TX].used(), Some((1, 0)));
    output.finish();
}

#[test]
fn a_broken_chain_breaks_the_device_and_not_the_host() {
    for queue in [RX, TX] {
        let (mut rig, port, _) = console();
        port.offer(b"x");
        rig.drivers[queue].describe(0, END, 8, 0, 0);
        rig.drivers[queue].offer(0);
        assert!(rig.handle(Event::Queue(queue as u16)).is_err());
    }
}

#[test]
fn another_size_is_announced_once() {
    let (mut rig, port, _) = console();
    let size = Size {
        columns: 132,
        rows: 43,
    };
    port.resize(size);
    rig.poll();
    assert_eq!(rig.signal.config_changes(), 1);
    assert_eq!(rig.device.config().bytes()[..4], [132, 0, 43, 0]);
    port.resize(size);
    rig.poll();
    assert_eq!(rig.signal.config_changes(), 1);
}

#[test]
fn stops_and_starts_with_what_was_typed() {
    let (mut rig, port, output) = console();
    rig.drivers[TX].put(DATA, b"before");
    rig.drivers[TX].add(&[(DATA, 6, false)]);
    rig.kick(1);
    let states = rig.device.stop();
    assert!(!port.is_running());
    assert_eq!(rig.device.stop(), QueueStates::default());
    port.offer(b"typed");
    port.resize(Size {
        columns: 1,
        rows: 1,
    });
    rig.poll();
    rig.start(&states, 0);
    rig.drivers[RX].add(&[(DATA, 8, true)]);
    rig.drivers[TX].put(DATA + 64, b" after");
    rig.drivers[TX].add(&[(DATA + 64, 6, false)]);
    rig.kick(0);
    rig.kick(1);
    assert_eq!(rig.drivers[RX].used(), Some((0, 5)));
    let (go, said) = reader(&output);
    assert_eq!(read(&go, &said, 12), b"before after");
    assert_eq!(rig.signal.config_changes(), 0, "the driver reads it anyway");
}

#[test]
fn a_half_said_chain_is_said_again_after_a_stop() {
    let (mut rig, _, output) = console();
    rig.drivers[TX].add(&[(0, 2 * CAPACITY as u32, false)]);
    rig.kick(1);
    let states = rig.device.stop();
    let (go, said) = reader(&output);
    read(&go, &said, CAPACITY);
    rig.start(&states, 0);
    rig.kick(1);
    for _ in 0..2 * CAPACITY / 4096 {
        read(&go, &said, 1);
        rig.poll();
    }
    assert_eq!(rig.drivers[TX].used(), Some((0, 0)));
}

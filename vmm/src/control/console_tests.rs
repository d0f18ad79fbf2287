//! Input that comes faster than the guest takes it. Standard input is the process's, so each test has a process of its own.

use super::*;
use crate::bus::BusDevice as _;
use crate::devices::serial::{SerialOptions, SerialPort};
use crate::testing::alone;
use crate::virtio::Console;
use crate::virtio::console::{Output, Port};
use crate::virtio::testing::{DATA, Rig};
use std::cell::Cell;
use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const TOKEN: u64 = 7;
/// How much is typed.
const TYPED: usize = 2 << 20;
/// Typed at once.
const PASTE: usize = 1000;
const PATIENCE: Duration = Duration::from_secs(60);

/// As much of the control thread as has to do with input.
struct Control {
    input: Input,
    epoll: Epoll,
}

impl Control {
    fn new() -> Self {
        Self {
            input: Input::new(),
            epoll: Epoll::new().unwrap(),
        }
    }

    /// Moves input, then waits up to `milliseconds` for more; whether there was any.
    fn turn(&mut self, offer: impl Fn(&[u8]) -> Offer, milliseconds: i32) -> bool {
        self.input.pump(offer, &self.epoll, TOKEN);
        let mut events = [EpollEvent::default(); 4];
        let count = self.epoll.wait(milliseconds, &mut events).unwrap();
        if count > 0 {
            assert_eq!((count, events[0].data()), (1, TOKEN));
            self.input.read(&self.epoll);
        }
        let pending = &self.input.pending;
        assert!(pending.len() <= CHUNK && pending.capacity() <= CHUNK);
        count > 0
    }
}

fn text() -> Vec<u8> {
    (0..TYPED).map(|i| (i % 251) as u8).collect()
}

/// Somebody who types all of it as soon as standard input takes it; how much has been typed, and what a pipe holds.
fn type_all() -> (Arc<AtomicUsize>, usize) {
    let (reader, mut writer) = io::pipe().unwrap();
    nix::unistd::dup2_stdin(&reader).unwrap();
    let room = nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_GETPIPE_SZ).unwrap();
    let typed = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&typed);
    std::thread::spawn(move || {
        for part in text().chunks(PASTE) {
            writer.write_all(part).unwrap();
            count.fetch_add(part.len(), Ordering::SeqCst);
        }
    });
    (typed, room as usize)
}

/// Types into a device of so much `room`, whose guest takes nothing for a while and then what `take` takes.
fn check(room: usize, offer: impl Fn(&[u8]) -> Offer, mut take: impl FnMut(&mut Vec<u8>)) {
    let (typed, pipe) = type_all();
    let mut control = Control::new();
    let full = Cell::new(false);
    let watched = |bytes: &[u8]| {
        let answer = offer(bytes);
        full.set(answer == Offer::Full);
        answer
    };
    let began = Instant::now();
    while !full.get() {
        control.turn(watched, 10);
        assert!(began.elapsed() < PATIENCE, "the device never gets full");
    }
    // More is there, and nobody is woken for it again and again.
    for _ in 0..1000 {
        assert!(!control.turn(watched, 0));
        assert!(full.get());
        assert!(typed.load(Ordering::SeqCst) <= pipe + room + CHUNK + PASTE);
    }
    let mut taken = Vec::new();
    while taken.len() < TYPED {
        take(&mut taken);
        control.turn(watched, 0);
        assert!(began.elapsed() < PATIENCE, "{} bytes came", taken.len());
    }
    assert!(taken == text(), "something was lost or came twice");
    // Its end is no input, and heard once.
    while control.input.source != Source::Closed {
        control.turn(watched, 10);
        assert!(began.elapsed() < PATIENCE, "it never ends");
    }
    assert!(!control.turn(watched, 0));
    take(&mut taken);
    assert_eq!(taken.len(), TYPED);
}

#[test]
fn a_guest_that_reads_no_console_makes_who_types_wait() {
    if !alone("control::console::tests::a_guest_that_reads_no_console_makes_who_types_wait") {
        return;
    }
    let port = Port::new(Size::default()).unwrap();
    let output = Arc::new(Output::new().unwrap());
    let mut rig = Rig::new(Console::new(Arc::clone(&port), output));
    let take = |taken: &mut Vec<u8>| {
        if rig.drivers[0].used_pending().is_none() {
            rig.poll();
        }
        // One buffer at a time.
        if taken.is_empty() || rig.drivers[0].used_pending().is_some() {
            if let Some((_, len)) = rig.drivers[0].used() {
                taken.extend(rig.drivers[0].get(DATA, len as usize));
            }
            rig.drivers[0].add(&[(DATA, 1000, true)]);
            rig.kick(0);
        }
    };
    check(4096, |bytes| port.offer(bytes), take);
}

#[test]
fn a_guest_that_reads_no_serial_port_makes_who_types_wait() {
    if !alone("control::console::tests::a_guest_that_reads_no_serial_port_makes_who_types_wait") {
        return;
    }
    const LINE_STATUS: u64 = 5;
    let port = SerialPort::new(SerialOptions::default()).unwrap();
    let get = |offset| {
        let mut byte = [0];
        port.read(offset, &mut byte);
        byte[0]
    };
    let take = |taken: &mut Vec<u8>| {
        while get(LINE_STATUS) & 1 != 0 {
            taken.push(get(0));
        }
    };
    check(CHUNK, |bytes| port.offer(bytes), take);
}

/// A file is always ready, so it must not be read for want of anything else to do.
#[test]
fn a_file_is_read_as_the_guest_takes_it() {
    if !alone("control::console::tests::a_file_is_read_as_the_guest_takes_it") {
        return;
    }
    const PIECE: usize = 1500;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&text()).unwrap();
    file.rewind().unwrap();
    nix::unistd::dup2_stdin(&file).unwrap();
    let mut control = Control::new();
    let taken = std::cell::RefCell::new(Vec::new());
    let room = Cell::new(0);
    let busy = Cell::new(false);
    let offer = |bytes: &[u8]| {
        let count = room.get().min(bytes.len());
        // A vCPU is at it every other time.
        if busy.replace(!busy.get()) {
            return Offer::Busy;
        }
        if count == 0 {
            return Offer::Full;
        }
        room.set(room.get() - count);
        taken.borrow_mut().extend_from_slice(&bytes[..count]);
        Offer::Taken(count)
    };
    let mut rounds = 0;
    while control.input.source != Source::Closed {
        if room.get() == 0 {
            room.set(PIECE);
        }
        assert!(!control.turn(offer, 0), "there is nothing to wait for");
        let read = file.stream_position().unwrap() as usize;
        assert!(read <= taken.borrow().len() + CHUNK);
        rounds += 1;
        assert!(rounds < TYPED);
    }
    assert!(*taken.borrow() == text());
}

#[test]
fn input_without_an_end_leaves_time_for_others() {
    if !alone("control::console::tests::input_without_an_end_leaves_time_for_others") {
        return;
    }
    nix::unistd::dup2_stdin(File::open("/dev/zero").unwrap()).unwrap();
    let mut control = Control::new();
    let taken = Cell::new(0);
    let all = |bytes: &[u8]| {
        taken.set(taken.get() + bytes.len());
        Offer::Taken(bytes.len())
    };
    for turn in 1..=10 {
        // It returns at all, and is to be called again.
        assert!(control.input.pump(all, &control.epoll, TOKEN));
        assert_eq!(taken.get(), turn * BUDGET * CHUNK);
    }
}

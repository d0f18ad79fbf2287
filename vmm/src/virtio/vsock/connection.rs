//! One connection between a program in the guest and one on the host.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use vm_memory::Permissions;

use super::packet::{CLOSED, HEADER_LEN, Header, NO_RECEIVE, NO_SEND, op};
use super::socket;
use crate::event_loop::EventSet;
use crate::memory::GuestMemory;
use crate::memory::iovec::IoVecBuffer;
use crate::virtio::chain::Chain;

/// Bytes that a connection holds for a host program that does not read: the room that the guest
/// is told of.
pub const BUFFER: u32 = 64 << 10;
/// The same when there are many connections already.
pub const SMALL_BUFFER: u32 = 8 << 10;

/// The two ports that name a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    /// On the host.
    pub host: u32,
    /// In the guest.
    pub guest: u32,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The guest called; the broker was asked to connect.
    Asked {
        /// The broker's request.
        request: u64,
    },
    /// The host called; the guest has not answered.
    Calling,
    /// Both are there.
    Open,
    /// The host's program is gone; the guest has not yet said that it knows.
    Lingering,
}

/// Packets for the guest that are due, besides data.
#[derive(Clone, Copy, Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    credit_update: bool,
    shutdown: bool,
}

/// What a connection has for the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Nothing now.
    Nothing,
    /// A packet: operation, flags, and bytes of data already put behind the header's place.
    Packet(u16, u32, u32),
}

/// A connection.
pub struct Connection {
    /// How far it is.
    pub state: State,
    /// Its socket's key in the event loop.
    pub key: u32,
    /// It is in the line of those with something for the guest.
    pub queued: bool,
    stream: Option<UnixStream>,
    due: Due,
    /// What the host's program has done for good, as flags of a SHUTDOWN.
    host_closed: u32,
    /// What the guest has.
    guest_closed: u32,
    /// What was done to the socket about it: shutting it again would wake us again, for ever.
    shut: u32,
    hung_up: bool,
    readable: bool,
    /// Data for the host that its socket did not take, and the most there may be.
    waiting: VecDeque<u8>,
    buffer: u32,
    /// Bytes from the guest, ever; and of those, bytes that the host's socket took.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest knows it.
    told: Wrapping<u32>,
    /// Bytes to the guest, ever; how much room it has, and how much of them it consumed.
    sent: Wrapping<u32>,
    guest_buffer: u32,
    guest_consumed: Wrapping<u32>,
    /// The guest was asked for credit and has given none since.
    asked_credit: bool,
}

impl Connection {
    fn new(state: State, stream: Option<UnixStream>, key: u32, buffer: u32) -> Self {
        Self {
            state,
            key,
            queued: false,
            stream,
            due: Due::default(),
            host_closed: 0,
            guest_closed: 0,
            shut: 0,
            hung_up: false,
            readable: false,
            waiting: VecDeque::new(),
            buffer,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_consumed: Wrapping(0),
            asked_credit: false,
        }
    }

    /// One that the guest asked for with `header`, and that waits for the broker.
    pub fn from_guest(request: u64, header: &Header, buffer: u32) -> Self {
        let mut connection = Self::new(State::Asked { request }, None, 0, buffer);
        connection.note_credit(header);
        connection
    }

    /// One that a program on the host asked for.
    pub fn from_host(stream: UnixStream, key: u32, buffer: u32) -> Self {
        let mut connection = Self::new(State::Calling, Some(stream), key, buffer);
        connection.due.request = true;
        // What it sent right behind its line was reported while that line was awaited.
        connection.readable = true;
        connection
    }

    /// The broker connected it.
    pub fn connected(&mut self, stream: UnixStream, key: u32) {
        self.stream = Some(stream);
        self.key = key;
        self.state = State::Open;
        self.due.response = true;
    }

    /// The guest accepted it; the host's program is told, in Firecracker's words.
    ///
    /// # Errors
    /// When that program does not take the line.
    pub fn accepted(&mut self, host_port: u32) -> Result<(), Errno> {
        let stream = self.stream.as_ref().ok_or(Errno::ENOTCONN)?;
        let line = format!("OK {host_port}\n");
        if socket::send(stream, [line.as_bytes(), &[]])? != line.len() {
            return Err(Errno::EAGAIN);
        }
        self.state = State::Open;
        Ok(())
    }

    /// Takes the guest's credit out of a packet. Whatever it says, only buffers that the guest
    /// gives are ever filled.
    pub fn note_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_consumed = Wrapping(header.fwd_cnt);
        // A guest whose program does not read answers that it has no room. Asking again would go on
        // for as long as that lasts; the guest tells by itself when there is some.
        if self.credit() > 0 {
            self.asked_credit = false;
        }
    }

    /// Room in the guest in bytes.
    fn credit(&self) -> u32 {
        let in_flight = self.sent - self.guest_consumed;
        self.guest_buffer.saturating_sub(in_flight.0)
    }

    /// `buf_alloc` and `fwd_cnt` for a packet that goes out now.
    pub fn tell_credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.due.credit_update = false;
        (self.buffer, self.forwarded.0)
    }

    /// The guest wants to know the credit.
    pub fn credit_requested(&mut self) {
        self.due.credit_update = true;
    }

    /// What epoll says about the socket.
    pub fn ready(&mut self, events: EventSet) {
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
            self.readable = true;
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
            // What it wrote before is still to be read, up to the end.
            self.readable = true;
            self.note_end();
        }
        if events.contains(EventSet::OUT) {
            self.flush();
        }
    }

    /// Whether it may hold [`BUFFER`] bytes.
    pub fn is_large(&self) -> bool {
        self.buffer == BUFFER
    }

    /// Whether the host's program is gone altogether.
    pub fn is_hung_up(&self) -> bool {
        self.hung_up
    }

    /// Data from the guest, `len` bytes behind the header in `chain`. False when the guest sends
    /// more than it was told there is room for.
    pub fn data(
        &mut self,
        pieces: &mut IoVecBuffer,
        memory: &GuestMemory,
        chain: &Chain,
        len: u32,
    ) -> bool {
        let unforwarded = (self.received - self.forwarded).0;
        if len > self.buffer.saturating_sub(unforwarded) || self.guest_closed & NO_SEND != 0 {
            return false;
        }
        self.received += len;
        let mut done = 0;
        if self.waiting.is_empty() {
            done = self.pass_on(pieces, memory, chain, len);
        }
        // The rest waits in a buffer of ours, whose size the check above bounds. It is taken whole, for
        // one that grows by doubling may end up with nearly twice as much.
        if done < len && self.waiting.capacity() == 0 {
            self.waiting.reserve_exact(self.buffer as usize);
        }
        let mut part = [0; 4096];
        while done < len {
            let count = (len - done).min(part.len() as u32);
            let piece = part.get_mut(..count as usize).unwrap_or_default();
            let offset = HEADER_LEN as u64 + u64::from(done);
            if chain.read_at(memory, offset, piece).is_err() {
                return false;
            }
            self.waiting.extend(&*piece);
            done += count;
        }
        true
    }

    /// Sends data from guest memory straight to the socket; returns how much need not wait.
    fn pass_on(
        &mut self,
        pieces: &mut IoVecBuffer,
        memory: &GuestMemory,
        chain: &Chain,
        len: u32,
    ) -> u32 {
        let Some(stream) = &self.stream else {
            // Nobody will read it.
            self.forward(len);
            return len;
        };
        let Ok(mut data) = pieces.fill(
            memory,
            chain.readable(),
            HEADER_LEN as u64,
            u64::from(len),
            Permissions::Read,
        ) else {
            return 0;
        };
        loop {
            match data.send(stream.as_fd()) {
                // At most `len`.
                Ok(count) => {
                    self.forward(count as u32);
                    return count as u32;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return 0,
                Err(_) => {
                    self.forward(len);
                    self.host_closes(NO_RECEIVE);
                    return len;
                }
            }
        }
    }

    /// Sends waiting data as far as the socket takes it.
    fn flush(&mut self) {
        while !self.waiting.is_empty() {
            let sent = match &self.stream {
                Some(stream) => {
                    let (front, back) = self.waiting.as_slices();
                    socket::send(stream, [front, back])
                }
                None => Err(Errno::EPIPE),
            };
            match sent {
                Ok(count) => {
                    self.waiting.drain(..count.min(self.waiting.len()));
                    // At most `buffer`.
                    self.forward(count as u32);
                }
                Err(Errno::EAGAIN) => return,
                Err(_) => {
                    self.forward(self.waiting.len() as u32);
                    self.waiting.clear();
                    self.host_closes(NO_RECEIVE);
                }
            }
        }
        self.waiting.shrink_to(0);
        self.shut_down();
    }

    /// Counts bytes as gone, and tells the guest before it runs out of credit.
    fn forward(&mut self, count: u32) {
        self.forwarded += count;
        if (self.forwarded - self.told).0 >= self.buffer / 4 {
            self.due.credit_update = true;
        }
    }

    fn host_closes(&mut self, flags: u32) {
        if self.host_closed & flags != flags {
            self.host_closed |= flags;
            self.due.shutdown = true;
        }
    }

    /// Tells the guest that the host's program is gone: once all that it wrote was read, or the guest
    /// wants none of it.
    fn note_end(&mut self) {
        let all_read = self.host_closed & NO_SEND != 0 || self.guest_closed & NO_RECEIVE != 0;
        if self.hung_up && all_read {
            self.host_closes(CLOSED);
        }
    }

    /// The guest receives no more, sends no more, or both.
    pub fn guest_closes(&mut self, flags: u32) {
        self.guest_closed |= flags & CLOSED;
        self.note_end();
        self.shut_down();
    }

    /// Passes on to the socket what the guest closed: sending only after all its data.
    fn shut_down(&mut self) {
        let Some(stream) = &self.stream else { return };
        let mut due = self.guest_closed & !self.shut;
        if !self.waiting.is_empty() {
            due &= !NO_SEND;
        }
        for (flag, how) in [(NO_RECEIVE, Shutdown::Read), (NO_SEND, Shutdown::Write)] {
            if due & flag != 0 {
                // It fails only if the other side is gone, and then it is shut.
                let _ = stream.shutdown(how);
            }
        }
        self.shut |= due;
    }

    /// Whether the guest closed it and all its data reached the host: then it ends with an RST.
    pub fn is_finished(&self) -> bool {
        self.guest_closed == CLOSED && self.waiting.is_empty()
    }

    /// Whether data of a guest that ended its sending in good order still waits for the host's
    /// program. It is delivered even if the guest forgets the connection: Linux does, some seconds
    /// after its program closed it.
    pub fn owes_host(&self) -> bool {
        self.guest_closed & NO_SEND != 0
            && !self.waiting.is_empty()
            && !self.hung_up
            && self.stream.is_some()
    }

    /// Whether there is something for the guest, as far as one can know without reading.
    pub fn has_output(&self) -> bool {
        self.due.request
            || self.due.response
            || self.due.shutdown
            || self.due.credit_update
            || self.can_read()
    }

    fn can_read(&self) -> bool {
        self.state == State::Open
            && self.readable
            && self.guest_closed & NO_RECEIVE == 0
            && (self.credit() > 0 || !self.asked_credit)
    }

    /// The next packet for the guest; data is read straight into `chain`, behind the header.
    pub fn output(
        &mut self,
        pieces: &mut IoVecBuffer,
        memory: &GuestMemory,
        chain: &Chain,
    ) -> Output {
        if std::mem::take(&mut self.due.request) {
            return Output::Packet(op::REQUEST, 0, 0);
        }
        if std::mem::take(&mut self.due.response) {
            return Output::Packet(op::RESPONSE, 0, 0);
        }
        if self.can_read() {
            if self.credit() == 0 {
                self.asked_credit = true;
                return Output::Packet(op::CREDIT_REQUEST, 0, 0);
            }
            let count = self.read(pieces, memory, chain);
            if count > 0 {
                return Output::Packet(op::RW, 0, count);
            }
        }
        if std::mem::take(&mut self.due.shutdown) {
            if self.host_closed == CLOSED {
                self.state = State::Lingering;
            }
            return Output::Packet(op::SHUTDOWN, self.host_closed, 0);
        }
        if std::mem::take(&mut self.due.credit_update) {
            return Output::Packet(op::CREDIT_UPDATE, 0, 0);
        }
        Output::Nothing
    }

    /// Reads from the socket into guest memory; zero when there is nothing, or never will be.
    fn read(&mut self, pieces: &mut IoVecBuffer, memory: &GuestMemory, chain: &Chain) -> u32 {
        self.readable = false;
        let credit = u64::from(self.credit().min(BUFFER));
        let Some(stream) = &self.stream else {
            return 0;
        };
        let Ok(mut room) = pieces.fill(
            memory,
            chain.writable(),
            HEADER_LEN as u64,
            credit,
            Permissions::Write,
        ) else {
            return 0;
        };
        if room.is_empty() {
            return 0;
        }
        let result = loop {
            match room.receive(stream.as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        match result {
            Ok(0) => {
                let flags = if self.hung_up { CLOSED } else { NO_SEND };
                self.host_closes(flags);
                0
            }
            // At most `credit`.
            Ok(count) => {
                self.readable = true;
                self.sent += count as u32;
                count as u32
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(_) => {
                self.host_closes(CLOSED);
                0
            }
        }
    }

    /// Gives the socket up, to be closed.
    pub fn take_stream(&mut self) -> Option<UnixStream> {
        self.stream.take()
    }
}

//! `vsock`: listens on `probe.port=N` (5000), accepts one connection, and echoes until the host
//! has shut down its side. `vsock-connect`: connects to the host's port N, says `hello`, and
//! echoes likewise.

mod many;

pub use many::run as many;

use super::Failure;
use crate::cmdline::Cmdline;
use crate::machine::wait_for;
use crate::serial;
use crate::virtio::{Buffer, Device, Queue, RING};

const VSOCK: u32 = 19;
const HOST: u64 = 2;
const HEADER: usize = 44;
const PAYLOAD: usize = 4096;
const TYPE_STREAM: u16 = 1;
/// What we tell the host that we can take.
const BUF_ALLOC: u32 = 16384;
const HELD: usize = BUF_ALLOC as usize;
/// Receive buffers, each of two descriptors.
const BUFFERS: usize = RING / 2;
const OUR_PORT: u32 = 1025;

/// Operations (virtio 1.2, section 5.10.6).
mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

const SHUTDOWN_SEND: u32 = 2;
const SHUTDOWN_BOTH: u32 = 3;

#[derive(Clone, Copy)]
struct Packet {
    source_port: u32,
    destination_port: u32,
    len: usize,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    slot: usize,
}

struct Socket {
    cid: u64,
    rx: Queue,
    tx: Queue,
    headers: [[u8; HEADER]; BUFFERS],
    data: [[u8; PAYLOAD]; BUFFERS],
    /// Bytes that were taken and not yet echoed, in a ring.
    held: [u8; HELD],
    our_port: u32,
    peer_port: u32,
    /// Bytes that we took, and sent.
    forwarded: u32,
    sent: u32,
    /// The peer's credit.
    peer_alloc: u32,
    peer_forwarded: u32,
}

impl Socket {
    fn offer(&mut self, slot: usize) {
        let buffers = [
            Buffer::into(&mut self.headers[slot]),
            Buffer::into(&mut self.data[slot]),
        ];
        self.rx.add((slot * 2) as u16, &buffers);
        self.rx.kick();
    }

    /// The next packet from the host; its slot must be offered again afterwards.
    fn receive(&mut self) -> Result<Packet, Failure> {
        let mut done = None;
        wait_for(|| {
            done = self.rx.take();
            done.is_some()
        })?;
        let (head, _) = done.ok_or("no packet")?;
        let slot = head as usize / 2;
        let header = self
            .headers
            .get(slot)
            .ok_or("an unknown buffer came back")?;
        // SAFETY: the device wrote it behind the compiler's back.
        let header = unsafe { (&raw const *header).read_volatile() };
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let packet = Packet {
            source_port: word(16),
            destination_port: word(20),
            len: word(24) as usize,
            op: u16::from_le_bytes([header[30], header[31]]),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            slot,
        };
        self.peer_alloc = packet.buf_alloc;
        self.peer_forwarded = packet.fwd_cnt;
        Ok(packet)
    }

    fn send(&mut self, op: u16, flags: u32, payload: &[u8]) -> Result<(), Failure> {
        let mut header = [0u8; HEADER];
        header[0..8].copy_from_slice(&self.cid.to_le_bytes());
        header[8..16].copy_from_slice(&HOST.to_le_bytes());
        header[16..20].copy_from_slice(&self.our_port.to_le_bytes());
        header[20..24].copy_from_slice(&self.peer_port.to_le_bytes());
        header[24..28].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        header[28..30].copy_from_slice(&TYPE_STREAM.to_le_bytes());
        header[30..32].copy_from_slice(&op.to_le_bytes());
        header[32..36].copy_from_slice(&flags.to_le_bytes());
        header[36..40].copy_from_slice(&BUF_ALLOC.to_le_bytes());
        header[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        let head = Buffer::out(&header);
        if payload.is_empty() {
            self.tx.call(&[head])?;
        } else {
            self.tx.call(&[head, Buffer::out(payload)])?;
            self.sent = self.sent.wrapping_add(payload.len() as u32);
        }
        Ok(())
    }

    fn credit(&self) -> usize {
        let flying = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(flying) as usize
    }

    /// Echoes until the host has shut down and has everything back, or resets; then closes.
    /// Returns the bytes echoed.
    ///
    /// What the host has no credit for yet is held meanwhile: it goes on sending, and its packets
    /// come before those that bring credit.
    fn echo(&mut self) -> Result<u64, Failure> {
        let (mut taken, mut total) = (0u64, 0u64);
        let (mut host_is_done, mut asked) = (false, false);
        loop {
            let credit = self.credit();
            if taken > total && credit > 0 {
                let at = total as usize % HELD;
                let len = ((taken - total) as usize)
                    .min(credit)
                    .min(PAYLOAD)
                    .min(HELD - at);
                let mut data = [0; PAYLOAD];
                data[..len].copy_from_slice(&self.held[at..at + len]);
                self.forwarded = self.forwarded.wrapping_add(len as u32);
                self.send(op::RW, 0, &data[..len])?;
                total += len as u64;
                asked = false;
                continue;
            }
            if host_is_done && taken == total {
                self.send(op::SHUTDOWN, SHUTDOWN_BOTH, &[])?;
                return Ok(total);
            }
            if taken > total && !asked {
                self.send(op::CREDIT_REQUEST, 0, &[])?;
                asked = true;
            }
            let packet = self.receive()?;
            if packet.destination_port != self.our_port {
                return Err("a packet that is not for this connection");
            }
            match packet.op {
                op::RW => {
                    if packet.len > PAYLOAD || packet.len > HELD - (taken - total) as usize {
                        return Err("the host sends more than there is room for");
                    }
                    for &byte in &self.data[packet.slot][..packet.len] {
                        self.held[taken as usize % HELD] = byte;
                        taken += 1;
                    }
                }
                op::CREDIT_REQUEST => self.send(op::CREDIT_UPDATE, 0, &[])?,
                op::SHUTDOWN => host_is_done |= packet.flags & SHUTDOWN_SEND != 0,
                op::RST => return Ok(total),
                _ => {}
            }
            self.offer(packet.slot);
        }
    }
}

fn open(cmdline: &Cmdline) -> Result<Socket, Failure> {
    let device = Device::find(cmdline, VSOCK, 0, 0)?;
    let (rx, tx) = (device.queue(0, 0)?, device.queue(1, 1)?);
    let _events = device.queue(2, 2)?;
    device.finish()?;
    Ok(Socket {
        cid: u64::from(device.config32(0)),
        rx,
        tx,
        headers: [[0; HEADER]; BUFFERS],
        data: [[0; PAYLOAD]; BUFFERS],
        held: [0; HELD],
        our_port: 0,
        peer_port: 0,
        forwarded: 0,
        sent: 0,
        peer_alloc: 0,
        peer_forwarded: 0,
    })
}

fn port(cmdline: &Cmdline) -> u32 {
    cmdline.number("probe.port").unwrap_or(5000) as u32
}

/// Accepts one connection of the host's.
pub fn echo(cmdline: &Cmdline) -> Result<(), Failure> {
    let mut socket = open(cmdline)?;
    (0..BUFFERS).for_each(|slot| socket.offer(slot));
    serial::line(format_args!("probe: listening on {}", port(cmdline)));
    loop {
        let packet = socket.receive()?;
        socket.our_port = packet.destination_port;
        socket.peer_port = packet.source_port;
        socket.offer(packet.slot);
        if packet.op != op::REQUEST {
            continue;
        }
        if packet.destination_port == port(cmdline) {
            break;
        }
        socket.send(op::RST, 0, &[])?;
    }
    socket.send(op::RESPONSE, 0, &[])?;
    let total = socket.echo()?;
    serial::line(format_args!("probe: echoed {total} bytes"));
    Ok(())
}

/// Connects to a port of the host's.
pub fn connect(cmdline: &Cmdline) -> Result<(), Failure> {
    let mut socket = open(cmdline)?;
    (0..BUFFERS).for_each(|slot| socket.offer(slot));
    socket.our_port = OUR_PORT;
    socket.peer_port = port(cmdline);
    socket.send(op::REQUEST, 0, &[])?;
    let answer = socket.receive()?;
    socket.offer(answer.slot);
    match answer.op {
        op::RESPONSE => {}
        op::RST => return Err("the host refused the connection"),
        _ => return Err("an unexpected answer to the request"),
    }
    socket.send(op::RW, 0, b"hello")?;
    let total = socket.echo()?;
    serial::line(format_args!("probe: echoed {total} bytes"));
    Ok(())
}

//! `vsock-many`: serves the host until `probe.count=N` (1000) of its connections have ended, all of them open at once; then
//! makes as many to the host's next port.
//!
//! A connection is told from another one by its ports alone, so there is nothing to remember of any. What is said on
//! one comes back at once, and `bye` when no more is. On other ports than the first one anybody is served, too; there a
//! connection whose data end with `!` is reset behind them.

use super::{BUFFERS, PAYLOAD, Packet, SHUTDOWN_BOTH, SHUTDOWN_SEND, Socket, op, open, port};
use crate::cmdline::Cmdline;
use crate::serial;
use crate::tasks::Failure;

const FIRST_PORT: u32 = 2000;
const MAX: usize = 1024;

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let count = cmdline.number("probe.count").unwrap_or(1000) as usize;
    if count > MAX {
        return Err("too many");
    }
    let mut socket = open(cmdline)?;
    (0..BUFFERS).for_each(|slot| socket.offer(slot));
    let port = port(cmdline);
    serial::line(format_args!("probe: listening on {port}"));
    serve(&mut socket, port, count)?;
    call(&mut socket, port + 1, count)
}

impl Socket {
    /// Whatever is sent next is an answer to `packet`.
    fn answer(&mut self, packet: &Packet) {
        self.our_port = packet.destination_port;
        self.peer_port = packet.source_port;
    }
}

fn serve(socket: &mut Socket, port: u32, count: usize) -> Result<(), Failure> {
    let (mut opened, mut ended) = (0, 0);
    while ended < count {
        let packet = socket.receive()?;
        socket.answer(&packet);
        let counts = usize::from(packet.destination_port == port);
        match packet.op {
            op::REQUEST => {
                socket.send(op::RESPONSE, 0, &[])?;
                opened += counts;
                if counts == 1 && opened == count {
                    serial::line(format_args!("probe: all are open"));
                }
            }
            op::RW => {
                let mut data = [0; PAYLOAD];
                let len = packet.len.min(PAYLOAD);
                data[..len].copy_from_slice(&socket.data[packet.slot][..len]);
                socket.send(op::RW, 0, &data[..len])?;
                if counts == 0 && data[..len].ends_with(b"!") {
                    socket.send(op::RST, 0, &[])?;
                }
            }
            op::CREDIT_REQUEST => socket.send(op::CREDIT_UPDATE, 0, &[])?,
            op::SHUTDOWN if packet.flags & SHUTDOWN_SEND != 0 => {
                socket.send(op::RW, 0, b"bye")?;
                socket.send(op::SHUTDOWN, SHUTDOWN_BOTH, &[])?;
                ended += counts;
            }
            _ => {}
        }
        socket.offer(packet.slot);
    }
    Ok(())
}

fn call(socket: &mut Socket, port: u32, count: usize) -> Result<(), Failure> {
    let ours = || (FIRST_PORT..).take(count);
    for our_port in ours() {
        (socket.our_port, socket.peer_port) = (our_port, port);
        socket.send(op::REQUEST, 0, &[])?;
        loop {
            let packet = socket.receive()?;
            socket.offer(packet.slot);
            // The ends of those that were served come meanwhile.
            if packet.destination_port == our_port {
                if packet.op != op::RESPONSE {
                    return Err("the host refused a connection");
                }
                break;
            }
        }
    }
    serial::line(format_args!("probe: all are called"));
    for our_port in ours() {
        (socket.our_port, socket.peer_port) = (our_port, port);
        socket.send(op::RW, 0, b"line")?;
        socket.send(op::SHUTDOWN, SHUTDOWN_SEND, &[])?;
    }
    let mut ended = [false; MAX];
    let (mut bytes, mut left) = (0, count);
    while left > 0 {
        let packet = socket.receive()?;
        socket.answer(&packet);
        let number = packet.destination_port.wrapping_sub(FIRST_PORT) as usize;
        let ended = ended.get_mut(number).filter(|_| number < count);
        match (packet.op, ended) {
            (op::RW, Some(_)) => bytes += packet.len,
            (op::SHUTDOWN | op::RST, Some(ended)) => {
                if packet.op == op::SHUTDOWN {
                    socket.send(op::RST, 0, &[])?;
                }
                left -= usize::from(!*ended);
                *ended = true;
            }
            _ => {}
        }
        socket.offer(packet.slot);
    }
    if bytes != count * 4 {
        return Err("not every line came back");
    }
    Ok(())
}

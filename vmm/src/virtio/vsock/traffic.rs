//! The packets between the connections and the guest's rings.

use log::debug;

use super::connection::{Connection, Output, Ports, State};
use super::hub::{Hub, MAX_REFUSALS};
use super::packet::{CLOSED, HEADER_LEN, HOST_CID, Header, STREAM, op};
use crate::event_loop::Registrar;
use crate::memory::GuestMemory;
use crate::memory::iovec::IoVecBuffer;
use crate::virtio::chain::{self, Chain};
use crate::virtio::queue::Verdict;

impl Hub {
    /// Takes a packet from the guest. It is used up in any case: what the host cannot take now
    /// waits here, within the credit that the guest was given.
    pub fn take_packet(
        &mut self,
        events: &Registrar,
        pieces: &mut IoVecBuffer,
        memory: &GuestMemory,
        chain: &Chain,
    ) {
        self.metrics.tx_packets_count.inc();
        let mut bytes = [0; HEADER_LEN];
        if let Err(error) = chain.read_at(memory, 0, &mut bytes) {
            debug!("vsock: a packet without a header: {error}");
            return;
        }
        let header = Header::decode(&bytes);
        if header.src_cid != self.guest_cid {
            debug!("vsock: a packet from CID {}", header.src_cid);
            return;
        }
        let has_data = chain.readable_len().saturating_sub(HEADER_LEN as u64);
        let is_sound = header.dst_cid == HOST_CID
            && header.kind == STREAM
            && (header.op != op::RW || u64::from(header.len) <= has_data);
        if !is_sound {
            self.refuse(&header);
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let Some(connection) = self.connections.get_mut(&ports) else {
            match header.op {
                op::REQUEST => self.call(events, ports, &header),
                _ => self.refuse(&header),
            }
            return;
        };
        connection.note_credit(&header);
        let asked = matches!(connection.state, State::Asked { .. });
        match header.op {
            op::RST => {
                self.guest_forgets(events, ports);
                return;
            }
            op::RESPONSE if connection.state == State::Calling => {
                if let Err(error) = connection.accepted(ports.host) {
                    debug!("vsock: the caller of port {} is gone: {error}", ports.guest);
                    self.reset(events, ports);
                    return;
                }
            }
            op::RW if connection.state == State::Open => {
                self.metrics.tx_bytes_count.add(header.len.into());
                if !connection.data(pieces, memory, chain, header.len) {
                    self.reset(events, ports);
                    return;
                }
            }
            // The host's program is gone; the guest may not have read that yet.
            op::RW if connection.state == State::Lingering => {}
            op::SHUTDOWN if connection.state == State::Lingering => {
                self.reset(events, ports);
                return;
            }
            op::SHUTDOWN if connection.state == State::Open => {
                connection.guest_closes(header.flags);
            }
            // Given up before there was an answer.
            op::SHUTDOWN if header.flags & CLOSED == CLOSED => {
                self.reset(events, ports);
                return;
            }
            op::CREDIT_UPDATE if !asked => {}
            op::CREDIT_REQUEST if !asked => connection.credit_requested(),
            _ => {
                self.reset(events, ports);
                return;
            }
        }
        self.settle(events, ports);
    }

    /// The guest calls a port of the host.
    fn call(&mut self, events: &Registrar, ports: Ports, header: &Header) {
        let Some(buffer) = self.room(events) else {
            return self.refuse(header);
        };
        let request = match &mut self.connector {
            Some(connector) => connector.connect(ports.host),
            None => Err("there is no broker".into()),
        };
        match request {
            Ok(request) => {
                let connection = Connection::from_guest(request, header, buffer);
                self.metrics.conns_added.inc();
                self.connections.insert(ports, connection);
            }
            Err(error) => {
                debug!("vsock: no connection to port {}: {error}", ports.host);
                self.refuse(header);
            }
        }
    }

    /// Answers a packet that fits no connection with an RST, unless it is one.
    pub(super) fn refuse(&mut self, header: &Header) {
        if header.op != op::RST && self.refusals.len() < MAX_REFUSALS {
            self.refusals.push_back(Header {
                src_cid: header.dst_cid,
                dst_cid: header.src_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                kind: header.kind,
                op: op::RST,
                ..Header::default()
            });
        }
    }

    /// Puts the next packet for the guest into `chain`.
    ///
    /// # Errors
    /// When the chain has no room for a header and any data.
    pub fn give_packet(
        &mut self,
        events: &Registrar,
        pieces: &mut IoVecBuffer,
        memory: &GuestMemory,
        chain: &Chain,
    ) -> Result<Verdict, chain::Error> {
        if self.endings.is_empty() && self.refusals.is_empty() && self.ready.is_empty() {
            return Ok(Verdict::Keep);
        }
        if chain.writable_len() <= HEADER_LEN as u64 {
            return Err(chain::Error::TooShort { head: chain.head() });
        }
        let ending = self.endings.pop_front().map(|ports| Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: STREAM,
            op: op::RST,
            ..Header::default()
        });
        if let Some(header) = ending.or_else(|| self.refusals.pop_front()) {
            chain.write_at(memory, 0, &header.encode())?;
            self.metrics.rx_packets_count.inc();
            return Ok(Verdict::Used(HEADER_LEN as u32));
        }
        while let Some(ports) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&ports) else {
                continue;
            };
            connection.queued = false;
            let output = connection.output(pieces, memory, chain);
            let Output::Packet(op, flags, len) = output else {
                continue;
            };
            let (buf_alloc, fwd_cnt) = connection.tell_credit();
            let header = Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: ports.host,
                dst_port: ports.guest,
                len,
                kind: STREAM,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            chain.write_at(memory, 0, &header.encode())?;
            self.metrics.rx_packets_count.inc();
            self.metrics.rx_bytes_count.add(len.into());
            if connection.state == State::Lingering {
                self.hang_up(events, ports);
            }
            // To the end of the line: the others first.
            self.settle(events, ports);
            return Ok(Verdict::Used(len.saturating_add(HEADER_LEN as u32)));
        }
        Ok(Verdict::Keep)
    }
}

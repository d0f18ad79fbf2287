//! A guest, a host and a broker for the tests of the socket device.

use super::connector::Answer;
use super::packet::{HEADER_LEN, Header, STREAM, op};
use super::*;
use crate::virtio::testing::{DATA, Rig};
use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const CID: u64 = 3;
/// Where the tests put packets to send, and room for packets to receive.
pub const OUT: u64 = DATA;
pub const IN: u64 = DATA + 0x8_0000;
pub const ROOM: u32 = 4096;

/// A broker that answers when the test says so.
#[derive(Default)]
pub struct Office {
    pub asked: VecDeque<(u64, u32)>,
    answers: VecDeque<Answer>,
    pub gone: bool,
    next: u64,
}

pub struct Clerk {
    office: Arc<Mutex<Office>>,
    bell: EventFd,
}

impl AsRawFd for Clerk {
    fn as_raw_fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }
}

impl Connector for Clerk {
    fn connect(&mut self, port: u32) -> Result<u64, String> {
        let mut office = self.office.lock().unwrap();
        if office.asked.len() == 64 {
            return Err("busy".into());
        }
        office.next += 1;
        let id = office.next;
        office.asked.push_back((id, port));
        Ok(id)
    }

    fn receive(&mut self) -> Result<Option<Answer>, String> {
        let _ = self.bell.read();
        let mut office = self.office.lock().unwrap();
        match office.answers.pop_front() {
            None if office.gone => Err("gone".into()),
            answer => Ok(answer),
        }
    }
}

pub struct Guest {
    pub rig: Rig<Vsock>,
    pub office: Arc<Mutex<Office>>,
    pub bell: EventFd,
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
    /// Bytes that the guest consumed, for its credit.
    consumed: u32,
    /// A buffer waits for a packet.
    offered: bool,
}

impl Guest {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v.sock");
        let bell = EventFd::new(EFD_NONBLOCK).unwrap();
        let office = Arc::<Mutex<Office>>::default();
        let clerk = Clerk {
            office: Arc::clone(&office),
            bell: bell.try_clone().unwrap(),
        };
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let device = Vsock::with(CID, Arc::new(listener), Some(Box::new(clerk))).unwrap();
        Self {
            rig: Rig::with(device, 0, 16),
            office,
            bell,
            path,
            _directory: directory,
            consumed: 0,
            offered: false,
        }
    }

    /// Sends a packet with an honest header, which `change` may spoil.
    pub fn send_with(
        &mut self,
        ports: (u32, u32),
        op: u16,
        data: &[u8],
        change: impl Fn(&mut Header),
    ) {
        let mut header = Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: ports.0,
            dst_port: ports.1,
            len: data.len() as u32,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: 256 << 10,
            fwd_cnt: self.consumed,
        };
        change(&mut header);
        let driver = &mut self.rig.drivers[1];
        driver.put(OUT, &header.encode());
        driver.put(OUT + 0x1000, data);
        let mut buffers = vec![(OUT, HEADER_LEN as u32, false)];
        if !data.is_empty() {
            buffers.push((OUT + 0x1000, data.len() as u32, false));
        }
        driver.add(&buffers);
        self.rig.kick(TX);
        assert!(self.rig.drivers[1].used().is_some(), "TX never stalls");
    }

    pub fn send(&mut self, ports: (u32, u32), op: u16, data: &[u8]) {
        self.send_with(ports, op, data, |_| {});
    }

    /// Receives a packet, if there is one.
    pub fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        self.rig.poll();
        // One buffer at a time, for they all lie in the same place.
        if !self.offered {
            self.offered = true;
            self.rig.drivers[0].add(&[(IN, ROOM, true)]);
            self.rig.kick(0);
        }
        let (_, len) = self.rig.drivers[0].used()?;
        self.offered = false;
        let bytes = self.rig.drivers[0].get(IN, len as usize);
        let header = Header::decode(bytes[..HEADER_LEN].try_into().unwrap());
        assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
        assert_eq!(
            (header.dst_cid, header.buf_alloc > 0 || header.op == op::RST),
            (CID, true)
        );
        if header.op == op::RW {
            self.consumed += header.len;
        }
        Some((header, bytes[HEADER_LEN..].to_vec()))
    }

    pub fn receive(&mut self, op: u16) -> (Header, Vec<u8>) {
        let packet = self.try_receive().expect("a packet");
        assert_eq!(packet.0.op, op, "{packet:?}");
        packet
    }

    pub fn silent(&mut self) {
        assert_eq!(self.try_receive(), None);
    }

    pub fn dial(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// A connection from the host; returns its socket and the ports as (guest, host).
    pub fn called(&mut self, port: u32) -> (UnixStream, (u32, u32)) {
        self.consumed = 0;
        let mut host = self.dial();
        host.write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        let (header, _) = self.receive(op::REQUEST);
        assert_eq!((header.src_cid, header.dst_port), (2, port));
        let ports = (port, header.src_port);
        self.send(ports, op::RESPONSE, &[]);
        let line = format!("OK {}\n", header.src_port);
        let mut answer = vec![0; line.len()];
        host.read_exact(&mut answer).unwrap();
        assert_eq!(answer, line.as_bytes());
        (host, ports)
    }

    pub fn answer(&mut self, result: impl FnOnce(u32) -> Result<UnixStream, String>) {
        let mut office = self.office.lock().unwrap();
        let (id, port) = office.asked.pop_front().expect("a request to the broker");
        let result = result(port).map(Into::into);
        office.answers.push_back((id, result));
        drop(office);
        self.bell.write(1).unwrap();
        self.rig.poll();
    }

    /// A connection from the guest.
    pub fn calls(&mut self, ports: (u32, u32)) -> UnixStream {
        self.consumed = 0;
        self.send(ports, op::REQUEST, &[]);
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.answer(|port| {
            assert_eq!(port, ports.1);
            Ok(theirs)
        });
        let (header, _) = self.receive(op::RESPONSE);
        assert_eq!((header.src_port, header.dst_port), (ports.1, ports.0));
        ours.set_nonblocking(true).unwrap();
        ours
    }

    pub fn counts(&self) -> (usize, usize, usize) {
        self.rig.device.hub.counts()
    }
}

pub fn ended(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(false).unwrap();
    let timeout = Some(std::time::Duration::from_secs(5));
    stream.set_read_timeout(timeout).unwrap();
    matches!(stream.read(&mut [0; 1]), Ok(0)) || stream.take_error().unwrap().is_some()
}

/// A broker that answers at once, as long as it has sockets, and closes its ends of older connections.
/// It makes no system call that the sealed device thread may not make.
struct Prompt {
    bell: EventFd,
    sockets: Vec<(UnixStream, UnixStream)>,
    next: u64,
    answers: VecDeque<Answer>,
    ends: VecDeque<UnixStream>,
}

impl AsRawFd for Prompt {
    fn as_raw_fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }
}

impl Connector for Prompt {
    fn connect(&mut self, _: u32) -> Result<u64, String> {
        let (ours, theirs) = self.sockets.pop().ok_or("busy")?;
        self.ends.push_back(ours);
        if self.ends.len() > 8 {
            self.ends.pop_front();
        }
        self.next += 1;
        self.answers.push_back((self.next, Ok(theirs.into())));
        self.bell.write(1).unwrap();
        Ok(self.next)
    }

    fn receive(&mut self) -> Result<Option<Answer>, String> {
        let _ = self.bell.read();
        Ok(self.answers.pop_front())
    }
}

/// A device whose every call from the guest is answered.
pub fn reachable(listener: UnixListener) -> Vsock {
    let pair = || {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&[7; 3000]).unwrap();
        (ours, theirs)
    };
    let prompt = Prompt {
        sockets: std::iter::repeat_with(pair).take(300).collect(),
        bell: EventFd::new(EFD_NONBLOCK).unwrap(),
        next: 0,
        answers: VecDeque::new(),
        ends: VecDeque::new(),
    };
    listener.set_nonblocking(true).unwrap();
    Vsock::with(CID, Arc::new(listener), Some(Box::new(prompt))).unwrap()
}

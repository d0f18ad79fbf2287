//! What a back-end for tests hears and answers.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use casemate_broker::fdpass;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::kind::BLOCK_FEATURES;
use super::{COMMON_FEATURES, CONFIG, MQ, PROTOCOL_FEATURES, REPLY_ACK};

/// What it offers, and more than anybody knows.
pub const OFFERED: u64 = COMMON_FEATURES | PROTOCOL_FEATURES | BLOCK_FEATURES | 1 << 63;

/// A message: of either side, by its flags.
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    [
        &[request, flags, payload.len() as u32]
            .map(u32::to_le_bytes)
            .concat()[..],
        payload,
    ]
    .concat()
}

/// A back-end's reply.
pub fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    message(request, 1 | 4, payload)
}

/// What a front-end says.
pub struct Heard {
    pub request: u32,
    flags: u32,
    pub payload: Vec<u8>,
    /// What came with it; the last one, of several.
    pub descriptor: Option<File>,
}

impl Heard {
    /// Waits for it; none comes once the front-end is gone.
    pub fn on(mut socket: &UnixStream) -> Option<Self> {
        let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::NONE).ok()?;
        let mut header = [0; 12];
        let received = fdpass::receive(socket.as_fd(), &mut header).ok()?;
        socket.read_exact(&mut header[received.length..]).ok()?;
        let [request, flags, len] =
            [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
        let mut payload = vec![0; len as usize];
        socket.read_exact(&mut payload).ok()?;
        Some(Self {
            request,
            flags,
            payload,
            descriptor: received.descriptor.map(File::from),
        })
    }

    /// What a good back-end of four queues says to it, as far as it wants an answer.
    pub fn answer(&self) -> Option<Vec<u8>> {
        let number = |number: u64| Some(number.to_le_bytes().to_vec());
        match self.request {
            1 => number(OFFERED),
            11 => Some([&self.payload[..4], &7_u32.to_le_bytes()].concat()),
            15 => number(MQ | REPLY_ACK | CONFIG | 1 << 62),
            17 => number(4),
            24 => {
                let mut config = self.payload.clone();
                config[12..20].copy_from_slice(&1000_u64.to_le_bytes());
                Some(config)
            }
            _ if self.flags & 8 != 0 => number(0),
            _ => None,
        }
    }
}

//! Back-ends of vhost-user devices: programs that serve the guest's queues themselves.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::thread::spawn;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::{Bytes as _, GuestAddress};

use super::Random;
use crate::memory::GuestMemory;
use crate::virtio::chain::Chain;
use crate::virtio::device::EVENT_IDX;
use crate::virtio::queue::{Queue, QueueState, Signal, Verdict};
use crate::virtio::vhost_user::testing::{Heard, reply};
use crate::virtio::vhost_user::{Kind, VhostUser, VhostUserOptions};

/// What a back-end puts in every buffer.
pub const SERVED: &[u8] = b"far";
const QUEUES: usize = 2;
/// How long a back-end without faith may keep the device thread waiting.
const PATIENCE: Duration = Duration::from_millis(20);

/// What a back-end can be.
pub fn kinds() -> [Kind; 3] {
    let queues = QUEUES as u16;
    let net = Kind::Net {
        mac: Some([2, 0, 0, 0, 0, 7]),
        mtu: None,
    };
    [Kind::Block { queues }, Kind::Fs { tag: "far".into() }, net]
}

/// How many replies a device of this kind takes to come about: features of the device and of the protocol, and
/// those of a disk its queues and its configuration.
fn greetings(kind: &Kind) -> u32 {
    match kind {
        Kind::Block { .. } => 4,
        Kind::Fs { .. } | Kind::Net { .. } => 2,
    }
}

/// A device whose back-end runs on a thread of its own, until the device is gone. One without faith stays silent, lies
/// or hangs up sooner or later, and signals when it likes. Then the device is lost: no reset brings it back.
pub fn device(kind: &Kind, memory: &GuestMemory, faithless: Option<Random>) -> VhostUser {
    loop {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let options = VhostUserOptions {
            id: "far".into(),
            socket,
            kind: kind.clone(),
        };
        let patience = match &faithless {
            None => super::PATIENCE,
            Some(_) => PATIENCE,
        };
        let back_end = BackEnd {
            socket: theirs,
            memory: memory.clone(),
            event_idx: false,
            rings: std::array::from_fn(|_| Ring::default()),
            greetings: greetings(kind),
            faithless: faithless.clone(),
        };
        spawn(|| back_end.run());
        match VhostUser::with_patience(options, patience) {
            Ok(device) => return device,
            // So little patience may be too little for a busy host.
            Err(error) => assert!(faithless.is_some(), "{error}"),
        }
    }
}

/// One queue, as far as the front-end has told of it.
#[derive(Default)]
struct Ring {
    state: Option<QueueState>,
    kick: Option<File>,
    call: Option<File>,
    running: Option<Queue>,
}

struct BackEnd {
    socket: UnixStream,
    memory: GuestMemory,
    event_idx: bool,
    rings: [Ring; QUEUES],
    /// As many replies are well meant: without them there is no device at all.
    greetings: u32,
    faithless: Option<Random>,
}

impl BackEnd {
    fn run(mut self) -> Option<()> {
        loop {
            let (word, kicked) = self.wait();
            if word {
                let heard = Heard::on(&self.socket)?;
                self.reply(heard)?;
            }
            for (index, _) in (0..).zip(kicked).filter(|(_, kicked)| *kicked) {
                self.serve(index);
            }
            self.misbehave();
        }
    }

    /// Waits until there is a word of the front-end's, or a doorbell.
    fn wait(&self) -> (bool, [bool; QUEUES]) {
        let timeout = match self.faithless {
            None => PollTimeout::NONE,
            Some(_) => PollTimeout::from(1_u8),
        };
        // Instead of a doorbell that there is not: the socket.
        let doorbell = |index: usize| {
            let ring = &self.rings[index];
            let kick = ring.kick.as_ref().filter(|_| ring.running.is_some());
            kick.map_or(self.socket.as_fd(), |kick| kick.as_fd())
        };
        let fds = [self.socket.as_fd(), doorbell(0), doorbell(1)];
        let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut fds, timeout).unwrap();
        let [word, first, second] = fds.map(|fd| fd.any().unwrap());
        (word, [first, second])
    }

    /// Does what the front-end asks for.
    fn reply(&mut self, heard: Heard) -> Option<()> {
        let mut answer = heard.answer();
        let words: Vec<u64> = heard.payload.chunks(8).map(word).collect();
        let first = words.first().copied().unwrap_or_default();
        let value = (first >> 32) as u16;
        let ring = self.rings.get_mut(first as u8 as usize);
        match (heard.request, ring) {
            (2, _) => self.event_idx = first & EVENT_IDX != 0,
            (8, Some(ring)) => ring.state.get_or_insert(EMPTY).size = value,
            (9, Some(ring)) => {
                let state = ring.state.get_or_insert(EMPTY);
                [state.descriptors, state.used, state.available] = words[1..4].try_into().unwrap();
            }
            (10, Some(ring)) => ring.state.get_or_insert(EMPTY).next_available = value,
            (11, Some(ring)) => {
                let queue = ring.running.take();
                let next = queue.map_or(0, |queue| queue.state().next_available);
                answer = Some([&heard.payload[..4], &u32::from(next).to_le_bytes()].concat());
            }
            (12, Some(ring)) => ring.kick = heard.descriptor,
            (13, Some(ring)) => ring.call = heard.descriptor,
            (18, Some(ring)) => {
                let mut state = ring.state?;
                let used = self.memory.read_obj(GuestAddress(state.used + 2));
                ring.running = used.ok().and_then(|used| {
                    state.next_used = used;
                    Queue::new(0, &state, 256, self.event_idx, &self.memory).ok()
                });
            }
            _ => {}
        }
        let Some(answer) = answer else {
            return Some(());
        };
        let mut reply = reply(heard.request, &answer);
        if self.greetings > 0 {
            self.greetings -= 1;
        } else if let Some(random) = &mut self.faithless {
            match random.below(1000) {
                0 => return None,
                1 => return Some(()),
                2 => reply.truncate(random.below(20) as usize),
                3 => reply[random.below(12) as usize] ^= 1 << random.below(8),
                4 if reply.len() > 12 => reply[12] ^= 1 << random.below(8),
                5 => reply.extend([0; 12]),
                _ => {}
            }
        }
        self.socket.write_all(&reply).ok()
    }

    /// Serves a queue as long as its driver keeps to the rules.
    fn serve(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        let (Some(kick), Some(call)) = (&mut ring.kick, &ring.call) else {
            return;
        };
        let _ = kick.read(&mut [0; 8]);
        let Some(queue) = &mut ring.running else {
            return;
        };
        let memory = &self.memory;
        let serve = |chain: &Chain| {
            let len = SERVED.len().min(chain.writable_len() as usize);
            chain.write_at(memory, 0, &SERVED[..len])?;
            Ok(Verdict::Used(len as u32))
        };
        if queue.process(memory, &Call(call), 256, serve).is_err() {
            ring.running = None;
        }
    }

    /// What only one without faith does, once there is a device.
    fn misbehave(&mut self) {
        let Some(random) = self.faithless.as_mut().filter(|_| self.greetings == 0) else {
            return;
        };
        let ring = &mut self.rings[random.below(2) as usize];
        let signals = random.one(&[1, u64::MAX - 1]).to_ne_bytes();
        let _ = match (random.below(64), &mut ring.kick, &mut ring.call) {
            (0..8, _, Some(call)) => call.write(&signals),
            (8..12, Some(kick), _) => kick.write(&signals),
            (12..16, Some(kick), _) => kick.read(&mut [0; 8]),
            (16, ..) if random.below(16) == 0 => self.socket.write(&[0; 12]),
            _ => Ok(0),
        };
    }
}

struct Call<'a>(&'a File);

impl Signal for Call<'_> {
    fn used(&self, _: u16) {
        // A full counter is a signal, too.
        let _ = (&mut &*self.0).write(&1_u64.to_ne_bytes());
    }
    fn config_changed(&self) {}
}

const EMPTY: QueueState = QueueState {
    size: 0,
    descriptors: 0,
    available: 0,
    used: 0,
    next_available: 0,
    next_used: 0,
};

/// A word, or half of one.
fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

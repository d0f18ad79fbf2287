//! A vhost-user back-end for a network card, by rust-vmm's framework: no small one is in Debian.
//!
//! It keeps what the guest sends, and answers each frame as it was told to.

use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Error, Listener};
use vhost_user_backend::{
    ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT,
};
use virtio_queue::QueueT as _;
use vm_memory::{GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::process::PATIENCE;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
/// What a frame of the guest's is answered with.
type Answer = Box<dyn FnMut(&[u8]) -> Option<Vec<u8>> + Send + Sync>;

/// Indirect descriptors, event indices, protocol features, version 1, and checksums.
const FEATURES: u64 = 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32 | 1;
/// struct virtio_net_hdr_v1
const HEADER: usize = 12;
const RECEIVE: usize = 0;
const SEND: usize = 1;

struct Card {
    memory: Memory,
    event_idx: bool,
    answer: Answer,
    sent: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// A back-end that serves one connection.
pub struct NetBackEnd {
    sent: Arc<Mutex<Vec<Vec<u8>>>>,
    thread: JoinHandle<Result<()>>,
    /// Ends the conversation, once there is one.
    end: Arc<OnceLock<ShutdownHandle>>,
}

impl NetBackEnd {
    /// Listens on `socket`. Each frame that the guest sends is answered by what `answer` makes of it.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn start(
        socket: &Path,
        answer: impl FnMut(&[u8]) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> Result<Self> {
        let sent = Arc::<Mutex<Vec<_>>>::default();
        let memory = Memory::new(GuestMemoryMmap::new());
        let card = Card {
            memory: memory.clone(),
            event_idx: false,
            answer: Box::new(answer),
            sent: Arc::clone(&sent),
        };
        let card = Arc::new(RwLock::new(card));
        let daemon = VhostUserDaemon::new("net".into(), card, memory);
        let mut daemon = daemon.map_err(|error| anyhow!("{error}"))?;
        let mut listener = Listener::new(socket, true)?;
        let end = Arc::<OnceLock<_>>::default();
        let handle = Arc::clone(&end);
        let thread = std::thread::spawn(move || {
            daemon
                .start(&mut listener)
                .map_err(|error| anyhow!("{error}"))?;
            if let Some(shutdown) = daemon.shutdown_handle() {
                let _ = handle.set(shutdown);
            }
            match daemon.wait() {
                // The machine has ended.
                Ok(()) | Err(vhost_user_backend::Error::HandleRequest(Error::Disconnected)) => {
                    Ok(())
                }
                Err(error) => Err(anyhow!("{error}")),
            }
        });
        Ok(Self { sent, thread, end })
    }

    /// Hangs up on the machine.
    ///
    /// # Errors
    /// If nobody has called.
    pub fn hang_up(&self) -> Result<()> {
        let end = self.end.get();
        end.context("no conversation to end")?.shutdown();
        Ok(())
    }

    /// What the guest has sent, once its machine has ended.
    ///
    /// # Errors
    /// If the conversation did not end as it should.
    pub fn wait(self) -> Result<Vec<Vec<u8>>> {
        let began = Instant::now();
        while !self.thread.is_finished() {
            ensure!(began.elapsed() < PATIENCE, "the conversation does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
        let ended = self.thread.join();
        ended.map_err(|_| anyhow!("the back-end panicked"))??;
        let sent = self
            .sent
            .lock()
            .map_err(|_| anyhow!("the back-end panicked"))?;
        Ok(sent.clone())
    }
}

impl Card {
    /// Takes a chain of `queue`, if there is one, and lets `with` read or fill it: how many bytes it wrote.
    fn serve(
        &self,
        queue: &VringRwLock,
        with: impl FnOnce(
            virtio_queue::DescriptorChain<vm_memory::GuestMemoryLoadGuard<GuestMemoryMmap>>,
        ) -> io::Result<u32>,
    ) -> io::Result<bool> {
        let mut queue = queue.get_mut();
        let memory = self.memory.memory();
        let Some(chain) = queue.get_queue_mut().pop_descriptor_chain(memory) else {
            return Ok(false);
        };
        let head = chain.head_index();
        let written = with(chain)?;
        queue.add_used(head, written).map_err(io::Error::other)?;
        queue.signal_used_queue()?;
        Ok(true)
    }
}

impl Card {
    /// Takes a frame of the guest's, if there is one, and answers it.
    fn answer_one(&mut self, receive: &VringRwLock, send: &VringRwLock) -> io::Result<bool> {
        let memory = self.memory.memory();
        let mut frame = Vec::new();
        let taken = self.serve(send, |chain| {
            let mut reader = chain.reader(&memory).map_err(io::Error::other)?;
            reader.read_to_end(&mut frame)?;
            Ok(0)
        })?;
        if !taken {
            return Ok(false);
        }
        let frame = frame.split_off(HEADER.min(frame.len()));
        if let Some(answer) = (self.answer)(&frame) {
            let packet = [&[0; HEADER][..], &answer].concat();
            self.serve(receive, |chain| {
                let mut writer = chain.writer(&memory).map_err(io::Error::other)?;
                writer.write_all(&packet)?;
                Ok(packet.len() as u32)
            })?;
        }
        if let Ok(mut sent) = self.sent.lock() {
            sent.push(frame);
        }
        Ok(true)
    }
}

impl VhostUserBackendMut for Card {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    /// By which the framework ends its thread.
    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &mut self,
        event: u16,
        _: EventSet,
        queues: &[VringRwLock],
        _: usize,
    ) -> io::Result<()> {
        let (Some(receive), Some(send)) = (queues.get(RECEIVE), queues.get(SEND)) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if usize::from(event) != SEND {
            return Ok(());
        }
        loop {
            while self.answer_one(receive, send)? {}
            // Tell of every frame to come, too; one that came meanwhile is not told of.
            let more = self.event_idx && {
                let mut send = send.get_mut();
                send.enable_notification().map_err(io::Error::other)?
            };
            if !more {
                return Ok(());
            }
        }
    }
}

/// How a neighbour of the guest's answers: the IPv4 host `address` with the Ethernet address `mac` says where it is
/// (ARP) and that it is there (ICMP echo), whatever fragments it is asked in.
pub fn neighbour(mac: [u8; 6], address: [u8; 4]) -> impl FnMut(&[u8]) -> Option<Vec<u8>> {
    const ARP_REQUEST: [u8; 10] = [8, 6, 0, 1, 8, 0, 6, 4, 0, 1];
    const ECHO_REQUEST: u8 = 8;
    move |frame| {
        let mut answer = frame.to_vec();
        let from: [u8; 6] = frame.get(6..12)?.try_into().ok()?;
        answer.get_mut(..6)?.copy_from_slice(&from);
        answer.get_mut(6..12)?.copy_from_slice(&mac);
        if frame.get(12..22)? == ARP_REQUEST && frame.get(38..42)? == address {
            // The question's sender becomes the answer's target.
            answer[21] = 2;
            answer[22..28].copy_from_slice(&mac);
            answer[28..32].copy_from_slice(&address);
            answer[32..42].copy_from_slice(&frame[22..32]);
            return Some(answer);
        }
        let is_icmp = frame.get(12..15)? == [8, 0, 0x45] && frame.get(23)? == &1;
        if !is_icmp || frame.get(30..34)? != address {
            return None;
        }
        // Addresses that change places leave the header's checksum as it is.
        answer[26..30].copy_from_slice(&address);
        answer[30..34].copy_from_slice(&frame[26..30]);
        let offset = u16::from_be_bytes([frame[20], frame[21]]) & 0x1fff;
        if offset == 0 {
            let message = answer.get_mut(34..)?;
            let [ECHO_REQUEST, 0, high, low, ..] = &*message else {
                return None;
            };
            // RFC 1624: the checksum grows by what the type's word lost, in ones' complement.
            let sum = u32::from(u16::from_be_bytes([*high, *low])) + (u32::from(ECHO_REQUEST) << 8);
            let sum = (sum & 0xffff) as u16 + (sum >> 16) as u16;
            message[0] = 0;
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        Some(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::neighbour;

    #[test]
    fn a_neighbour_answers_what_it_is_asked_and_no_other() {
        let (guest, host) = ([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1]);
        let mut answer = neighbour(host, [10, 0, 0, 1]);
        let arp = |operation: u8, mac: [u8; 6], from: u8, target: [u8; 6], to: u8| {
            let head = [8, 6, 0, 1, 8, 0, 6, 4, 0, operation];
            let ends = [&mac[..], &[10, 0, 0, from], &target, &[10, 0, 0, to]].concat();
            [&head[..], &ends].concat()
        };
        let question = arp(1, guest, 2, [0; 6], 1);
        let question = [&[0xff; 6][..], &guest, &question].concat();
        let expected = [&guest[..], &host, &arp(2, host, 1, guest, 2)].concat();
        assert_eq!(answer(&question), Some(expected));
        let other = [&[0xff; 6][..], &guest, &arp(1, guest, 2, [0; 6], 3)].concat();
        assert_eq!(answer(&other), None);

        // An echo request without data: identifier 0xf7fe, so its sum is all ones and its checksum none.
        let header = [
            0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1,
        ];
        let ping = [8, 0, 0, 0, 0xf7, 0xfe, 0, 1];
        let ping = [&host[..], &guest, &[8, 0], &header, &ping].concat();
        let pong = answer(&ping).unwrap();
        assert_eq!(pong[26..34], [10, 0, 0, 1, 10, 0, 0, 2]);
        let words = pong[34..].chunks(2);
        let sum: u32 = words.map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
        assert_eq!((pong[34], (sum & 0xffff) + (sum >> 16)), (0, 0xffff));
        for length in 0..ping.len() {
            let _ = answer(&ping[..length]);
        }
    }
}

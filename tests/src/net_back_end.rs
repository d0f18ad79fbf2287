//! A vhost-user back-end for a network card, by rust-vmm's framework: no small one is in Debian.
//!
//! It keeps what the guest sends, and answers each frame with the next one that it was given.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Error, Listener};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT as _;
use vm_memory::{GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::process::PATIENCE;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Indirect descriptors, event indices, protocol features, version 1, and checksums.
const FEATURES: u64 = 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32 | 1;
/// struct virtio_net_hdr_v1
const HEADER: usize = 12;
const RECEIVE: usize = 0;
const SEND: usize = 1;

struct Card {
    memory: Memory,
    event_idx: bool,
    answers: VecDeque<Vec<u8>>,
    sent: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// A back-end that serves one connection.
pub struct NetBackEnd {
    sent: Arc<Mutex<Vec<Vec<u8>>>>,
    thread: JoinHandle<Result<()>>,
}

impl NetBackEnd {
    /// Listens on `socket`. The first frame that the guest sends is answered by the first of `answers`, and so on.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn start(socket: &Path, answers: Vec<Vec<u8>>) -> Result<Self> {
        let sent = Arc::<Mutex<Vec<_>>>::default();
        let memory = Memory::new(GuestMemoryMmap::new());
        let card = Card {
            memory: memory.clone(),
            event_idx: false,
            answers: answers.into(),
            sent: Arc::clone(&sent),
        };
        let card = Arc::new(RwLock::new(card));
        let daemon = VhostUserDaemon::new("net".into(), card, memory);
        let mut daemon = daemon.map_err(|error| anyhow!("{error}"))?;
        let mut listener = Listener::new(socket, true)?;
        let thread = std::thread::spawn(move || {
            daemon
                .start(&mut listener)
                .map_err(|error| anyhow!("{error}"))?;
            match daemon.wait() {
                // The machine has ended.
                Ok(()) | Err(vhost_user_backend::Error::HandleRequest(Error::Disconnected)) => {
                    Ok(())
                }
                Err(error) => Err(anyhow!("{error}")),
            }
        });
        Ok(Self { sent, thread })
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
        let memory = self.memory.memory();
        let mut frame = Vec::new();
        while self.serve(send, |chain| {
            frame.clear();
            let mut reader = chain.reader(&memory).map_err(io::Error::other)?;
            reader.read_to_end(&mut frame)?;
            Ok(0)
        })? {
            if let Ok(mut sent) = self.sent.lock() {
                sent.push(frame.split_off(HEADER.min(frame.len())));
            }
            let Some(answer) = self.answers.pop_front() else {
                continue;
            };
            let packet = [&[0; HEADER][..], &answer].concat();
            self.serve(receive, |chain| {
                let mut writer = chain.writer(&memory).map_err(io::Error::other)?;
                writer.write_all(&packet)?;
                Ok(packet.len() as u32)
            })?;
        }
        // Tell of every frame to come, too.
        if self.event_idx {
            send.get_mut()
                .enable_notification()
                .map_err(io::Error::other)?;
        }
        Ok(())
    }
}

//! The network card (virtio 1.2, section 5.1): frames between the guest and a tap.
//!
//! The two directions know nothing of each other: a full receive ring leaves the tap's frames
//! where they are and never stops transmission (CVE-2020-16843 elsewhere), and a tap that takes
//! nothing costs the guest frames, not its receive queue.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::sync::Arc;

use log::debug;
use thiserror::Error;
use vm_memory::Permissions;

use self::receive::{Delivery, FrameBuffer};
use self::tap::Offloads;
use super::chain::Chain;
use super::config_space::ConfigSpace;
use super::device::{self, DeviceIo, DeviceType, Event, Queues, Traits, VirtioDevice, states};
use super::queue::{Progress, QueueStates, Verdict};
use super::rate_limiter::{LimiterOptions, RateLimiter};
use crate::event_loop::EventSet;
use crate::memory::GuestMemory;
use crate::memory::iovec::IoVecBuffer;

mod receive;
mod tap;

const QUEUE_SIZES: &[u16] = &[256, 256];
const RX: u16 = 0;
const TX: u16 = 1;
/// The key of the tap in the event loop.
const TAP: u32 = 0;
/// Frames moved in one direction before the other devices get their turn.
const BUDGET: usize = 64;
/// Most frames thrown away at a start: more than a tap queues.
const MAX_STALE: usize = 2048;

/// struct virtio_net_hdr_v1 (section 5.1.6), which the tap speaks too.
const HEADER_LEN: usize = 12;
/// Largest frame: a 64 KiB IP packet, and an Ethernet header with a VLAN tag and to spare.
const MAX_FRAME: usize = 65562;
const MAX_PACKET: usize = HEADER_LEN + MAX_FRAME;
/// Smallest Ethernet header: less is no frame.
const MIN_PACKET: usize = HEADER_LEN + 14;

/// Feature bits (section 5.1.3).
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_UFO: u64 = 1 << 10;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_UFO: u64 = 1 << 14;
const F_MRG_RXBUF: u64 = 1 << 15;

/// A network card.
#[derive(Debug)]
pub struct NetOptions {
    /// A tap opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: File,
    /// The guest's address; without one the guest makes one up.
    pub mac: Option<[u8; 6]>,
    /// Largest packet in bytes, without the Ethernet header, that the guest should send.
    pub mtu: Option<u16>,
    /// What the guest may receive.
    pub rx_limits: LimiterOptions,
    /// What the guest may send.
    pub tx_limits: LimiterOptions,
}

/// Why a network card could not be made.
#[derive(Debug, Error)]
pub enum Error {
    /// The tap is none, or not opened as it must be.
    #[error("cannot use the tap: {0}")]
    Tap(#[source] io::Error),
}

/// The network card.
pub struct Net {
    tap: File,
    mac: Option<[u8; 6]>,
    mtu: Option<u16>,
    /// Whether the host's kernel takes large UDP packets.
    ufo: bool,
    rx_limiter: RateLimiter,
    tx_limiter: RateLimiter,
    running: Option<Running>,
    pieces: IoVecBuffer,
}

struct Running {
    queues: Queues,
    io: DeviceIo,
    /// Frames may be spread over several chains.
    merge: bool,
    frame: FrameBuffer,
}

impl Net {
    /// A card on `tap`, which it makes non-blocking.
    ///
    /// # Errors
    /// When the tap is none or lacks a flag.
    pub fn new(options: NetOptions) -> Result<Self, Error> {
        let NetOptions {
            tap,
            mac,
            mtu,
            rx_limits,
            tx_limits,
        } = options;
        tap::prepare(&tap, HEADER_LEN as i32).map_err(Error::Tap)?;
        let all = Offloads::CSUM.and(Offloads::TSO4).and(Offloads::TSO6);
        let ufo = tap::set_offloads(&tap, all.and(Offloads::UFO)).is_ok();
        // Nothing unfinished until a driver agreed to it.
        tap::set_offloads(&tap, Offloads::default()).map_err(Error::Tap)?;
        Ok(Self {
            tap,
            mac,
            mtu,
            ufo,
            rx_limiter: RateLimiter::new(rx_limits),
            tx_limiter: RateLimiter::new(tx_limits),
            running: None,
            pieces: IoVecBuffer::default(),
        })
    }

    /// Starts, on a tap that is set up.
    fn run(&mut self, queues: Queues, features: u64, io: DeviceIo) -> Result<(), device::Error> {
        self.drain();
        // Edge-triggered: a frame that waits for room in the guest must not wake us for ever.
        io.events
            .watch(&self.tap, TAP, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
        self.running = Some(Running {
            queues,
            io,
            merge: features & F_MRG_RXBUF != 0,
            frame: FrameBuffer::new(),
        });
        Ok(())
    }

    /// Throws away what the tap has queued: it may be unfinished in a way that an earlier driver
    /// agreed to and this one did not.
    fn drain(&self) {
        // A tap drops what does not fit.
        let mut start = [0; 64];
        for _ in 0..MAX_STALE {
            match (&self.tap).read(&mut start) {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => break,
            }
        }
    }
}

/// What the tap may hand over unfinished, given what the driver accepted.
fn offloads(features: u64) -> Offloads {
    if features & F_GUEST_CSUM == 0 {
        return Offloads::default();
    }
    [
        (F_GUEST_TSO4, Offloads::TSO4),
        (F_GUEST_TSO6, Offloads::TSO6),
        (F_GUEST_UFO, Offloads::UFO),
    ]
    .into_iter()
    .filter(|(bit, _)| features & bit != 0)
    .fold(Offloads::CSUM, |all, (_, offload)| all.and(offload))
}

impl VirtioDevice for Net {
    fn traits(&self) -> Traits {
        let mut features = F_CSUM
            | F_GUEST_CSUM
            | F_GUEST_TSO4
            | F_GUEST_TSO6
            | F_HOST_TSO4
            | F_HOST_TSO6
            | F_MRG_RXBUF;
        if self.ufo {
            features |= F_GUEST_UFO | F_HOST_UFO;
        }
        if self.mac.is_some() {
            features |= F_MAC;
        }
        if self.mtu.is_some() {
            features |= F_MTU;
        }
        Traits {
            device_type: DeviceType::Net,
            features,
            queue_sizes: QUEUE_SIZES,
        }
    }

    /// struct virtio_net_config up to mtu (section 5.1.4); status and max_virtqueue_pairs belong to
    /// features that are not offered.
    fn config(&self) -> Arc<ConfigSpace> {
        let config = [
            &self.mac.unwrap_or_default()[..],
            &[0; 4],
            &self.mtu.unwrap_or_default().to_le_bytes(),
        ];
        ConfigSpace::new(config.concat())
    }

    fn start(&mut self, queues: Queues, features: u64, io: DeviceIo) -> Result<(), device::Error> {
        tap::set_offloads(&self.tap, offloads(features)).map_err(|source| device::Error::Host {
            what: "cannot set the tap's offloads",
            source,
        })?;
        self.run(queues, features, io)
    }

    /// A frame that was read from the tap and not yet delivered is lost, as frames may be.
    fn stop(&mut self) -> QueueStates {
        let Some(running) = self.running.take() else {
            return QueueStates::default();
        };
        running.io.events.unwatch(&self.tap);
        // The host finishes the frames of the time without a driver.
        if let Err(error) = tap::set_offloads(&self.tap, Offloads::default()) {
            debug!("net: the tap keeps its offloads: {error}");
        }
        states(&running.queues)
    }

    fn handle(&mut self, event: Event) -> Result<Progress, device::Error> {
        let Some(running) = &mut self.running else {
            return Ok(Progress::Done);
        };
        match event {
            Event::Queue(TX) => running.transmit(&self.tap, &mut self.pieces, &mut self.tx_limiter),
            Event::Queue(RX) | Event::Ready { .. } => {
                running.receive(&self.tap, &mut self.rx_limiter)
            }
            Event::Queue(_) => Ok(Progress::Done),
        }
    }
}

impl Running {
    fn transmit(
        &mut self,
        tap: &File,
        pieces: &mut IoVecBuffer,
        limiter: &mut RateLimiter,
    ) -> Result<Progress, device::Error> {
        let [_, Some(queue), ..] = &mut self.queues else {
            return Ok(Progress::Done);
        };
        let memory = &self.io.memory;
        let progress = queue.process(memory, self.io.signal.as_ref(), BUDGET, |chain| {
            if let Some(at) = limiter.wait() {
                return Ok(Verdict::Later(at));
            }
            send(tap, pieces, memory, chain);
            limiter.spend(chain.readable_len().saturating_sub(HEADER_LEN as u64));
            Ok(Verdict::Used(0))
        })?;
        Ok(progress)
    }

    /// Moves frames from the tap to the guest until either has no more.
    ///
    /// A frame that a rate limit holds back stays here, and those behind it in the tap.
    fn receive(
        &mut self,
        tap: &File,
        limiter: &mut RateLimiter,
    ) -> Result<Progress, device::Error> {
        let [Some(queue), ..] = &mut self.queues else {
            return Ok(Progress::Done);
        };
        let memory = &self.io.memory;
        let mut progress = Progress::More;
        for _ in 0..BUDGET {
            if !self.frame.is_full() && !self.frame.fill(|buffer| (&*tap).read(buffer)) {
                progress = Progress::Done;
                break;
            }
            if let Some(at) = limiter.wait() {
                progress = Progress::Later(at);
                break;
            }
            let len = self.frame.len().saturating_sub(HEADER_LEN);
            match self.frame.deliver(queue, memory, self.merge)? {
                Delivery::Gone => limiter.spend(len as u64),
                // The driver will ring when it has room.
                Delivery::NoRoom => {
                    progress = Progress::Done;
                    break;
                }
            }
        }
        queue.signal(memory, self.io.signal.as_ref())?;
        Ok(progress)
    }
}

/// Sends a frame. One that the host does not take is lost, as frames may be: the driver's queue
/// goes on.
fn send(tap: &File, pieces: &mut IoVecBuffer, memory: &GuestMemory, chain: &Chain) {
    let len = chain.readable_len();
    if len < MIN_PACKET as u64 || len > MAX_PACKET as u64 {
        debug!("net: the guest sends {len} bytes, which is no frame");
        return;
    }
    let sent = pieces
        .fill(memory, chain.readable(), 0, len, Permissions::Read)
        .map_err(io::Error::other)
        .and_then(|frame| frame.write(tap.as_fd()));
    if let Err(error) = sent {
        debug!("net: a frame from the guest is lost: {error}");
    }
}

#[cfg(test)]
#[path = "net_tests.rs"]
pub(super) mod tests;

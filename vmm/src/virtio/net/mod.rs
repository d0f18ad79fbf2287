//! The network card (virtio 1.2, section 5.1): frames between the guest and a tap, by up to
//! [`MAX_PAIRS`] pairs of queues, each on a queue of the tap's.
//!
//! The two directions know nothing of each other: a full receive ring leaves the tap's frames
//! where they are and never stops transmission (CVE-2020-16843 elsewhere), and a tap that takes
//! nothing costs the guest frames, not its receive queue.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Instant;

use log::debug;
use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;
use vm_memory::Permissions;

use self::detour::Detour;
use self::features::{ALWAYS, F_CTRL_VQ, F_MQ, F_MRG_RXBUF, SOMETIMES, offloads};
pub(super) use self::features::{F_MAC, F_MTU, OFFLOADS};
use self::receive::{Delivery, Read, Receiver};
use self::tap::Offloads;
use super::chain::Chain;
use super::config_space::ConfigSpace;
use super::device::{
    self, DeviceIo, DeviceType, Event, Queues, RestoreError, Traits, VirtioDevice, states,
};
use super::queue::{MAX_QUEUES, Progress, QueueStates, Verdict};
use super::rate_limiter::{LimiterOptions, RateLimiter};
use super::update::{Answer, Update, UpdateError};
use crate::event_loop::{EventSet, Registrar};
use crate::memory::GuestMemory;
use crate::memory::iovec::IoVecBuffer;
use crate::metrics::Source;
use crate::metrics::fields::NetMetrics;
use crate::mmds::Stack;

mod control;
mod detour;
mod features;
mod receive;
mod tap;

/// Most pairs of queues of a card.
pub const MAX_PAIRS: usize = 8;
/// Receive and send queues by turns, and the control queue.
const QUEUE_SIZES: &[u16] = &[256; MAX_QUEUES];
/// Frames moved in one direction before the other devices get their turn.
const BUDGET: usize = 64;
/// Commands served before the other devices get their turn.
const COMMANDS: usize = 8;
/// Most frames thrown away at a start: more than a tap queues.
const MAX_STALE: usize = 2048;

/// struct virtio_net_hdr_v1 (section 5.1.6), which the tap speaks too.
const HEADER_LEN: usize = 12;
/// Largest frame: a 64 KiB IP packet, and an Ethernet header with a VLAN tag and to spare.
const MAX_FRAME: usize = 65562;
const MAX_PACKET: usize = HEADER_LEN + MAX_FRAME;
/// Smallest Ethernet header: less is no frame.
const MIN_PACKET: usize = HEADER_LEN + 14;

/// A network card.
pub struct NetOptions {
    /// Its name, for the metrics.
    pub id: String,
    /// The queues of a tap opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and with
    /// `IFF_MULTI_QUEUE` if there are more than one: 1 to [`MAX_PAIRS`].
    pub taps: Vec<Arc<File>>,
    /// The guest's address; without one the guest makes one up.
    pub mac: Option<[u8; 6]>,
    /// Largest packet in bytes, without the Ethernet header, that the guest should send.
    pub mtu: Option<u16>,
    /// What the guest may receive.
    pub rx_limits: LimiterOptions,
    /// What the guest may send.
    pub tx_limits: LimiterOptions,
    /// The metadata service, if this card leads to it.
    pub mmds: Option<Stack>,
}

/// Why a network card could not be made.
#[derive(Debug, Error)]
pub enum Error {
    /// The tap is none, or not opened as it must be.
    #[error("cannot use the tap: {0}")]
    Tap(#[source] io::Error),
    /// There are too many queues, or none.
    #[error("a network card has 1 to {MAX_PAIRS} queues of a tap, not {0}")]
    Queues(usize),
}

/// The network card.
pub struct Net {
    id: String,
    metrics: Arc<NetMetrics>,
    taps: Vec<Arc<File>>,
    mac: Option<[u8; 6]>,
    mtu: Option<u16>,
    /// What the host's kernel can do beyond [`ALWAYS`].
    extra_features: u64,
    rx_limiter: RateLimiter,
    tx_limiter: RateLimiter,
    detour: Option<Detour>,
    running: Option<Running>,
    /// Pairs of queues that are in use at once when it starts.
    pairs_at_start: usize,
    pieces: IoVecBuffer,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    pairs: usize,
}

struct Running {
    queues: Queues,
    io: DeviceIo,
    /// One for each pair of queues.
    receivers: Vec<Receiver>,
    /// Index of the control queue, if the driver uses it.
    control: Option<usize>,
    /// Pairs in use: so many of the taps are watched.
    pairs: usize,
    metrics: Arc<NetMetrics>,
}

/// Makes a queue of a tap non-blocking and has it put the header before each frame that virtio-net puts there.
/// Returns the tap's flags (`IFF_…`).
///
/// # Errors
/// When it is no tap, or lacks a flag: see [`NetOptions::taps`].
pub fn prepare(tap: &File, one_of_several: bool) -> io::Result<libc::c_int> {
    tap::prepare(tap, HEADER_LEN as i32, one_of_several)
}

impl Net {
    /// A card on a tap, which it prepares.
    ///
    /// # Errors
    /// When the tap is none or lacks a flag.
    pub fn new(options: NetOptions) -> Result<Self, Error> {
        let several = options.taps.len() > 1;
        for tap in &options.taps {
            prepare(tap, several).map_err(Error::Tap)?;
        }
        Self::on_prepared(options)
    }

    /// A card on a tap that is prepared: by [`prepare`], which a sealed thread may not call.
    ///
    /// # Errors
    /// When the tap is none.
    pub fn on_prepared(options: NetOptions) -> Result<Self, Error> {
        let NetOptions { taps, mac, mtu, .. } = options;
        let count = taps.len();
        let Some(first) = taps.first().filter(|_| count <= MAX_PAIRS) else {
            return Err(Error::Queues(count));
        };
        let all = Offloads::CSUM.and(Offloads::TSO4).and(Offloads::TSO6);
        let can = |more| tap::set_offloads(first, all.and(more)).is_ok();
        let extra = SOMETIMES.iter().filter(|(offloads, _)| can(*offloads));
        let extra_features = extra.fold(0, |all, (_, features)| all | features);
        // Nothing unfinished until a driver agreed to it, and one queue until it asks for more.
        tap::set_offloads(first, Offloads::default()).map_err(Error::Tap)?;
        for tap in taps.iter().skip(1) {
            tap::use_queue(tap, false).map_err(Error::Tap)?;
        }
        Ok(Self {
            id: options.id,
            metrics: Arc::default(),
            taps,
            mac,
            mtu,
            extra_features,
            rx_limiter: RateLimiter::new(options.rx_limits),
            tx_limiter: RateLimiter::new(options.tx_limits),
            detour: options.mmds.map(Detour::new),
            running: None,
            pairs_at_start: 1,
            pieces: IoVecBuffer::default(),
        })
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // The tap's, whichever of its queues is asked.
        let first = self.taps.first();
        first.map_or(Ok(()), |tap| tap::set_offloads(tap, offloads))
    }

    /// Starts, on a tap that is set up.
    fn run(&mut self, queues: Queues, features: u64, io: DeviceIo) -> Result<(), device::Error> {
        if let Some(first) = self.taps.first() {
            drain(first);
            watch(&io.events, 0, first)?;
        }
        // Section 5.1.2: behind all pairs of the device, or of the one pair that the driver knows.
        let control = match (features & F_CTRL_VQ != 0, features & F_MQ != 0) {
            (false, _) => None,
            (true, false) => Some(2),
            (true, true) => Some(self.taps.len().saturating_mul(2)),
        };
        let merge = features & F_MRG_RXBUF != 0;
        let mut running = Running {
            queues,
            io,
            receivers: self.taps.iter().map(|_| Receiver::new(merge)).collect(),
            control,
            pairs: 1,
            metrics: Arc::clone(&self.metrics),
        };
        // More only on the first start, of a device that goes on from another one's state.
        running.set_pairs(&self.taps, std::mem::replace(&mut self.pairs_at_start, 1));
        self.running = Some(running);
        Ok(())
    }
}

/// struct virtio_net_config up to mtu (section 5.1.4); status belongs to a feature that is not
/// offered.
pub(super) fn config(mac: Option<[u8; 6]>, pairs: u16, mtu: Option<u16>) -> Vec<u8> {
    let config = [
        &mac.unwrap_or_default()[..],
        &[0; 2],
        &pairs.to_le_bytes(),
        &mtu.unwrap_or_default().to_le_bytes(),
    ];
    config.concat()
}

fn watch(events: &Registrar, key: u32, tap: &File) -> Result<(), device::Error> {
    // Edge-triggered: a frame that waits for room in the guest must not wake us for ever.
    events.watch(tap, key, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
    Ok(())
}

/// Throws away what the tap has queued: it may be unfinished in a way that an earlier driver
/// agreed to and this one did not.
fn drain(mut tap: &File) {
    // A tap drops what does not fit.
    let mut start = [0; 64];
    for _ in 0..MAX_STALE {
        match tap.read(&mut start) {
            Ok(1..) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => break,
        }
    }
}

impl VirtioDevice for Net {
    fn traits(&self) -> Traits {
        let pairs = self.taps.len();
        let mut features = ALWAYS | self.extra_features;
        let mut queues = pairs.saturating_mul(2);
        if pairs > 1 {
            features |= F_MQ | F_CTRL_VQ;
            queues = queues.saturating_add(1);
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
            queue_sizes: QUEUE_SIZES.get(..queues).unwrap_or(QUEUE_SIZES),
        }
    }

    fn config(&self) -> Arc<ConfigSpace> {
        // At most `MAX_PAIRS`.
        ConfigSpace::new(config(self.mac, self.taps.len() as u16, self.mtu))
    }

    fn start(&mut self, queues: Queues, features: u64, io: DeviceIo) -> Result<(), device::Error> {
        let set = self.set_offloads(offloads(features));
        set.map_err(|source| device::Error::Host {
            what: "cannot set the tap's offloads",
            source,
        })?;
        self.run(queues, features, io)
    }

    /// A frame that was read from the tap and not yet delivered is lost, as frames may be.
    fn stop(&mut self) -> QueueStates {
        let Some(mut running) = self.running.take() else {
            return QueueStates::default();
        };
        running.set_pairs(&self.taps, 1);
        if let Some(first) = self.taps.first() {
            running.io.events.unwatch(first);
        }
        for (receiver, pair) in running
            .receivers
            .iter_mut()
            .zip(running.queues.chunks_mut(2))
        {
            if let [Some(queue), ..] = pair {
                receiver.stop(queue);
            }
        }
        // The host finishes the frames of the time without a driver.
        if let Err(error) = self.set_offloads(Offloads::default()) {
            debug!("net: the tap keeps its offloads: {error}");
        }
        if let Some(detour) = &mut self.detour {
            detour.reset();
        }
        states(&running.queues)
    }

    /// A frame that was read from the tap and not yet delivered is this machine's: the other one has its buffers, and not the
    /// frame.
    fn hold(&mut self) -> Option<QueueStates> {
        let running = self.running.as_ref()?;
        let mut saved = states(&running.queues);
        for (receiver, pair) in running.receivers.iter().zip(saved.chunks_mut(2)) {
            if let [Some(queue), ..] = pair {
                queue.next_available = queue.next_available.wrapping_sub(receiver.taken());
            }
        }
        Some(saved)
    }

    /// How many pairs of queues the driver uses.
    fn save(&self) -> Value {
        json!({ "pairs": self.running.as_ref().map_or(1, |running| running.pairs) })
    }

    fn restore(&mut self, saved: &Value) -> Result<(), RestoreError> {
        let Saved { pairs } = Saved::deserialize(saved)?;
        if !(1..=self.taps.len()).contains(&pairs) {
            return Err(RestoreError::Nonsense(
                "it uses more queue pairs than it has",
            ));
        }
        self.pairs_at_start = pairs;
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Result<Progress, device::Error> {
        let Some(running) = &mut self.running else {
            return Ok(Progress::Done);
        };
        let taps = &self.taps;
        if matches!(event, Event::Ready { .. }) {
            self.metrics.rx_tap_event_count.inc();
        }
        let mut detour = self.detour.as_mut();
        let progress = match running.work(event) {
            Work::Control => running.control(taps)?,
            Work::Receive(pair) => {
                // What the service says comes by the first pair, which every driver has.
                let detour = detour.as_deref_mut().filter(|_| pair == 0);
                running.receive(
                    pair,
                    taps.get(pair).map(Arc::as_ref),
                    &mut self.rx_limiter,
                    detour,
                )?
            }
            Work::Send(pair) => {
                let tap = taps.get(pair).map(Arc::as_ref);
                let (pieces, limiter) = (&mut self.pieces, &mut self.tx_limiter);
                let sent = running.transmit(pair, tap, pieces, limiter, detour.as_deref_mut())?;
                match detour.as_deref_mut() {
                    Some(detour) if detour.frame().is_some() => {
                        sent.or(running.receive(0, None, &mut self.rx_limiter, Some(detour))?)
                    }
                    _ => sent,
                }
            }
        };
        Ok(progress.or(detour.map_or(Progress::Done, Detour::tick)))
    }

    fn metrics(&self) -> Option<Source> {
        let metrics = Arc::clone(&self.metrics);
        Some(Source::device("net", self.id.clone(), metrics))
    }

    /// The tap's queues are all in use again, as whoever opened it left them.
    fn retire(&mut self) {
        for tap in self.taps.iter().skip(1) {
            if let Err(error) = tap::use_queue(tap, true) {
                debug!("net: a queue of the tap stays unused: {error}");
            }
        }
    }

    fn update(&mut self, update: Update) -> Result<Answer, UpdateError> {
        match update {
            Update::NetLimits { rx, tx } => {
                self.rx_limiter.update(rx);
                self.tx_limiter.update(tx);
            }
            other => return Err(UpdateError::NotThisDevice(other.name())),
        }
        Ok(Answer::Done)
    }
}

/// What an event is about.
enum Work {
    Control,
    /// A pair's way to the guest.
    Receive(usize),
    /// A pair's way to the host.
    Send(usize),
}

impl Running {
    fn work(&self, event: Event) -> Work {
        match event {
            Event::Queue(index) if self.control == Some(index.into()) => Work::Control,
            Event::Queue(index) if index % 2 == 1 => Work::Send((index / 2).into()),
            Event::Queue(index) => Work::Receive((index / 2).into()),
            Event::Ready { key, .. } => Work::Receive(usize::try_from(key).unwrap_or(usize::MAX)),
        }
    }

    fn transmit(
        &mut self,
        pair: usize,
        tap: Option<&File>,
        pieces: &mut IoVecBuffer,
        limiter: &mut RateLimiter,
        mut detour: Option<&mut Detour>,
    ) -> Result<Progress, device::Error> {
        let queue = self.queues.chunks_mut(2).nth(pair);
        let (Some([_, Some(queue)]), Some(tap)) = (queue, tap) else {
            return Ok(Progress::Done);
        };
        let (memory, metrics) = (&self.io.memory, &self.metrics);
        metrics.tx_queue_event_count.inc();
        metrics.tx_count.inc();
        let progress = queue.process(memory, self.io.signal.as_ref(), BUDGET, |chain| {
            if let Some(at) = limiter.wait() {
                metrics.tx_rate_limiter_throttled.inc();
                return Ok(Verdict::Later(at));
            }
            let len = chain.readable_len();
            if len < MIN_PACKET as u64 || len > MAX_PACKET as u64 {
                metrics.tx_malformed_frames.inc();
                debug!("net: the guest sends {len} bytes, which is no frame");
            } else if !detour
                .as_deref_mut()
                .is_some_and(|detour| detour.take(memory, chain, len))
            {
                send(tap, pieces, memory, chain, metrics);
            }
            limiter.spend(len.saturating_sub(HEADER_LEN as u64));
            Ok(Verdict::Used(0))
        })?;
        Ok(progress)
    }

    /// Moves frames to the guest until it has no more room: the service's, then those of `tap`.
    fn receive(
        &mut self,
        pair: usize,
        tap: Option<&File>,
        limiter: &mut RateLimiter,
        mut detour: Option<&mut Detour>,
    ) -> Result<Progress, device::Error> {
        let queue = self.queues.chunks_mut(2).nth(pair);
        let receiver = self.receivers.get_mut(pair);
        let (Some([Some(queue), ..]), Some(receiver)) = (queue, receiver) else {
            return Ok(Progress::Done);
        };
        let (memory, metrics) = (&self.io.memory, &self.metrics);
        metrics.rx_count.inc();
        let mut progress = Progress::More;
        for _ in 0..BUDGET {
            if receiver.waiting().is_none() {
                if let Some(at) = limiter.wait() {
                    metrics.rx_rate_limiter_throttled.inc();
                    progress = Progress::Later(at);
                    break;
                }
                let service = detour.as_deref_mut();
                let got = match (service.filter(|detour| detour.frame().is_some()), tap) {
                    (Some(detour), _) => {
                        receiver.put(detour.frame().unwrap_or_default());
                        detour.sent();
                        Read::Frame
                    }
                    (None, Some(tap)) => receiver.read(tap, queue, memory)?,
                    (None, None) => Read::Empty,
                };
                if got == Read::NoRoom {
                    metrics.no_rx_avail_buffer.inc();
                }
                // The driver rings when it has room, the tap when it has frames.
                if got != Read::Frame {
                    progress = Progress::Done;
                    break;
                }
            }
            let len = receiver.waiting().unwrap_or(0);
            match receiver.deliver(queue, memory)? {
                Delivery::Gone => {
                    metrics.rx_packets_count.inc();
                    metrics.rx_bytes_count.add(len as u64);
                    limiter.spend(len as u64);
                }
                Delivery::NoRoom => {
                    metrics.no_rx_avail_buffer.inc();
                    progress = Progress::Done;
                    break;
                }
            }
        }
        queue.signal(memory, self.io.signal.as_ref())?;
        Ok(progress)
    }

    /// Serves the control queue.
    fn control(&mut self, taps: &[Arc<File>]) -> Result<Progress, device::Error> {
        let Some(index) = self.control else {
            return Ok(Progress::Done);
        };
        let Some(mut queue) = self.queues.get_mut(index).and_then(Option::take) else {
            return Ok(Progress::Done);
        };
        let memory = self.io.memory.clone();
        let signal = Arc::clone(&self.io.signal);
        // At most `MAX_PAIRS`.
        let most = taps.len() as u16;
        let progress = queue.process(&memory, signal.as_ref(), COMMANDS, |chain| {
            let set = |pairs: u16| self.set_pairs(taps, pairs.into());
            control::serve(chain, &memory, most, set).map(Verdict::Used)
        });
        if let Some(place) = self.queues.get_mut(index) {
            *place = Some(queue);
        }
        Ok(progress?)
    }

    /// Has the kernel spread the guest's frames over so many of the tap's queues; whether it does.
    fn set_pairs(&mut self, taps: &[Arc<File>], pairs: usize) -> bool {
        while self.pairs > pairs {
            self.pairs = self.pairs.saturating_sub(1);
            if let Some(tap) = taps.get(self.pairs) {
                self.io.events.unwatch(tap);
                if let Err(error) = tap::use_queue(tap, false) {
                    debug!("net: a queue of the tap stays in use: {error}");
                }
            }
        }
        for (key, tap) in (0..).zip(taps).take(pairs).skip(self.pairs) {
            // In this order: an unused queue cannot be watched.
            let used = tap::use_queue(tap, true);
            if let Err(error) = used.map_err(|error| error.to_string()).and_then(|()| {
                let watched = watch(&self.io.events, key, tap);
                watched.map_err(|error| error.to_string())
            }) {
                debug!("net: a queue of the tap cannot be used: {error}");
                return false;
            }
            self.pairs = self.pairs.saturating_add(1);
        }
        true
    }
}

/// Sends a frame. One that the host does not take is lost, as frames may be: the driver's queue
/// goes on.
fn send(
    tap: &File,
    pieces: &mut IoVecBuffer,
    memory: &GuestMemory,
    chain: &Chain,
    metrics: &NetMetrics,
) {
    let len = chain.readable_len();
    let start = Instant::now();
    let sent = pieces
        .fill(memory, chain.readable(), 0, len, Permissions::Read)
        .map_err(io::Error::other)
        .and_then(|frame| frame.write(tap.as_fd()));
    if let Err(error) = sent {
        metrics.tx_fails.inc();
        metrics.tap_write_fails.inc();
        debug!("net: a frame from the guest is lost: {error}");
    } else {
        metrics.tx_packets_count.inc();
        metrics
            .tx_bytes_count
            .add(len.saturating_sub(HEADER_LEN as u64));
        metrics.tap_write_agg.record(start);
    }
}

#[cfg(test)]
mod full_tests;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;

//! The entropy device (virtio 1.2, section 5.4): the host's random numbers for the guest.

use std::sync::Arc;

use log::debug;
use vm_memory::Permissions;

use super::chain::Chain;
use super::config_space::ConfigSpace;
use super::device::{self, DeviceIo, DeviceType, Event, Queues, Traits, VirtioDevice, states};
use super::queue::{Progress, QueueStates, Verdict};
use super::rate_limiter::{LimiterOptions, RateLimiter};
use super::update::{Answer, Update, UpdateError};
use crate::memory::GuestMemory;
use crate::memory::iovec::IoVecBuffer;
use crate::metrics::Source;
use crate::metrics::fields::EntropyMetrics;

const QUEUE_SIZES: &[u16] = &[64];
/// Most bytes given for one request; a driver that asks for more gets a part, as section 5.4.6.1
/// allows. It bounds the time that one request takes, not memory: the kernel fills the guest's.
const MAX_BYTES: u64 = 64 << 10;
/// Requests served before the other devices get their turn.
const BUDGET: usize = 16;

/// The entropy device.
#[derive(Default)]
pub struct Entropy {
    limiter: RateLimiter,
    running: Option<(Queues, DeviceIo)>,
    pieces: IoVecBuffer,
    metrics: Arc<EntropyMetrics>,
}

impl Entropy {
    /// A device that takes its bytes from getrandom(2), within `limits`.
    pub fn new(limits: LimiterOptions) -> Self {
        Self {
            limiter: RateLimiter::new(limits),
            ..Self::default()
        }
    }
}

impl VirtioDevice for Entropy {
    fn traits(&self) -> Traits {
        Traits {
            device_type: DeviceType::Entropy,
            features: 0,
            queue_sizes: QUEUE_SIZES,
        }
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::default()
    }

    fn start(&mut self, queues: Queues, _: u64, io: DeviceIo) -> Result<(), device::Error> {
        self.running = Some((queues, io));
        Ok(())
    }

    fn stop(&mut self) -> QueueStates {
        self.running
            .take()
            .map(|(queues, _)| states(&queues))
            .unwrap_or_default()
    }

    fn hold(&mut self) -> Option<QueueStates> {
        self.running.as_ref().map(|(queues, _)| states(queues))
    }

    fn handle(&mut self, _: Event) -> Result<Progress, device::Error> {
        let Some(([Some(queue), ..], io)) = &mut self.running else {
            return Ok(Progress::Done);
        };
        let progress = queue.process(&io.memory, io.signal.as_ref(), BUDGET, |chain| {
            if let Some(at) = self.limiter.wait() {
                self.metrics.entropy_rate_limiter_throttled.inc();
                return Ok(Verdict::Later(at));
            }
            self.metrics.entropy_event_count.inc();
            let len = match fill(&mut self.pieces, &io.memory, chain) {
                Ok(len) => len,
                Err(error) => {
                    self.metrics.entropy_event_fails.inc();
                    debug!("entropy: {error}");
                    0
                }
            };
            self.metrics.entropy_bytes.add(len.into());
            self.limiter.spend(len.into());
            Ok(Verdict::Used(len))
        })?;
        Ok(progress)
    }

    fn metrics(&self) -> Option<Source> {
        Some(Source::new("entropy", self.metrics.clone()))
    }

    fn update(&mut self, update: Update) -> Result<Answer, UpdateError> {
        match update {
            Update::Limits(limits) => self.limiter.update(limits),
            other => return Err(UpdateError::NotThisDevice(other.name())),
        }
        Ok(Answer::Done)
    }
}

/// Fills a chain's buffers, and says how far.
fn fill(pieces: &mut IoVecBuffer, memory: &GuestMemory, chain: &Chain) -> Result<u32, String> {
    let filled = pieces
        .fill(memory, chain.writable(), 0, MAX_BYTES, Permissions::Write)
        .map_err(|error| error.to_string())
        .and_then(|mut pieces| pieces.fill_random().map_err(|error| error.to_string()))?;
    // At most `MAX_BYTES`.
    Ok(filled as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{DATA, Rig};

    #[test]
    fn fills_buffers_with_different_bytes() {
        let mut rig = Rig::new(Entropy::new(LimiterOptions::default()));
        rig.drivers[0].add(&[(DATA, 32, true), (DATA + 100, 32, true)]);
        rig.kick(0);
        let driver = &mut rig.drivers[0];
        assert_eq!(driver.used(), Some((0, 64)));
        let (first, second) = (driver.get(DATA, 32), driver.get(DATA + 100, 32));
        assert_ne!(first, [0; 32]);
        assert_ne!(first, second);
        assert_eq!(driver.get(DATA + 32, 68), [0; 68], "nothing beside them");
    }

    #[test]
    fn counts_what_it_gives() {
        let entropy = Entropy::new(LimiterOptions::default());
        let metrics = Arc::clone(&entropy.metrics);
        let mut rig = Rig::new(entropy);
        rig.drivers[0].add(&[(DATA, 32, true)]);
        rig.drivers[0].add(&[(DATA, 32, false)]);
        rig.kick(0);
        assert_eq!(metrics.entropy_event_count.total(), 2);
        assert_eq!(metrics.entropy_bytes.total(), 32);
        assert_eq!(metrics.entropy_event_fails.total(), 0);
    }

    #[test]
    fn a_huge_request_gets_a_part() {
        let mut rig = Rig::new(Entropy::new(LimiterOptions::default()));
        rig.drivers[0].add(&[(DATA, 0x10_0000, true), (DATA, 0x10_0000, true)]);
        rig.kick(0);
        let driver = &mut rig.drivers[0];
        assert_eq!(driver.used(), Some((0, MAX_BYTES as u32)));
        assert_eq!(driver.get(DATA + MAX_BYTES, 64), [0; 64]);
    }

    #[test]
    fn a_request_without_room_gets_nothing() {
        let mut rig = Rig::new(Entropy::new(LimiterOptions::default()));
        rig.drivers[0].add(&[(DATA, 32, false)]);
        rig.kick(0);
        assert_eq!(rig.drivers[0].used(), Some((0, 0)));
        assert_eq!(rig.drivers[0].get(DATA, 32), [0; 32]);
    }
}

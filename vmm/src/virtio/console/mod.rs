//! The console (virtio 1.2, section 5.3): one port, from standard input and to standard output.
//!
//! It keeps nothing of the guest's but the buffer of [`Output`] and nothing of the host's but that of
//! [`Port`], both of fixed size.

mod output;
mod port;

use std::sync::Arc;
use std::time::Instant;

use log::log;

use super::chain::{self, Chain};
use super::config_space::ConfigSpace;
use super::device::{
    self, DeviceIo, DeviceType, Event, LogBudget, Queues, Traits, VirtioDevice, states,
};
use super::queue::{Progress, QueueStates, Verdict};
use crate::event_loop::EventSet;
use crate::memory::GuestMemory;

pub use output::{Output, to_stdout};
pub use port::{Port, Size};

/// receiveq and transmitq of port 0 (section 5.3.2).
const QUEUE_SIZES: &[u16] = &[64, 64];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// VIRTIO_CONSOLE_F_SIZE (section 5.3.3).
const F_SIZE: u64 = 1 << 0;

/// Keys of the descriptors that the device watches.
const NEWS: u32 = 0;
const ROOM: u32 = 1;

/// Chains served before the other devices get their turn.
const BUDGET: usize = 16;
/// Bytes of one chain that are looked at in a turn.
const BUDGET_BYTES: usize = 256 << 10;
/// Bytes moved at once.
const PIECE: usize = 4096;

/// The console.
pub struct Console {
    port: Arc<Port>,
    output: Arc<Output>,
    running: Option<(Queues, DeviceIo)>,
    /// How much of the first chain of the transmit queue was said already. A chain that a stop cuts
    /// in two is said again from its start.
    said: u64,
    losses: LogBudget,
}

impl Console {
    /// A console that hears `port` and speaks to `output`.
    pub fn new(port: Arc<Port>, output: Arc<Output>) -> Self {
        Self {
            port,
            output,
            running: None,
            said: 0,
            losses: LogBudget::default(),
        }
    }

    /// Gives the driver what was typed, as far as it has buffers for it.
    fn receive(&mut self) -> Result<Progress, device::Error> {
        let Some(([Some(queue), ..], io)) = &mut self.running else {
            return Ok(Progress::Done);
        };
        let progress = queue.process(&io.memory, io.signal.as_ref(), BUDGET, |chain| {
            let mut piece = [0; PIECE];
            let room = usize::try_from(chain.writable_len()).unwrap_or(PIECE);
            // A buffer without room would be a way to lose input.
            let room = piece.get_mut(..room.min(PIECE)).unwrap_or_default();
            let count = self.port.take(room);
            if count == 0 && !room.is_empty() {
                return Ok(Verdict::Keep);
            }
            let typed = room.get(..count).unwrap_or_default();
            chain.write_at(&io.memory, 0, typed)?;
            // At most a page.
            Ok(Verdict::Used(count as u32))
        })?;
        Ok(progress)
    }

    /// Says what the driver sent.
    fn transmit(&mut self) -> Result<Progress, device::Error> {
        let Some(([_, Some(queue), ..], io)) = &mut self.running else {
            return Ok(Progress::Done);
        };
        let (output, said, losses) = (&self.output, &mut self.said, &mut self.losses);
        let progress = queue.process(&io.memory, io.signal.as_ref(), BUDGET, |chain| {
            let verdict = say(output, &io.memory, chain, said, losses)?;
            if matches!(verdict, Verdict::Used(_)) {
                *said = 0;
            }
            Ok(verdict)
        })?;
        Ok(progress)
    }
}

/// Says a chain from its byte `said` on. Lost is what finds no room for too long.
fn say(
    output: &Output,
    memory: &GuestMemory,
    chain: &Chain,
    said: &mut u64,
    losses: &mut LogBudget,
) -> Result<Verdict, chain::Error> {
    let mut piece = [0; PIECE];
    let mut budget = BUDGET_BYTES;
    loop {
        let left = chain.readable_len().saturating_sub(*said);
        if left == 0 {
            return Ok(Verdict::Used(0));
        }
        if budget == 0 {
            return Ok(Verdict::Later(Instant::now()));
        }
        let count = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
        let part = piece.get_mut(..count).unwrap_or_default();
        chain.read_at(memory, *said, part)?;
        let taken = output.push(part);
        *said = said.saturating_add(taken as u64);
        budget = budget.saturating_sub(taken);
        if taken < count {
            let patience = output.patience();
            if patience > Instant::now() {
                return Ok(Verdict::Later(patience));
            }
            log!(
                losses.level(),
                "console: nobody reads standard output, {} bytes are lost",
                left.saturating_sub(taken as u64)
            );
            return Ok(Verdict::Used(0));
        }
    }
}

impl VirtioDevice for Console {
    fn traits(&self) -> Traits {
        Traits {
            device_type: DeviceType::Console,
            features: F_SIZE,
            queue_sizes: QUEUE_SIZES,
        }
    }

    fn config(&self) -> Arc<ConfigSpace> {
        self.port.config()
    }

    fn start(&mut self, queues: Queues, _: u64, io: DeviceIo) -> Result<(), device::Error> {
        io.events.watch(self.port.news(), NEWS, EventSet::IN)?;
        if let Err(error) = io.events.watch(self.output.room(), ROOM, EventSet::IN) {
            io.events.unwatch(self.port.news());
            return Err(error.into());
        }
        // It reads the size after this.
        self.port.take_resized();
        self.said = 0;
        self.running = Some((queues, io));
        self.port.set_running(true);
        Ok(())
    }

    fn stop(&mut self) -> QueueStates {
        let Some((queues, io)) = self.running.take() else {
            return QueueStates::default();
        };
        self.port.set_running(false);
        io.events.unwatch(self.port.news());
        io.events.unwatch(self.output.room());
        states(&queues)
    }

    /// A chain that has been said in part is said again from its start.
    fn hold(&mut self) -> Option<QueueStates> {
        self.running.as_ref().map(|(queues, _)| states(queues))
    }

    fn handle(&mut self, event: Event) -> Result<Progress, device::Error> {
        match event {
            Event::Queue(RECEIVE) => self.receive(),
            Event::Queue(TRANSMIT) => self.transmit(),
            Event::Ready { key: NEWS, .. } => {
                // Only a wake-up.
                let _ = self.port.news().read();
                if let Some((_, io)) = &self.running
                    && self.port.take_resized()
                {
                    io.signal.config_changed();
                }
                self.receive()
            }
            Event::Ready { key: ROOM, .. } => {
                let _ = self.output.room().read();
                self.transmit()
            }
            Event::Queue(_) | Event::Ready { .. } => Ok(Progress::Done),
        }
    }
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;

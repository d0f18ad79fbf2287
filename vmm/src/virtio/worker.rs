//! The device thread: runs devices, each a bounded while at a time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, error, log};

use super::device::{self, DeviceIo, EVENT_IDX, Event, LogBudget, Queues, VirtioDevice};
use super::queue::{Progress, Queue, QueueStates};
use super::transport::mailbox::Command;
use super::transport::mmio::MmioTransport;
use crate::event_loop::{self, EventLoop, Token};
use crate::memory::GuestMemory;

/// A device and how to reach its driver.
struct Slot {
    transport: Arc<MmioTransport>,
    device: Box<dyn VirtioDevice>,
    running: bool,
    /// What it was doing when its budget was used up, to be called again with.
    unfinished: VecDeque<Event>,
    /// What a rate limit holds back, and until when. No more than there are queues.
    held_back: Vec<(Event, Instant)>,
    failures: LogBudget,
}

/// Runs devices on the thread that calls [`DeviceWorker::run`].
pub struct DeviceWorker {
    events: EventLoop,
    slots: Vec<Slot>,
}

impl DeviceWorker {
    /// A worker without devices.
    ///
    /// # Errors
    /// When the kernel gives no epoll descriptor.
    pub fn new() -> Result<Self, event_loop::Error> {
        Ok(Self {
            events: EventLoop::new()?,
            slots: Vec::new(),
        })
    }

    /// Takes over the device of `transport`. A transport is added to one worker, once.
    ///
    /// # Errors
    /// When the kernel refuses to watch its doorbells.
    pub fn add(&mut self, transport: Arc<MmioTransport>) -> Result<(), event_loop::Error> {
        let Some(device) = transport.take_device() else {
            return Ok(());
        };
        // There are fewer interrupt pins than a u16 counts.
        let index = self.slots.len() as u16;
        self.events.watch(
            transport.mailbox().doorbell(),
            Token::Command { device: index },
        )?;
        for (queue, notifier) in (0..).zip(transport.queue_notifiers()) {
            let token = Token::Queue {
                device: index,
                queue,
            };
            self.events.watch(notifier, token)?;
        }
        self.slots.push(Slot {
            transport,
            device,
            running: false,
            unfinished: VecDeque::new(),
            held_back: Vec::new(),
            failures: LogBudget::default(),
        });
        Ok(())
    }

    /// The body of the device thread. It returns only if the event loop fails, which is then
    /// logged; the devices are stopped and their drivers wait for nothing.
    pub fn run(mut self) {
        if let Err(error) = self.turn() {
            error!("device thread: {error}");
        }
    }

    /// Waits for events unless work is left over, hands out those that came, then lets every device
    /// go on with one thing that it left: however many a device left, the others wait for one.
    fn turn(&mut self) -> Result<(), event_loop::Error> {
        loop {
            let count = self.events.wait(self.timeout())?;
            for index in 0..count {
                if let Some((token, events)) = self.events.event(index) {
                    self.dispatch(token, events);
                }
            }
            for (device, slot) in (0..).zip(&mut self.slots) {
                slot.release_due();
                if let Some(event) = slot.unfinished.pop_front() {
                    slot.handle(device, event);
                }
            }
        }
    }

    /// How long to wait for events: not at all with work left over, else until a rate limit ends.
    fn timeout(&self) -> Option<Duration> {
        if self.slots.iter().any(|slot| !slot.unfinished.is_empty()) {
            return Some(Duration::ZERO);
        }
        let held_back = self.slots.iter().flat_map(|slot| &slot.held_back);
        let next = held_back.map(|(_, until)| *until).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn dispatch(&mut self, token: Token, events: event_loop::EventSet) {
        match token {
            Token::Queue { device, queue } => {
                if let Some(slot) = self.slots.get(usize::from(device))
                    && let Some(notifier) = slot.transport.queue_notifiers().get(usize::from(queue))
                {
                    // Level-triggered: read it, or it wakes us for ever.
                    let _ = notifier.read();
                }
                self.handle(device, Event::Queue(queue));
            }
            Token::Device { device, key } => self.handle(device, Event::Ready { key, events }),
            Token::Command { device } => self.command(device),
        }
    }

    fn handle(&mut self, index: u16, event: Event) {
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            slot.handle(index, event);
        }
    }

    /// Does what the transport asks for, and lets the vCPU go on.
    fn command(&mut self, index: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return;
        };
        let Some(command) = slot.transport.mailbox().take() else {
            return;
        };
        let success = match command {
            Command::Start { features, queues } => {
                match slot.start(index, features, &queues, &self.events) {
                    Ok(()) => {
                        // A doorbell may have rung before, or, for restored queues, never.
                        let used = (0..).zip(&queues).filter_map(|(i, q)| q.map(|_| i));
                        slot.unfinished.extend(used.map(Event::Queue));
                        true
                    }
                    Err(error) => {
                        slot.fail(index, &error);
                        false
                    }
                }
            }
            Command::Stop => {
                slot.stop();
                debug!("virtio device {index}: reset");
                true
            }
        };
        slot.transport.mailbox().answer(success);
    }
}

impl Drop for DeviceWorker {
    fn drop(&mut self) {
        for slot in &mut self.slots {
            slot.stop();
            slot.transport.mailbox().close();
        }
    }
}

impl Slot {
    fn start(
        &mut self,
        index: u16,
        features: u64,
        states: &QueueStates,
        events: &EventLoop,
    ) -> Result<(), device::Error> {
        let memory = self.transport.memory();
        let sizes = self.device.traits().queue_sizes;
        let queues = queues(states, sizes, features, memory)?;
        let io = DeviceIo {
            memory: memory.clone(),
            signal: self.transport.signal(),
            events: events.registrar(index),
        };
        self.device.start(queues, features, io)?;
        self.running = true;
        debug!("virtio device {index}: started with features {features:#x}");
        Ok(())
    }

    /// Gives the device one turn.
    fn handle(&mut self, index: u16, event: Event) {
        if !self.running {
            return;
        }
        match self.device.handle(event) {
            Ok(Progress::Done) => {}
            Ok(Progress::More) => self.leave(event),
            Ok(Progress::Later(until)) => {
                self.held_back.retain(|(other, _)| *other != event);
                self.held_back.push((event, until));
            }
            Err(error) => {
                self.fail(index, &error);
                self.transport.set_needs_reset();
            }
        }
    }

    fn leave(&mut self, event: Event) {
        if !self.unfinished.contains(&event) {
            self.unfinished.push_back(event);
        }
    }

    /// Lets go on what a rate limit held back until now.
    fn release_due(&mut self) {
        if self.held_back.is_empty() {
            return;
        }
        let now = Instant::now();
        for (event, _) in self
            .held_back
            .extract_if(.., |(_, until)| *until <= now)
            .collect::<Vec<_>>()
        {
            self.leave(event);
        }
    }

    fn stop(&mut self) -> QueueStates {
        self.running = false;
        // What the device was doing concerns nobody any more.
        self.unfinished.clear();
        self.held_back.clear();
        self.device.stop()
    }

    fn fail(&mut self, index: u16, error: &device::Error) {
        let kind = self.device.traits().device_type;
        log!(
            self.failures.level(),
            "virtio device {index} ({kind:?}) needs a reset: {error}"
        );
        self.stop();
    }
}

/// The queues that `states` describe, each checked.
fn queues(
    states: &QueueStates,
    sizes: &[u16],
    features: u64,
    memory: &GuestMemory,
) -> Result<Queues, device::Error> {
    let mut queues = Queues::default();
    for (index, ((queue, state), &max)) in (0..).zip(queues.iter_mut().zip(states).zip(sizes)) {
        if let Some(state) = state {
            let event_idx = features & EVENT_IDX != 0;
            *queue = Some(Queue::new(index, state, max, event_idx, memory)?);
        }
    }
    Ok(queues)
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;

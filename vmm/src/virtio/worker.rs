//! The device thread: runs devices, each a bounded while at a time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use log::{debug, error, log};

use super::device::{self, DeviceIo, EVENT_IDX, Event, LogBudget, Queues, VirtioDevice};
use super::queue::{Progress, Queue, QueueStates};
use super::transport::endpoint::{Command, Endpoint};
use super::transport::mailbox::Mailbox;
use super::update::{Answer, Update, UpdateError};
use crate::event_loop::{self, EventLoop, Token};
use crate::memory::GuestMemory;

/// What the device thread does for the control thread, which may not do it itself.
type Job = Box<dyn FnOnce() + Send>;

/// What the control thread asks of the device thread.
enum Request {
    Run(Job),
    Add(Arc<Endpoint>, Box<dyn VirtioDevice>),
    Remove(u16),
    Update(u16, Update),
    Hold,
    Restore(Vec<Restored>),
}

/// What comes of it.
enum Response {
    Ran,
    Added(Result<u16, event_loop::Error>),
    Removed(Option<Box<dyn VirtioDevice>>),
    Updated(Result<Answer, UpdateError>),
    Held(Vec<SavedDevice>, Held),
    Restored(Result<Held, RestoreFailed>),
}

/// The control thread's way to the devices on a device thread. Every call waits for its answer.
#[derive(Clone)]
pub struct WorkerHandle(Arc<Mailbox<Request, Response>>);

impl WorkerHandle {
    /// Changes the device with this index.
    ///
    /// # Errors
    /// When there is no such device, or it cannot be changed so.
    pub fn update(&self, device: u16, update: Update) -> Result<Answer, UpdateError> {
        match self.0.ask(Request::Update(device, update)) {
            Some(Response::Updated(result)) => result,
            _ => Err(UpdateError::NoThread),
        }
    }

    /// Runs `job` on the device thread and returns what comes of it; `None` when the thread has ended. For what a
    /// device needs when it is made and only that thread may do: locks of files, ioctls of taps. The devices
    /// wait meanwhile, so it takes a bounded time.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (sender, result) = channel();
        let job = move || {
            // Whoever asked waits for it.
            let _ = sender.send(job());
        };
        match self.0.ask(Request::Run(Box::new(job))) {
            Some(Response::Ran) => result.try_recv().ok(),
            _ => None,
        }
    }

    /// Gives the thread one more device and returns its index; `None` when the thread has ended.
    ///
    /// # Errors
    /// When the kernel refuses to watch its doorbells, or there are too many devices.
    pub fn add(
        &self,
        endpoint: Arc<Endpoint>,
        device: Box<dyn VirtioDevice>,
    ) -> Option<Result<u16, event_loop::Error>> {
        match self.0.ask(Request::Add(endpoint, device)) {
            Some(Response::Added(result)) => Some(result),
            _ => None,
        }
    }

    /// Has every device finish what it has in flight and save itself. The devices touch nothing from then on, until
    /// [`Held`] is dropped. None when the thread has ended.
    pub fn hold(&self) -> Option<(Vec<SavedDevice>, Held)> {
        match self.0.ask(Request::Hold) {
            Some(Response::Held(devices, held)) => Some((devices, held)),
            _ => None,
        }
    }

    /// Has devices that have never run go on from saved ones, and those start that ran, once [`Held`] is dropped: until then
    /// they touch nothing.
    ///
    /// # Errors
    /// The first one that cannot.
    pub fn restore(&self, devices: Vec<Restored>) -> Result<Held, RestoreFailed> {
        match self.0.ask(Request::Restore(devices)) {
            Some(Response::Restored(result)) => result,
            _ => Err(RestoreFailed {
                index: 0,
                source: "the device thread has ended".into(),
            }),
        }
    }

    /// Stops the device with this index, has it give back what it holds of the host, and takes it away, if there
    /// is one.
    pub fn remove(&self, device: u16) -> Option<Box<dyn VirtioDevice>> {
        match self.0.ask(Request::Remove(device)) {
            Some(Response::Removed(device)) => device,
            _ => None,
        }
    }
}

/// A device and how to reach its driver.
struct Slot {
    endpoint: Arc<Endpoint>,
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
    requests: Arc<Mailbox<Request, Response>>,
    /// By index; free where a device was taken away.
    slots: Vec<Option<Slot>>,
}

impl DeviceWorker {
    /// A worker without devices.
    ///
    /// # Errors
    /// When the kernel gives no epoll descriptor, or no eventfd.
    pub fn new() -> Result<Self, event_loop::Error> {
        let events = EventLoop::new()?;
        let requests = Arc::new(Mailbox::new().map_err(event_loop::Error::Create)?);
        events.watch(requests.doorbell(), Token::Request)?;
        Ok(Self {
            events,
            requests,
            slots: Vec::new(),
        })
    }

    /// The control thread's way to it.
    pub fn handle(&self) -> WorkerHandle {
        WorkerHandle(Arc::clone(&self.requests))
    }

    /// Takes over `device`, whose transport has `endpoint`, and returns its index.
    ///
    /// # Errors
    /// When the kernel refuses to watch its doorbells.
    pub fn add(
        &mut self,
        endpoint: Arc<Endpoint>,
        mut device: Box<dyn VirtioDevice>,
    ) -> Result<u16, event_loop::Error> {
        let free = self.slots.iter().position(Option::is_none);
        let index = free.unwrap_or(self.slots.len());
        let device_index = u16::try_from(index).map_err(|_| event_loop::Error::Full)?;
        let watched = self.watch(&endpoint, device_index);
        if let Err(error) = watched {
            self.unwatch(&endpoint);
            device.retire();
            return Err(error);
        }
        let slot = Some(Slot {
            endpoint,
            device,
            running: false,
            unfinished: VecDeque::new(),
            held_back: Vec::new(),
            failures: LogBudget::default(),
        });
        match self.slots.get_mut(index) {
            Some(place) => *place = slot,
            None => self.slots.push(slot),
        }
        Ok(device_index)
    }

    fn watch(&self, endpoint: &Endpoint, device: u16) -> Result<(), event_loop::Error> {
        let doorbell = endpoint.mailbox().doorbell();
        self.events.watch(doorbell, Token::Command { device })?;
        for (queue, notifier) in (0..).zip(endpoint.notifiers()) {
            self.events
                .watch(notifier, Token::Queue { device, queue })?;
        }
        Ok(())
    }

    fn unwatch(&self, endpoint: &Endpoint) {
        self.events.unwatch(endpoint.mailbox().doorbell());
        for notifier in endpoint.notifiers() {
            self.events.unwatch(notifier);
        }
    }

    /// Stops a device and lets it go. Its transport gets no answers any more.
    fn remove(&mut self, index: u16) -> Option<Box<dyn VirtioDevice>> {
        let mut slot = self.slots.get_mut(usize::from(index))?.take()?;
        slot.stop();
        self.unwatch(&slot.endpoint);
        slot.endpoint.mailbox().close();
        slot.device.retire();
        Some(slot.device)
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
                let Some(slot) = slot else { continue };
                slot.release_due();
                if let Some(event) = slot.unfinished.pop_front() {
                    slot.handle(device, event);
                }
            }
        }
    }

    /// How long to wait for events: not at all with work left over, else until a rate limit ends.
    fn timeout(&self) -> Option<Duration> {
        let mut slots = self.slots.iter().flatten();
        if slots.any(|slot| !slot.unfinished.is_empty()) {
            return Some(Duration::ZERO);
        }
        let held_back = self.slots.iter().flatten().flat_map(|slot| &slot.held_back);
        let next = held_back.map(|(_, until)| *until).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn dispatch(&mut self, token: Token, events: event_loop::EventSet) {
        match token {
            Token::Queue { device, queue } => {
                if let Some(Some(slot)) = self.slots.get(usize::from(device))
                    && let Some(notifier) = slot.endpoint.notifiers().get(usize::from(queue))
                {
                    // Level-triggered: read it, or it wakes us for ever.
                    let _ = notifier.read();
                }
                self.deliver(device, Event::Queue(queue));
            }
            Token::Device { device, key } => self.deliver(device, Event::Ready { key, events }),
            Token::Command { device } => self.command(device),
            Token::Request => self.request(),
        }
    }

    fn deliver(&mut self, index: u16, event: Event) {
        if let Some(Some(slot)) = self.slots.get_mut(usize::from(index)) {
            slot.handle(index, event);
        }
    }

    /// Does what the transport asks for, and lets the vCPU go on.
    fn command(&mut self, index: u16) {
        let Some(Some(slot)) = self.slots.get_mut(usize::from(index)) else {
            return;
        };
        // Take the command first: that is what stops the doorbell.
        let command = slot.endpoint.mailbox().take();
        slot.endpoint.signal().flush();
        let Some(command) = command else { return };
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
                        slot.endpoint.set_needs_reset();
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
        slot.endpoint.mailbox().answer(success);
    }

    /// Does what the control thread asks for.
    fn request(&mut self) {
        let Some(request) = self.requests.take() else {
            return;
        };
        let response = match request {
            Request::Hold => return self.hold(),
            Request::Restore(devices) => return self.restore_and_rest(devices),
            Request::Run(job) => {
                job();
                Response::Ran
            }
            Request::Add(endpoint, device) => Response::Added(self.add(endpoint, device)),
            Request::Remove(index) => Response::Removed(self.remove(index)),
            Request::Update(index, update) => {
                let slot = self.slots.get_mut(usize::from(index));
                let slot = slot.and_then(Option::as_mut);
                Response::Updated(match slot {
                    Some(slot) => slot.update(update),
                    None => Err(UpdateError::NoDevice),
                })
            }
        };
        self.requests.answer(response);
    }
}

impl Drop for DeviceWorker {
    fn drop(&mut self) {
        for slot in self.slots.iter_mut().flatten() {
            slot.stop();
            slot.endpoint.mailbox().close();
        }
        self.requests.close();
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
        let memory = self.endpoint.memory();
        let sizes = self.device.traits().queue_sizes;
        let queues = queues(states, sizes, features, memory)?;
        let io = DeviceIo {
            memory: memory.clone(),
            signal: Arc::clone(self.endpoint.signal()),
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
                self.endpoint.set_needs_reset();
            }
        }
    }

    /// What a limit held back may go on under a new one, or with something else that changed.
    fn update(&mut self, update: Update) -> Result<Answer, UpdateError> {
        let answer = self.device.update(update)?;
        for (event, _) in std::mem::take(&mut self.held_back) {
            self.leave(event);
        }
        Ok(answer)
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

mod saving;
pub use saving::{Held, RestoreFailed, Restored, SavedDevice};

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;

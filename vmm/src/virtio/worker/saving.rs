//! Has all devices rest and say what they are, and go on from what others were.

use std::sync::mpsc::{Sender, channel};

use serde_json::Value;
use thiserror::Error;

use super::{DeviceWorker, Response, Slot};
use crate::virtio::device::Event;
use crate::virtio::queue::QueueStates;
use crate::virtio::transport::state::Start;

/// A device as plain data, but for its config and its transport.
#[derive(Debug)]
pub struct SavedDevice {
    /// Its index on the device thread.
    pub index: u16,
    /// Its queues, if it runs.
    pub queues: Option<QueueStates>,
    /// What it says of itself.
    pub data: Value,
    /// Why it cannot be on another machine, if so.
    pub obstacle: Option<&'static str>,
}

/// How a device goes on from a saved one.
#[derive(Debug)]
pub struct Restored {
    /// Its index on the device thread.
    pub index: u16,
    /// What the saved one said of itself.
    pub data: Value,
    /// How it is started, if the saved one ran.
    pub start: Option<Start>,
}

/// As long as it lives, the device thread does nothing.
pub struct Held(#[allow(dead_code, reason = "what counts is that it is dropped")] Sender<()>);

/// Which device did not go on from a saved one, and why.
#[derive(Debug, Error)]
#[error("virtio device {index}: {source}")]
pub struct RestoreFailed {
    /// Its index.
    pub index: u16,
    /// Why.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl DeviceWorker {
    /// Saves all devices, answers, and waits until the one who asked lets them go on.
    pub(super) fn hold(&mut self) {
        let save = |(index, slot): (u16, &mut Option<Slot>)| {
            let device = &mut slot.as_mut()?.device;
            Some(SavedDevice {
                index,
                queues: device.hold(),
                data: device.save(),
                obstacle: device.obstacle(),
            })
        };
        let devices = (0..).zip(&mut self.slots).filter_map(save).collect();
        self.rest(|held| Response::Held(devices, held));
    }

    /// Has all devices go on from saved ones, answers, and waits until the one who asked lets them.
    pub(super) fn restore_and_rest(&mut self, devices: Vec<Restored>) {
        let restored = self.restore(devices);
        self.rest(|held| Response::Restored(restored.map(|()| held)));
    }

    /// Answers, and does nothing as long as what the answer has of it lives.
    fn rest(&self, answer: impl FnOnce(Held) -> Response) {
        let (held, let_go) = channel();
        self.requests.answer(answer(Held(held)));
        // Nothing is ever sent: it ends when the other end is dropped.
        let _ = let_go.recv();
    }

    fn restore(&mut self, devices: Vec<Restored>) -> Result<(), RestoreFailed> {
        for Restored { index, data, start } in devices {
            let failed =
                |source: Box<dyn std::error::Error + Send + Sync>| RestoreFailed { index, source };
            let slot = self.slots.get_mut(usize::from(index));
            let slot = slot.and_then(Option::as_mut);
            let slot = slot.ok_or_else(|| failed("there is none".into()))?;
            let restored = slot.device.restore(&data);
            restored.map_err(|error| failed(error.into()))?;
            if let Some(Start { features, queues }) = start {
                let started = slot.start(index, features, &queues, &self.events);
                started.map_err(|error| failed(error.into()))?;
                let used = (0..).zip(&queues).filter_map(|(i, q)| q.map(|_| i));
                for queue in used {
                    // Neither a doorbell nor an interrupt that was under way has come along: the device looks for itself,
                    // and so shall the driver.
                    slot.unfinished.push_back(Event::Queue(queue));
                    slot.endpoint.signal().used(queue);
                }
            }
        }
        Ok(())
    }
}

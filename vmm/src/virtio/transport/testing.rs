//! A device for tests of transports.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::virtio::chain::Chain;
use crate::virtio::config_space::ConfigSpace;
use crate::virtio::device::{
    self, DeviceIo, DeviceType, Event, Queues, Traits, VirtioDevice, states,
};
use crate::virtio::queue::{Progress, QueueStates, Verdict};

/// Counts its starts and stops, and completes what it is given.
#[derive(Default)]
pub struct Echo {
    running: Option<(Queues, DeviceIo)>,
    pub starts: Arc<AtomicUsize>,
    pub stops: Arc<AtomicUsize>,
}

impl VirtioDevice for Echo {
    fn traits(&self) -> Traits {
        Traits {
            device_type: DeviceType::Entropy,
            features: 0,
            queue_sizes: &[16],
        }
    }
    fn config(&self) -> Arc<ConfigSpace> {
        ConfigSpace::new(vec![1, 2, 3, 4, 5])
    }
    fn start(&mut self, queues: Queues, _: u64, io: DeviceIo) -> Result<(), device::Error> {
        assert!(self.running.is_none());
        self.starts.fetch_add(1, Ordering::SeqCst);
        self.running = Some((queues, io));
        Ok(())
    }
    fn stop(&mut self) -> QueueStates {
        self.stops.fetch_add(1, Ordering::SeqCst);
        self.running
            .take()
            .map(|(queues, _)| states(&queues))
            .unwrap_or_default()
    }
    fn hold(&mut self) -> Option<QueueStates> {
        self.running.as_ref().map(|(queues, _)| states(queues))
    }
    fn handle(&mut self, _: Event) -> Result<Progress, device::Error> {
        let ([Some(queue), ..], io) = self.running.as_mut().unwrap() else {
            return Ok(Progress::Done);
        };
        let done = |_: &Chain| Ok(Verdict::Used(0));
        Ok(queue.process(&io.memory, io.signal.as_ref(), 4, done)?)
    }
}

/// Has `N` queues and does nothing.
pub struct Wide<const N: usize>;

impl<const N: usize> VirtioDevice for Wide<N> {
    fn traits(&self) -> Traits {
        Traits {
            device_type: DeviceType::Net,
            features: 0,
            queue_sizes: const { &[16; N] },
        }
    }
    fn config(&self) -> Arc<ConfigSpace> {
        ConfigSpace::new(Vec::new())
    }
    fn start(&mut self, _: Queues, _: u64, _: DeviceIo) -> Result<(), device::Error> {
        Ok(())
    }
    fn stop(&mut self) -> QueueStates {
        QueueStates::default()
    }
    fn hold(&mut self) -> Option<QueueStates> {
        None
    }
    fn handle(&mut self, _: Event) -> Result<Progress, device::Error> {
        Ok(Progress::Done)
    }
}

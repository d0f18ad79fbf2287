//! What every transport has in common: feature negotiation, the status register and its order
//! (virtio 1.2, sections 2.1 to 2.4 and 3.1), and the configuration of queues.

use serde::{Deserialize, Serialize};

use super::state::RestoreError;
use crate::virtio::device::{COMMON_FEATURES, Traits, VERSION_1};
use crate::virtio::queue::{MAX_QUEUES, QueueState, QueueStates};

/// Device status bits (section 2.1).
pub mod status {
    /// The driver saw the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// The features are agreed.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on without a reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

/// What a write to the status register asks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// Nothing.
    None,
    /// Start: the driver set DRIVER_OK.
    Start,
    /// Reset: the driver wrote zero. The transport calls [`Core::reset`] once the device stopped.
    Reset,
}

/// Which of a queue's three addresses.
#[derive(Clone, Copy, Debug)]
pub enum Area {
    /// The descriptor table.
    Descriptors,
    /// The available ring, which the spec also calls the driver area.
    Driver,
    /// The used ring, or device area.
    Device,
}

/// Which half of a 64-bit register.
#[derive(Clone, Copy, Debug)]
pub enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

/// A queue as the driver configures it.
#[derive(Clone, Copy, Debug)]
struct QueueConfig {
    max_size: u16,
    ready: bool,
    state: QueueState,
}

/// The registers as plain data.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CoreState {
    status: u8,
    accepted: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    /// Of each queue, whether it is ready, and how it is.
    queues: Vec<(bool, QueueState)>,
}

impl QueueConfig {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            ready: false,
            state: QueueState {
                size: max_size,
                descriptors: 0,
                available: 0,
                used: 0,
                next_available: 0,
                next_used: 0,
            },
        }
    }
}

/// The registers behind a transport. Plain data: it calls no device and makes no interrupt.
#[derive(Debug)]
pub struct Core {
    traits: Traits,
    status: u8,
    accepted: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    queues: [Option<QueueConfig>; MAX_QUEUES],
}

impl Core {
    /// The registers of a device after reset.
    pub fn new(traits: Traits) -> Self {
        let mut queues = [None; MAX_QUEUES];
        for (queue, &size) in queues.iter_mut().zip(traits.queue_sizes) {
            *queue = Some(QueueConfig::new(size));
        }
        Self {
            traits,
            status: 0,
            accepted: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues,
        }
    }

    /// Back to the state after reset.
    pub fn reset(&mut self) {
        *self = Self::new(self.traits);
    }

    /// The registers as plain data; of a device that runs with `running` queues.
    pub fn save(&self, running: &QueueStates) -> CoreState {
        let queues = self.queues.iter().zip(running);
        let queue = |(queue, running): (&Option<QueueConfig>, &Option<QueueState>)| {
            let queue = (*queue)?;
            Some((queue.ready, running.unwrap_or(queue.state)))
        };
        CoreState {
            status: self.status,
            accepted: self.accepted,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            queues: queues.filter_map(queue).collect(),
        }
    }

    /// Takes the registers of another device of the kind, as if its driver had written them in their order.
    ///
    /// # Errors
    /// When no driver could have done so; the registers are those after a reset then.
    pub fn restore(&mut self, state: &CoreState) -> Result<(), RestoreError> {
        self.reset();
        let expected = self.traits.queue_sizes.len();
        if state.queues.len() != expected {
            let found = state.queues.len();
            return Err(RestoreError::Queues { found, expected });
        }
        let early = status::ACKNOWLEDGE | status::DRIVER;
        self.write_status(state.status & early);
        self.accepted = state.accepted;
        self.write_status(state.status & (early | status::FEATURES_OK));
        for (queue, (ready, state)) in self.queues.iter_mut().flatten().zip(&state.queues) {
            // Checked when the device starts.
            (queue.ready, queue.state) = (*ready, *state);
        }
        self.write_status(state.status & !status::FAILED);
        if state.status & status::FAILED != 0 {
            self.write_status(status::FAILED);
        }
        if self.status != state.status {
            self.reset();
            let (status, features) = (state.status, state.accepted);
            return Err(RestoreError::Status { status, features });
        }
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        Ok(())
    }

    /// The device's type as its number in the spec.
    pub fn device_id(&self) -> u32 {
        self.traits.device_type as u32
    }

    /// The status register, without NEEDS_RESET, which the device side keeps.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The features that the driver accepted.
    pub fn accepted_features(&self) -> u64 {
        self.accepted
    }

    /// How many queues there are.
    pub fn queue_count(&self) -> u16 {
        self.traits.queue_sizes.len() as u16
    }

    /// Whether the device was started.
    pub fn is_started(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// Takes a write to the status register. Bits are set in the order of section 3.1.1 or not at
    /// all, and never cleared but by a reset; FEATURES_OK stays clear when the features are not
    /// acceptable, which is how the driver learns it.
    pub fn write_status(&mut self, value: u8) -> Transition {
        if value == 0 {
            return Transition::Reset;
        }
        self.status |= value & status::FAILED;
        if self.status & status::FAILED != 0 {
            return Transition::None;
        }
        let was_started = self.is_started();
        let order = [
            (status::ACKNOWLEDGE, 0),
            (status::DRIVER, status::ACKNOWLEDGE),
            (status::FEATURES_OK, status::DRIVER),
            (status::DRIVER_OK, status::FEATURES_OK),
        ];
        for (bit, before) in order {
            let acceptable = bit != status::FEATURES_OK || self.features_are_acceptable();
            if value & bit != 0 && self.status & before == before && acceptable {
                self.status |= bit;
            }
        }
        if self.is_started() && !was_started {
            Transition::Start
        } else {
            Transition::None
        }
    }

    fn offered(&self) -> u64 {
        self.traits.features | COMMON_FEATURES
    }

    fn features_are_acceptable(&self) -> bool {
        self.accepted & !self.offered() == 0 && self.accepted & VERSION_1 != 0
    }

    /// Chooses which 32 feature bits [`Core::device_features`] shows.
    pub fn select_device_features(&mut self, page: u32) {
        self.device_features_select = page;
    }

    /// What [`Core::select_device_features`] chose.
    pub fn device_features_select(&self) -> u32 {
        self.device_features_select
    }

    /// 32 of the features that the device offers.
    pub fn device_features(&self) -> u32 {
        match self.device_features_select {
            0 => self.offered() as u32,
            1 => (self.offered() >> 32) as u32,
            _ => 0,
        }
    }

    /// Chooses which 32 feature bits [`Core::accept_features`] sets.
    pub fn select_driver_features(&mut self, page: u32) {
        self.driver_features_select = page;
    }

    /// What [`Core::select_driver_features`] chose.
    pub fn driver_features_select(&self) -> u32 {
        self.driver_features_select
    }

    /// 32 of the features that the driver accepted.
    pub fn driver_features(&self) -> u32 {
        match self.driver_features_select {
            0 => self.accepted as u32,
            1 => (self.accepted >> 32) as u32,
            _ => 0,
        }
    }

    /// Sets 32 of the features that the driver accepts; too late after FEATURES_OK.
    pub fn accept_features(&mut self, bits: u32) {
        if self.status & status::DRIVER == 0 || self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_features_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(bits),
            1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(bits) << 32,
            _ => {}
        }
    }

    /// Chooses the queue that the queue registers are about.
    pub fn select_queue(&mut self, index: u32) {
        self.queue_select = index;
    }

    /// What [`Core::select_queue`] chose.
    pub fn queue_select(&self) -> u32 {
        self.queue_select
    }

    fn queue(&self) -> Option<&QueueConfig> {
        let index = usize::try_from(self.queue_select).ok()?;
        self.queues.get(index)?.as_ref()
    }

    /// The selected queue, if it may be configured now: after the features are agreed and before
    /// the device starts. A queue that changes under a running device was CVE-2026-5747 elsewhere.
    fn queue_to_configure(&mut self) -> Option<&mut QueueConfig> {
        if self.status & status::FEATURES_OK == 0
            || self.status & (status::DRIVER_OK | status::FAILED) != 0
        {
            return None;
        }
        let index = usize::try_from(self.queue_select).ok()?;
        self.queues.get_mut(index)?.as_mut()
    }

    /// Largest size of the selected queue; zero when there is no such queue.
    pub fn queue_max_size(&self) -> u16 {
        self.queue().map_or(0, |queue| queue.max_size)
    }

    /// Size of the selected queue as it is now.
    pub fn queue_size(&self) -> u16 {
        self.queue().map_or(0, |queue| queue.state.size)
    }

    /// An address of the selected queue.
    pub fn queue_address(&self, area: Area) -> u64 {
        self.queue().map_or(0, |queue| match area {
            Area::Descriptors => queue.state.descriptors,
            Area::Driver => queue.state.available,
            Area::Device => queue.state.used,
        })
    }

    /// Whether the selected queue is ready.
    pub fn queue_ready(&self) -> bool {
        self.queue().is_some_and(|queue| queue.ready)
    }

    /// Makes the selected queue ready, or not.
    pub fn set_queue_ready(&mut self, ready: bool) {
        if let Some(queue) = self.queue_to_configure() {
            queue.ready = ready;
        }
    }

    /// Sets the size of the selected queue. What it may be is checked when the device starts.
    pub fn set_queue_size(&mut self, size: u32) {
        if let Some(queue) = self.queue_to_configure()
            && !queue.ready
        {
            // A number too large becomes zero, which is as invalid.
            queue.state.size = u16::try_from(size).unwrap_or(0);
        }
    }

    /// Sets half an address of the selected queue. Where it may be is checked when the device
    /// starts.
    pub fn set_queue_address(&mut self, area: Area, half: Half, bits: u32) {
        if let Some(queue) = self.queue_to_configure()
            && !queue.ready
        {
            let address = match area {
                Area::Descriptors => &mut queue.state.descriptors,
                Area::Driver => &mut queue.state.available,
                Area::Device => &mut queue.state.used,
            };
            *address = match half {
                Half::Low => *address & !0xffff_ffff | u64::from(bits),
                Half::High => *address & 0xffff_ffff | u64::from(bits) << 32,
            };
        }
    }

    /// The queues that the driver made ready.
    pub fn queue_states(&self) -> QueueStates {
        let mut states = QueueStates::default();
        for (state, queue) in states.iter_mut().zip(&self.queues) {
            *state = queue.filter(|queue| queue.ready).map(|queue| queue.state);
        }
        states
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::device::DeviceType;

    fn core() -> Core {
        Core::new(Traits {
            device_type: DeviceType::Block,
            features: 1 << 5,
            queue_sizes: &[8, 16],
        })
    }

    fn agreed() -> Core {
        let mut core = core();
        assert_eq!(core.write_status(1), Transition::None);
        assert_eq!(core.write_status(3), Transition::None);
        core.select_driver_features(1);
        core.accept_features(1);
        assert_eq!(core.write_status(11), Transition::None);
        assert_eq!(core.status(), 11);
        core
    }

    #[test]
    fn status_bits_come_in_order() {
        for early in [2, 4, 8, 6, 12, 14, 64] {
            let mut core = core();
            assert_eq!(core.write_status(early), Transition::None);
            assert_eq!(core.status(), 0, "after {early}");
        }
        let mut core = agreed();
        assert_eq!(core.write_status(15), Transition::Start);
        assert_eq!(core.write_status(15), Transition::None);
        assert_eq!(core.write_status(1), Transition::None);
        assert_eq!(core.status(), 15, "bits are not cleared");
        assert_eq!(core.write_status(0), Transition::Reset);
    }

    #[test]
    fn a_failed_driver_starts_nothing() {
        let mut core = agreed();
        assert_eq!(core.write_status(128 | 15), Transition::None);
        assert_eq!(core.status(), 128 | 11);
        assert_eq!(core.write_status(15), Transition::None);
    }

    #[test]
    fn features_must_be_offered_and_version_1() {
        for (low, high) in [(0, 0), (1 << 5, 0), (1 << 6, 1), (0, 1 | 1 << 31)] {
            let mut core = core();
            core.write_status(3);
            core.accept_features(low);
            core.select_driver_features(1);
            core.accept_features(high);
            core.select_driver_features(2);
            core.accept_features(u32::MAX);
            core.write_status(11);
            assert_eq!(core.status(), 3, "{low:#x} {high:#x}");
        }
        let mut core = agreed();
        core.select_driver_features(0);
        core.accept_features(1 << 5);
        assert_eq!(core.accepted_features(), VERSION_1, "frozen once agreed");
    }

    #[test]
    fn queues_freeze_when_the_device_starts() {
        let mut early = core();
        early.set_queue_size(4);
        early.set_queue_ready(true);
        assert_eq!(early.queue_states(), QueueStates::default());

        let mut core = agreed();
        core.select_queue(1);
        assert_eq!(core.queue_max_size(), 16);
        core.set_queue_size(4);
        core.set_queue_address(Area::Device, Half::High, 1);
        core.set_queue_address(Area::Device, Half::Low, 0x1000);
        core.set_queue_ready(true);
        core.set_queue_size(8);
        let before = core.queue_states();
        let state = before[1].unwrap();
        assert_eq!((state.size, state.used), (4, 0x1_0000_1000));
        core.write_status(15);
        core.set_queue_ready(false);
        core.set_queue_size(16);
        core.set_queue_address(Area::Driver, Half::Low, 0x2000);
        assert_eq!(core.queue_states(), before);
        core.reset();
        assert_eq!(core.queue_states(), QueueStates::default());
    }

    #[test]
    fn queues_that_do_not_exist_do_nothing() {
        for index in [2, 3, u32::MAX] {
            let mut core = agreed();
            core.select_queue(index);
            core.set_queue_size(4);
            core.set_queue_ready(true);
            core.set_queue_address(Area::Driver, Half::Low, 0x2000);
            assert_eq!(core.queue_max_size(), 0);
            assert!(!core.queue_ready());
            assert_eq!(core.queue_states(), QueueStates::default());
        }
    }

    #[test]
    fn registers_go_to_another_device() {
        let mut core = agreed();
        core.select_queue(1);
        core.set_queue_size(4);
        core.set_queue_address(Area::Device, Half::Low, 0x1000);
        core.set_queue_ready(true);
        core.write_status(15);
        let mut running = core.queue_states();
        running[1].as_mut().unwrap().next_used = 7;
        let saved = core.save(&running);
        let text = serde_json::to_string(&saved).unwrap();
        let saved: CoreState = serde_json::from_str(&text).unwrap();
        let mut other = self::core();
        other.restore(&saved).unwrap();
        assert!(other.is_started());
        assert_eq!(other.queue_states(), running);
        assert_eq!(other.accepted_features(), VERSION_1);
        assert_eq!(other.queue_size(), 4, "the queue is selected");
        core.write_status(128);
        let failed = core.save(&running);
        other.restore(&failed).unwrap();
        assert_eq!(other.status(), 128 | 15);
    }

    #[test]
    fn what_no_driver_could_have_written_is_refused() {
        let mut core = agreed();
        core.write_status(15);
        let mut saved = core.save(&QueueStates::default());
        let mut refused = |change: fn(&mut CoreState)| {
            let before = serde_json::to_string(&saved).unwrap();
            change(&mut saved);
            let mut other = self::core();
            let error = other.restore(&saved).unwrap_err();
            assert_eq!((other.status(), other.accepted_features()), (0, 0));
            saved = serde_json::from_str(&before).unwrap();
            error
        };
        for change in [
            (|saved| saved.status = 12) as fn(&mut CoreState),
            |saved| saved.status = 64 | 15,
            |saved| saved.accepted |= 1 << 6,
            |saved| saved.accepted = 0,
        ] {
            assert!(matches!(refused(change), RestoreError::Status { .. }));
        }
        let short = refused(|saved| saved.queues.truncate(1));
        assert_eq!(
            short,
            RestoreError::Queues {
                found: 1,
                expected: 2
            }
        );
    }

    #[test]
    fn a_size_beyond_16_bits_is_not_truncated() {
        let mut core = agreed();
        core.set_queue_size(0x1_0008);
        core.set_queue_ready(true);
        assert_eq!(core.queue_states()[0].unwrap().size, 0);
    }
}

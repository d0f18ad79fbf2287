//! Free-page hinting (virtio 1.2, section 5.5.6.4): on the host's command the guest lists pages that
//! it does not use at the moment.
//!
//! A run has a number, which the device shows in its configuration and the driver repeats before the
//! pages of that run. The driver ends with [`STOP`] and holds on to the pages until the device
//! says [`DONE`].

use std::sync::Arc;

use crate::virtio::config_space::ConfigSpace;
use crate::virtio::queue::Signal;

/// No run is wanted; or, from the driver: that was all.
pub const STOP: u32 = 0;
/// The driver may have its pages back.
pub const DONE: u32 = 1;
/// The smallest number of a run.
const FIRST: u32 = 2;
/// Of `free_page_hint_cmd_id` in the configuration space.
const COMMAND_OFFSET: usize = 8;

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The last command to the driver: the number of a run, [`STOP`] or [`DONE`].
    pub host_cmd: u32,
    /// The last one that the driver repeated, or [`STOP`] at the end of a run.
    pub guest_cmd: Option<u32>,
}

/// The commands of either side.
#[derive(Debug)]
pub struct Hinting {
    config: Arc<ConfigSpace>,
    status: Status,
    last_run: u32,
    acknowledge_on_stop: bool,
}

impl Hinting {
    /// Without a run. Commands are shown in `config`.
    pub fn new(config: Arc<ConfigSpace>) -> Self {
        Self {
            config,
            status: Status {
                host_cmd: STOP,
                guest_cmd: None,
            },
            last_run: DONE,
            acknowledge_on_stop: false,
        }
    }

    /// Where the run stands.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Asks for a new run. With `acknowledge_on_stop` the driver gets its pages back at its end.
    pub fn start(&mut self, acknowledge_on_stop: bool, signal: &dyn Signal) {
        // 0 and 1 mean something else.
        self.last_run = self.last_run.checked_add(1).unwrap_or(FIRST);
        self.acknowledge_on_stop = acknowledge_on_stop;
        self.command(self.last_run, signal);
    }

    /// Ends the run: the driver gets its pages back.
    pub fn done(&mut self, signal: &dyn Signal) {
        self.command(DONE, signal);
    }

    /// The driver is gone, or a new one comes: no run is going on.
    pub fn reset(&mut self) {
        self.set(STOP);
        self.status.guest_cmd = None;
    }

    /// Takes a command of the driver.
    pub fn take(&mut self, command: u32, signal: &dyn Signal) {
        // The end of an older run is no news.
        let ended = self.accepts_pages() && matches!(command, STOP | DONE);
        self.status.guest_cmd = Some(command);
        if ended && self.acknowledge_on_stop {
            self.done(signal);
        }
    }

    /// Whether pages that come now are those of the run that the host asked for: only then are they
    /// still unused.
    pub fn accepts_pages(&self) -> bool {
        let Status {
            host_cmd,
            guest_cmd,
        } = self.status;
        host_cmd >= FIRST && guest_cmd == Some(host_cmd)
    }

    fn command(&mut self, command: u32, signal: &dyn Signal) {
        self.set(command);
        signal.config_changed();
    }

    fn set(&mut self, command: u32) {
        self.status.host_cmd = command;
        self.config.set(COMMAND_OFFSET, &command.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Counter;

    #[test]
    fn runs_have_numbers_that_mean_nothing_else() {
        let config = ConfigSpace::new(vec![0; 12]);
        let mut hinting = Hinting::new(Arc::clone(&config));
        let signal = Counter::default();
        hinting.start(true, &signal);
        assert_eq!((config.u32_at(8), hinting.status.host_cmd), (2, 2));
        hinting.last_run = u32::MAX - 1;
        hinting.start(true, &signal);
        assert_eq!(hinting.status.host_cmd, u32::MAX);
        hinting.start(true, &signal);
        assert_eq!(hinting.status.host_cmd, 2);
    }

    #[test]
    fn pages_count_only_within_the_run_that_was_asked_for() {
        let mut hinting = Hinting::new(ConfigSpace::new(vec![0; 12]));
        let signal = Counter::default();
        hinting.take(0, &signal);
        assert!(!hinting.accepts_pages(), "stop and stop are no run");
        hinting.start(false, &signal);
        assert!(!hinting.accepts_pages(), "not begun");
        hinting.take(2, &signal);
        assert!(hinting.accepts_pages());
        hinting.start(false, &signal);
        assert!(!hinting.accepts_pages(), "the run before");
        hinting.take(3, &signal);
        hinting.take(STOP, &signal);
        assert!(!hinting.accepts_pages());
        assert_eq!(hinting.status.host_cmd, 3, "the guest holds its pages");
        hinting.done(&signal);
        hinting.take(DONE, &signal);
        assert!(!hinting.accepts_pages(), "done and done are no run");
    }

    #[test]
    fn the_end_is_acknowledged_where_wanted() {
        let mut hinting = Hinting::new(ConfigSpace::new(vec![0; 12]));
        let signal = Counter::default();
        hinting.start(true, &signal);
        hinting.take(2, &signal);
        hinting.start(true, &signal);
        hinting.take(STOP, &signal);
        assert_eq!(hinting.status().host_cmd, 3, "that was the run before");
        hinting.take(3, &signal);
        hinting.take(STOP, &signal);
        let expected = Status {
            host_cmd: DONE,
            guest_cmd: Some(STOP),
        };
        assert_eq!(hinting.status(), expected);
    }
}

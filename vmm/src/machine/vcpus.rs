//! The machine's vCPU threads: which of them run.
//!
//! All that there can ever be are started, sealed and paused before the guest's first instruction. A vCPU
//! that is added runs from then on: KVM lets it wait for the guest's start-up interrupt. One that the guest
//! has let go is paused. Its state stays as it is, halted by the guest; an INIT finds it when it is added
//! again. KVM made all of them together, so that their time stamp counters agree.

use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::devices::VcpuRegisters;
use crate::devices::vcpus::{self, CountError, VcpuSet};
use crate::vcpu::VcpuThread;

/// Why the number of vCPUs was not changed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// The machine was started without.
    #[error(
        "the number of vCPUs of this machine is fixed: start it with `machine-config.max_vcpu_count`"
    )]
    Fixed,
    /// Too many, or none.
    #[error(transparent)]
    Count(#[from] CountError),
}

/// What is commanded: a vCPU thread.
trait Command {
    fn resume(&self);
    fn pause(&self);
}

impl Command for Arc<VcpuThread> {
    fn resume(&self) {
        VcpuThread::resume(self);
    }

    fn pause(&self) {
        VcpuThread::pause(self);
    }
}

/// The vCPU threads, by their number.
pub(super) struct Vcpus<T = Arc<VcpuThread>> {
    threads: Vec<T>,
    /// None when they are always the same.
    registers: Option<Arc<VcpuRegisters>>,
    running: VcpuSet,
    /// Whether the machine as a whole runs.
    resumed: bool,
}

#[allow(private_bounds, reason = "a seam for tests, of no use elsewhere")]
impl<T: Command> Vcpus<T> {
    /// Paused threads.
    pub(super) fn new(threads: Vec<T>, registers: Option<Arc<VcpuRegisters>>) -> Self {
        Self {
            threads,
            registers,
            running: 0,
            resumed: false,
        }
    }

    /// Runs those that are present.
    pub(super) fn resume(&mut self) {
        self.resumed = true;
        self.settle();
    }

    /// Runs none.
    pub(super) fn pause(&mut self) {
        self.resumed = false;
        self.settle();
    }

    /// See [`VcpuRegisters::set_count`].
    pub(super) fn set_count(&mut self, count: u8) -> Result<(), Error> {
        let registers = self.registers.as_ref().ok_or(Error::Fixed)?;
        registers.set_count(count)?;
        self.settle();
        Ok(())
    }

    /// Which ones there are.
    pub(super) fn present(&self) -> VcpuSet {
        match &self.registers {
            Some(registers) => registers.present(),
            None => vcpus::first(u8::try_from(self.threads.len()).unwrap_or(u8::MAX)),
        }
    }

    /// Starts and stops threads until those run that should.
    pub(super) fn settle(&mut self) {
        let wanted = if self.resumed { self.present() } else { 0 };
        let bits = (0..).map(|id| 1_u32.checked_shl(id).unwrap_or(0));
        for (thread, bit) in self.threads.iter().zip(bits) {
            match (wanted & bit != 0, self.running & bit != 0) {
                (true, false) => thread.resume(),
                (false, true) => thread.pause(),
                _ => {}
            }
        }
        self.running = wanted;
    }
}

impl Vcpus {
    /// Waits until none runs any more after [`Vcpus::pause`]; else which one still does.
    pub(super) fn wait_until_paused(&self, patience: Duration) -> Result<(), usize> {
        let end = Instant::now().checked_add(patience);
        let left = || {
            end.map_or(patience, |end| {
                end.saturating_duration_since(Instant::now())
            })
        };
        let late = |thread: &Arc<VcpuThread>| !thread.wait_until_paused(left());
        match self.threads.iter().position(late) {
            Some(id) => Err(id),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::BusDevice as _;
    use crate::devices::AcpiRegisters;
    use crate::ending::EndSignal;
    use std::cell::RefCell;
    use std::rc::Rc;

    type Log = Rc<RefCell<Vec<String>>>;

    struct Thread(usize, Log);

    impl Command for Thread {
        fn resume(&self) {
            self.1.borrow_mut().push(format!("+{}", self.0));
        }
        fn pause(&self) {
            self.1.borrow_mut().push(format!("-{}", self.0));
        }
    }

    fn machine(count: u8, most: usize, hotplug: bool) -> (Vcpus<Thread>, impl Fn() -> String) {
        let ends = Arc::new(EndSignal::new().unwrap());
        let events = Arc::new(AcpiRegisters::new(ends).unwrap());
        let registers = VcpuRegisters::new(count, most as u8, events).unwrap();
        let log = Log::default();
        let threads = (0..most).map(|id| Thread(id, log.clone())).collect();
        let registers = hotplug.then(|| Arc::new(registers));
        let said = move || std::mem::take(&mut *log.borrow_mut()).join(" ");
        (Vcpus::new(threads, registers), said)
    }

    #[test]
    fn only_present_vcpus_run() {
        let (mut vcpus, said) = machine(1, 4, true);
        assert_eq!(said(), "");
        vcpus.resume();
        assert_eq!(said(), "+0");
        vcpus.set_count(3).unwrap();
        assert_eq!(said(), "+1 +2");
        vcpus.pause();
        assert_eq!(said(), "-0 -1 -2");
        // Added while the machine is paused: it runs with the others.
        vcpus.set_count(4).unwrap();
        assert_eq!(said(), "");
        vcpus.resume();
        assert_eq!(said(), "+0 +1 +2 +3");
    }

    #[test]
    fn a_vcpu_runs_until_the_guest_lets_it_go() {
        let (mut vcpus, said) = machine(4, 4, true);
        vcpus.resume();
        said();
        vcpus.set_count(2).unwrap();
        assert_eq!(said(), "");
        let registers = vcpus.registers.clone().unwrap();
        registers.write(12, &0b1000_u32.to_le_bytes());
        vcpus.settle();
        vcpus.settle();
        assert_eq!((said().as_str(), vcpus.present()), ("-3", 0b0111));
        registers.write(12, &u32::MAX.to_le_bytes());
        vcpus.set_count(2).unwrap();
        assert_eq!(said(), "-2");
        assert_eq!(vcpus.present(), 0b0011);
    }

    #[test]
    fn a_machine_may_have_a_fixed_number() {
        let (mut vcpus, said) = machine(2, 2, false);
        vcpus.resume();
        assert_eq!(said(), "+0 +1");
        assert_eq!(vcpus.set_count(1), Err(Error::Fixed));
        assert_eq!((said().as_str(), vcpus.present()), ("", 0b11));
        let (mut vcpus, _) = machine(1, 2, true);
        let error = vcpus.set_count(3).unwrap_err().to_string();
        assert!(error.contains("1 to 2"), "{error}");
    }
}

//! What the process takes of the host.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use super::PATIENCE;

/// How much longer the process may hold more than it did at first.
const MORE_DESCRIPTORS: usize = 128;
const MORE_KIB: u64 = 16 << 10;
/// How long it is looked at, and how much of a processor it may take meanwhile.
const REST: Duration = Duration::from_millis(200);
const STIRRING: Duration = Duration::from_millis(5);

/// Open descriptors, and memory that is nobody else's.
#[derive(Debug)]
pub struct Footprint {
    descriptors: usize,
    anonymous_kib: u64,
}

impl Footprint {
    /// That of this process now.
    pub fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.unwrap().trim_end_matches("kB").trim();
        Self {
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            anonymous_kib: kib.parse().unwrap(),
        }
    }

    /// Fails if the process has grown since `first`.
    pub fn has_not_grown_since(&self, first: &Self) {
        println!("{first:?}, {self:?}");
        assert!(self.descriptors <= first.descriptors + MORE_DESCRIPTORS);
        assert!(self.anonymous_kib <= first.anonymous_kib + MORE_KIB);
    }
}

/// Waits until the process has nothing to do, though nobody tells it to stop: no thread of it spins. What counts is the
/// time of processors that it takes, of which others on a busy host do not give it more.
pub fn rests() {
    let began = Instant::now();
    loop {
        let before = spent();
        std::thread::sleep(REST);
        let taken = spent() - before;
        if taken < STIRRING {
            println!("{taken:?} in {REST:?} at rest");
            return;
        }
        assert!(
            began.elapsed() < PATIENCE,
            "a thread spins: {taken:?} in {REST:?}"
        );
    }
}

/// What all threads of this process have taken of processors, those of the kernel that work for it included.
fn spent() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .unwrap()
        .into()
}

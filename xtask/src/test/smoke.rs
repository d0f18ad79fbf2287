//! Tasks of xtask itself, run as a person runs them.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::tally::Tally;
use crate::workspace::say;

/// Far more than any of them takes, also with a guest in the lab.
const BOUND: Duration = Duration::from_secs(300);

/// A task, as one test.
pub struct Smoke {
    name: &'static str,
    words: &'static [&'static str],
    code: i32,
}

/// What is promised first: a program in a microVM, and its exit code.
pub const DEMO: Smoke = Smoke {
    name: "demo_exits_with_the_scripts_code",
    words: &["demo", "--", "exit 7"],
    code: 7,
};

/// A benchmark that fails shows no figures; what these say is nothing after two rounds.
pub const BENCH: Smoke = Smoke {
    name: "bench_start_measures_all_contestants",
    words: &["bench", "start", "--runs", "2"],
    code: 0,
};

/// The same.
pub const BENCH_SNAPSHOT: Smoke = Smoke {
    name: "bench_snapshot_measures_all_subjects",
    words: &["bench", "snapshot", "--rounds", "1", "--clones", "3"],
    code: 0,
};

impl Smoke {
    /// Runs it, if `filter` does not leave it out.
    ///
    /// # Errors
    /// When this very program cannot be run.
    pub fn run(&self, filter: Option<&str>) -> Result<Tally> {
        let mut tally = Tally::default();
        if filter.is_some_and(|filter| !self.name.contains(filter)) {
            return Ok(tally);
        }
        say(format_args!("xtask {}", self.words.join(" ")));
        // By this name also when building the tests has put another program in this one's place.
        let mut child = Command::new("/proc/self/exe")
            .args(self.words)
            .stdin(Stdio::null())
            .spawn()
            .context("run xtask")?;
        let end = Instant::now() + BOUND;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() > end {
                // Its lab goes with it.
                child.kill()?;
                break child.wait()?;
            }
            thread::sleep(Duration::from_millis(50));
        };
        if status.code() == Some(self.code) {
            println!("test {} ... ok", self.name);
            tally.passed += 1;
        } else {
            println!("test {} ... FAILED", self.name);
            let (name, wanted) = (self.name, self.code);
            tally.problem(format!(
                "test {name} failed: {status}, not exit code {wanted}"
            ));
        }
        Ok(tally)
    }
}

//! Counts what test programs print, and shows it as it comes.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// What happened in a tier.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Tally {
    /// Tests that passed.
    pub passed: usize,
    /// Tests that failed; tests that never reported; things that could not run at all.
    pub failed: usize,
    /// Tests that only `--full` runs.
    pub skipped: usize,
    /// What went wrong, one line each.
    pub problems: Vec<String>,
}

impl Tally {
    /// Adds another's counts.
    pub fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.problems.extend(other.problems);
    }

    /// Notes something that failed without being a test.
    pub fn problem(&mut self, what: impl Into<String>) {
        self.failed += 1;
        self.problems.push(what.into());
    }

    /// Takes in one line of libtest's: `test NAME ... ok`, `FAILED`, or `ignored, why`.
    fn line(&mut self, line: &str) {
        let Some((name, result)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.rsplit_once(" ... "))
        else {
            return;
        };
        match result.split([' ', ',']).next() {
            Some("ok") => self.passed += 1,
            Some("ignored") => self.skipped += 1,
            Some("FAILED") => {
                self.failed += 1;
                self.problems.push(format!("test {name} failed"));
            }
            _ => {}
        }
    }

    /// Replaces the counts of one program by its own, `test result: ok. 3 passed; 0 failed; …`:
    /// what a test's children print can tear the lines above apart.
    fn result(&mut self, line: &str) -> bool {
        let Some(counts) = line.strip_prefix("test result: ") else {
            return false;
        };
        let count = |what: &str| {
            let before = counts
                .split(';')
                .find_map(|part| part.trim().strip_suffix(what))?;
            before
                .rsplit(' ')
                .find(|word| !word.is_empty())?
                .parse()
                .ok()
        };
        if let (Some(passed), Some(failed), Some(skipped)) =
            (count(" passed"), count(" failed"), count(" ignored"))
        {
            (self.passed, self.failed, self.skipped) = (passed, failed, skipped);
        }
        true
    }

    /// How many tests have reported.
    pub fn reported(&self) -> usize {
        self.passed + self.failed + self.skipped
    }
}

/// A writer for a test program's output: shows whole lines, each after `prefix`, and counts.
#[derive(Clone)]
pub struct Counter {
    prefix: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Of the programs that have ended.
    done: Tally,
    /// Of the one that runs.
    current: Tally,
    /// The beginning of a line.
    pending: Vec<u8>,
}

impl Counter {
    /// A counter at zero.
    pub fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
            state: Arc::default(),
        }
    }

    /// What was counted.
    pub fn tally(&self) -> Tally {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = state.done.clone();
        all.add(state.current.clone());
        all
    }
}

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.pending.extend_from_slice(bytes);
        while let Some(end) = state.pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = state.pending.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if state.current.result(line.trim_end()) {
                let current = std::mem::take(&mut state.current);
                state.done.add(current);
            } else {
                state.current.line(line.trim_end());
            }
            // By the macro, so that the tests of this very file show nothing.
            if self.prefix.is_empty() || !line.trim().is_empty() {
                print!("{}{line}", self.prefix);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_and_failures_named() {
        let mut counter = Counter::new("");
        let output =
            b"\nrunning 4 tests\ntest a::b ... ok\ntest c ... FAILED\ntest d ... ignored, full\n\
            test with ... in it ... ok\ntest src/lib.rs - x (line 3) ... ok\n";
        // In pieces, as a pipe delivers them.
        for piece in output.chunks(7) {
            counter.write_all(piece).unwrap();
        }
        let tally = counter.tally();
        assert_eq!((tally.passed, tally.failed, tally.skipped), (3, 1, 1));
        assert_eq!(tally.problems, ["test c failed"]);
    }

    #[test]
    fn talk_is_not_counted() {
        let mut counter = Counter::new("");
        counter
            .write_all(b"test of something ... maybe\nok\n")
            .unwrap();
        assert_eq!(counter.tally().reported(), 0);
    }

    #[test]
    fn a_programs_own_count_is_believed() {
        let mut counter = Counter::new("");
        for _ in 0..2 {
            counter
                .write_all(
                    b"test a ... noise of a child\nok\ntest b ... FAILED\n\ntest result: FAILED. \
                      1 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.01s\n",
                )
                .unwrap();
        }
        let tally = counter.tally();
        assert_eq!((tally.passed, tally.failed, tally.skipped), (2, 2, 4));
    }
}

//! One start, timed from outside; the memory of one that idles; and what many numbers say.

use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The times of one start, from just before the process is made.
#[derive(Clone, Copy)]
pub struct Times {
    /// To the first word that the guest wrote to its console.
    pub first_output: Duration,
    /// To the process's end, collected by its parent.
    pub reaped: Duration,
}

/// Starts `command` and waits for its end.
///
/// The standard library uses `posix_spawn` here and times by `clock_gettime(CLOCK_MONOTONIC)`.
///
/// # Errors
/// When it cannot be started, or the guest does not say `expected`.
pub fn time_start(command: &mut Command, expected: &str) -> Result<Times> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("run {command:?}"))?;
    let mut stdout = child.stdout.take().context("no pipe")?;
    let mut output = Vec::new();
    let mut first_output = None;
    let mut chunk = [0; 4096];
    loop {
        let length = stdout.read(&mut chunk)?;
        if length == 0 {
            break;
        }
        output.extend_from_slice(chunk.get(..length).unwrap_or_default());
        // A program may say something itself before its guest does.
        if first_output.is_none() && contains(&output, GUEST) {
            first_output = Some(start.elapsed());
        }
    }
    let status = child.wait()?;
    let reaped = start.elapsed();
    if !String::from_utf8_lossy(&output).contains(expected) {
        let mut said = String::new();
        child
            .stderr
            .take()
            .context("no pipe")?
            .read_to_string(&mut said)?;
        bail!(
            "{command:?} ended with {status} and no `{expected}`: {}",
            said.trim()
        );
    }
    Ok(Times {
        first_output: first_output.context("the guest said nothing")?,
        reaped,
    })
}

/// What a line of the probe begins with, and no line of a contestant's own.
const GUEST: &[u8] = b"probe";

fn contains(bytes: &[u8], words: &[u8]) -> bool {
    bytes.windows(words.len()).any(|window| window == words)
}

/// What an idle machine's process holds, in KiB.
#[derive(Clone, Copy)]
pub struct Memory {
    /// Resident set, guest memory included (`Rss` of `smaps_rollup`).
    pub resident: u64,
    /// The part that is its own and written to.
    pub private_dirty: u64,
}

/// Starts `command` and measures the process when the guest has said `expected`.
///
/// # Errors
/// When it does not start, or does not say it within ten seconds.
pub fn idle_memory(command: &mut Command, expected: &str) -> Result<Memory> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = Ended(
        command
            .spawn()
            .with_context(|| format!("run {command:?}"))?,
    );
    let mut stdout = child.0.stdout.take().context("no pipe")?;
    let mut output = Vec::new();
    while !String::from_utf8_lossy(&output).contains(expected) {
        let mut byte = [0];
        if stdout.read(&mut byte)? == 0 {
            bail!("{command:?} ended without `{expected}`");
        }
        output.extend_from_slice(&byte);
    }
    // What the guest's last exit set off should be over.
    std::thread::sleep(Duration::from_millis(200));
    let path = format!("/proc/{}/smaps_rollup", child.0.id());
    Ok(Memory {
        resident: field(&path, "Rss")?,
        private_dirty: field(&path, "Private_Dirty")?,
    })
}

/// The field `name` of a file of the kernel's that counts in KiB.
///
/// # Errors
/// When it cannot be read, or has no such field.
pub fn field(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok());
    number.with_context(|| format!("no {name} in {path}"))
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The value that `percent` of the values do not exceed (nearest rank).
pub fn percentile(values: &mut [Duration], percent: usize) -> Duration {
    values.sort_unstable();
    let rank = (values.len() * percent).div_ceil(100).max(1);
    values.get(rank - 1).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let mut values: Vec<_> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile(&mut values, 50), Duration::from_millis(50));
        assert_eq!(percentile(&mut values, 90), Duration::from_millis(90));
        assert_eq!(percentile(&mut values[..1], 90), Duration::from_millis(1));
        assert_eq!(percentile(&mut [], 50), Duration::ZERO);
    }
}

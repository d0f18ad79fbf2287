//! A program under test: its output read as it comes, every wait bounded, and ended when dropped.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use casemate_broker::exit;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longest wait for anything in a test. Generous: a test that meets it has failed.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Output beyond this is a bug of the program under test.
const MAX_OUTPUT: u64 = 16 << 20;

#[derive(Default)]
struct Output {
    text: Mutex<(String, bool)>,
    grew: Condvar,
}

/// A started program.
pub struct Running {
    child: Child,
    /// Why the test's directory lives as long as the program: its disks and sockets are there.
    _keep: Option<tempfile::TempDir>,
    stdout: Arc<Output>,
    stderr: Arc<Output>,
    readers: Vec<JoinHandle<()>>,
}

/// What a program left.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code; 128 + the signal that ended it.
    pub code: u8,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Finished {
    /// Asserts that standard output has exactly this line.
    #[track_caller]
    pub fn assert_line(&self, line: &str) {
        assert!(
            self.stdout.lines().any(|found| found.trim_end() == line),
            "no line `{line}` in: {self:#?}"
        );
    }

    /// Asserts that the program refused: `code`, one line on standard error, which says `words`.
    #[track_caller]
    pub fn assert_refused(&self, code: u8, words: &[&str]) {
        assert_eq!(self.code, code, "{self:#?}");
        let said = self.stderr.trim_end();
        assert_eq!(said.lines().count(), 1, "not one line: {self:#?}");
        for word in words {
            assert!(said.contains(word), "`{word}` not in: {said}");
        }
    }
}

/// Memory of the host that the process `pid` takes, in MiB.
pub fn resident_mib(pid: Pid) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kib: u64 = kib.context("no VmRSS")?.trim().parse()?;
    Ok(kib / 1024)
}

fn read_all(source: impl Read, output: &Output) {
    let mut source = BufReader::new(source.take(MAX_OUTPUT));
    let mut line = Vec::new();
    // Byte-wise up to a newline, so that a prompt without one is the only thing seen late.
    while matches!(source.read_until(b'\n', &mut line), Ok(n) if n > 0) {
        if let Ok(mut text) = output.text.lock() {
            text.0.push_str(&String::from_utf8_lossy(&line));
        }
        output.grew.notify_all();
        line.clear();
    }
    if let Ok(mut text) = output.text.lock() {
        text.1 = true;
    }
    output.grew.notify_all();
}

impl Running {
    /// Starts `command` with its output captured and its input from a pipe.
    pub fn start(command: Command, keep: Option<tempfile::TempDir>) -> Result<Self> {
        Self::start_with_input(command, Stdio::piped(), keep)
    }

    /// The same, with its input from `input`.
    pub fn start_with_input(
        mut command: Command,
        input: Stdio,
        keep: Option<tempfile::TempDir>,
    ) -> Result<Self> {
        command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        let (stdout, stderr) = (Arc::new(Output::default()), Arc::new(Output::default()));
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            let output = stdout.clone();
            readers.push(std::thread::spawn(move || read_all(pipe, &output)));
        }
        if let Some(pipe) = child.stderr.take() {
            let output = stderr.clone();
            readers.push(std::thread::spawn(move || read_all(pipe, &output)));
        }
        Ok(Self {
            child,
            _keep: keep,
            stdout,
            stderr,
            readers,
        })
    }

    /// The program's process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// The process id of the VMM that it runs, once that has vCPUs: of the jailer's child, or its own where it is the VMM
    /// itself, which may have a broker for a child.
    pub fn vmm_pid(&self) -> Result<u32> {
        let own = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{own}/task/{own}/children"))?;
        let children = children.split_whitespace().map(str::parse);
        for candidate in std::iter::once(Ok(own)).chain(children) {
            let pid = candidate?;
            for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
                let name = std::fs::read_to_string(thread?.path().join("comm"));
                if name.is_ok_and(|name| name.starts_with("vcpu")) {
                    return Ok(pid);
                }
            }
        }
        bail!("no process below {own} has a vCPU")
    }

    /// Whether the VMM has the file mapped.
    pub fn has_mapped(&self, path: &Path) -> Result<bool> {
        let vmm = self.vmm_pid()?;
        let maps = std::fs::read_to_string(format!("/proc/{vmm}/maps"))?;
        // By its inode: a jailed process's paths are not ours.
        let inode = std::fs::metadata(path)?.ino().to_string();
        let mut inodes = maps.lines().map(|line| line.split_whitespace().nth(4));
        Ok(inodes.any(|found| found == Some(&inode)))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("sending {signal}"))
    }

    /// Writes to its standard input.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self
            .child
            .stdin
            .as_mut()
            .context("standard input is closed")?;
        stdin.write_all(bytes)?;
        stdin.flush()?;
        Ok(())
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.child.stdin = None;
    }

    /// Waits for a line of standard output that contains `words`, and returns it.
    pub fn wait_for_line(&self, words: &str) -> Result<String> {
        self.wait_in(&self.stdout, words)
    }

    /// Waits for a line of standard error that contains `words`, and returns it.
    pub fn wait_for_error_line(&self, words: &str) -> Result<String> {
        self.wait_in(&self.stderr, words)
    }

    fn wait_in(&self, output: &Output, words: &str) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut text = output.text.lock().ok().context("a reader panicked")?;
        loop {
            if let Some(line) = text.0.lines().find(|line| line.contains(words)) {
                return Ok(line.to_owned());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if text.1 || left.is_zero() {
                let why = if text.1 {
                    "the program ended"
                } else {
                    "timed out"
                };
                let (seen, errors) = (text.0.clone(), self.stderr_so_far(output));
                bail!("no line with `{words}`: {why}; seen: {seen}\n{errors}");
            }
            text = output
                .grew
                .wait_timeout(text, left)
                .ok()
                .context("a reader panicked")?
                .0;
        }
    }

    fn stderr_so_far(&self, locked: &Output) -> String {
        if std::ptr::eq(locked, &*self.stderr) {
            return String::new();
        }
        self.stderr
            .text
            .lock()
            .map(|text| text.0.clone())
            .unwrap_or_default()
    }

    /// What it has said so far, all of it if it has just ended: for the message of a test that fails.
    pub fn said(&self) -> String {
        let of = |output: &Output| {
            let Ok(text) = output.text.lock() else {
                return String::new();
            };
            let ended = |text: &mut (String, bool)| !text.1;
            let second = Duration::from_secs(1);
            let waited = output.grew.wait_timeout_while(text, second, ended);
            waited.map_or_else(|_| String::new(), |(text, _)| text.0.clone())
        };
        format!("{}\n{}", of(&self.stdout), of(&self.stderr))
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Result<Finished> {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                bail!(
                    "it did not end; output: {:?}; errors: {:?}",
                    self.stdout
                        .text
                        .lock()
                        .map(|text| text.0.clone())
                        .unwrap_or_default(),
                    self.stderr
                        .text
                        .lock()
                        .map(|text| text.0.clone())
                        .unwrap_or_default()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        let take = |output: &Output| {
            output
                .text
                .lock()
                .map(|mut text| std::mem::take(&mut text.0))
                .unwrap_or_default()
        };
        Ok(Finished {
            code: code(status),
            stdout: take(&self.stdout),
            stderr: take(&self.stderr),
        })
    }
}

fn code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => exit::by_signal(signal),
        (None, None) => u8::MAX,
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

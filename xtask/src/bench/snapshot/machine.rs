//! A VMM with its API: one that boots the probe and is saved, or one that goes on from what was saved.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde_json::json;

use super::client::{Client, PATIENCE};
use crate::artifacts::Artifacts;
use crate::bench::contestant::{self, QUIET, Task, UID, text};

/// What a VMM and its guest still do when they have answered should be over.
pub const SETTLED: Duration = Duration::from_millis(50);

/// Which VMM, and what is around it.
#[derive(Clone, Debug)]
pub enum Kind {
    /// Ours.
    Vmm,
    /// Ours in its jail.
    Jailed,
    /// Firecracker.
    Firecracker(PathBuf),
}

/// A saved machine: its two files.
pub struct Snapshot {
    /// All but the memory.
    pub state: PathBuf,
    /// The memory.
    pub memory: PathBuf,
    /// How long it took to make, from request to answer.
    pub took: Duration,
}

impl Snapshot {
    /// Removes both files.
    ///
    /// # Errors
    /// When they are not there.
    pub fn remove(&self) -> Result<()> {
        for path in [&self.state, &self.memory] {
            fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
        }
        Ok(())
    }

    /// What both files take on the disk, in bytes.
    ///
    /// # Errors
    /// When they are not there.
    pub fn on_disk(&self) -> Result<u64> {
        let mut total = 0;
        for path in [&self.state, &self.memory] {
            let file = fs::metadata(path).with_context(|| format!("find {}", path.display()))?;
            // st_blocks counts these, whatever the file system's blocks are.
            total += file.blocks() * 512;
        }
        Ok(total)
    }
}

/// A running VMM; ended, with all its processes, when dropped.
pub struct Machine {
    child: Child,
    /// From just before the process was made.
    start: Instant,
    output: ChildStdout,
    client: Client,
    socket: PathBuf,
}

impl Machine {
    /// One that boots `task` by its config file, once the guest has said its words.
    ///
    /// # Errors
    /// When it does not.
    pub fn boot(
        kind: &Kind,
        artifacts: &Artifacts,
        dir: &Path,
        task: Task,
        memory_mib: u32,
    ) -> Result<Self> {
        let config = dir.join("config.json");
        let content = contestant::config(&artifacts.probe(), task, memory_mib)?;
        fs::write(&config, content).with_context(|| format!("write {}", config.display()))?;
        let socket = dir.join("boot.sock");
        let mut command = command(kind, artifacts, "boot", &socket, None)?;
        command.arg("--config-file").arg(config);
        let mut machine = Self::start(command, socket)?;
        let mut said = Vec::new();
        while !String::from_utf8_lossy(&said).contains(task.expected()) {
            machine.wait_for_output()?;
            machine.hear(&mut said)?;
        }
        Ok(machine)
    }

    /// One that waits for a request.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn wait_for(
        kind: &Kind,
        artifacts: &Artifacts,
        dir: &Path,
        name: &str,
        snapshot: &Snapshot,
    ) -> Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let command = command(kind, artifacts, name, &socket, Some(snapshot))?;
        Self::start(command, socket)
    }

    /// One of ours that waits for a machine.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn empty(artifacts: &Artifacts, dir: &Path, name: &str) -> Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let command = command(&Kind::Vmm, artifacts, name, &socket, None)?;
        Self::start(command, socket)
    }

    fn start(mut command: Command, socket: PathBuf) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        // What goes wrong is also in the API's answer.
        command.stderr(Stdio::null());
        let start = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("run {command:?}"))?;
        let output = child.stdout.take().context("no pipe")?;
        let client = Client::connect(&socket).inspect_err(|_| end(&mut child))?;
        Ok(Self {
            child,
            start,
            output,
            client,
            socket,
        })
    }

    /// Pauses it and saves it in `dir`.
    ///
    /// # Errors
    /// When that is refused.
    pub fn save(&mut self, dir: &Path) -> Result<Snapshot> {
        thread::sleep(SETTLED);
        let paused = json!({ "state": "Paused" });
        self.client.ask("PATCH", "/vm", &paused)?;
        let (state, memory) = (dir.join("state"), dir.join("memory"));
        let body = json!({ "snapshot_path": text(&state)?, "mem_file_path": text(&memory)? });
        let start = Instant::now();
        self.client.ask("PUT", "/snapshot/create", &body)?;
        let took = start.elapsed();
        Ok(Snapshot {
            state,
            memory,
            took,
        })
    }

    /// Has it go on from `snapshot`.
    ///
    /// # Errors
    /// When that is refused.
    pub fn load(&mut self, snapshot: &Snapshot) -> Result<()> {
        self.client.send(&load_request(snapshot, true)?)?;
        self.client.done()
    }

    /// Loads `snapshot`, whose guest never stops talking, lets it wait, and has it go on: how long it takes from that request
    /// until the guest is heard.
    ///
    /// # Errors
    /// When that is refused, or somebody else than the guest says something.
    pub fn resume_and_hear(&mut self, snapshot: &Snapshot) -> Result<Duration> {
        self.client.send(&load_request(snapshot, false)?)?;
        self.client.done()?;
        thread::sleep(SETTLED);
        let resumed = Client::request("PATCH", "/vm", &json!({ "state": "Resumed" }));
        self.ask_and_hear(&resumed).map(|(took, _)| took)
    }

    /// Has it go on from `snapshot`, whose guest never stops talking: how long it takes until the guest is heard, from
    /// the request and from the process's start.
    ///
    /// # Errors
    /// When that is refused, or somebody else than the guest says something.
    pub fn load_and_hear(&mut self, snapshot: &Snapshot) -> Result<(Duration, Duration)> {
        self.ask_and_hear(&load_request(snapshot, true)?)
    }

    fn ask_and_hear(&mut self, request: &[u8]) -> Result<(Duration, Duration)> {
        if self.is_heard(PollTimeout::ZERO, false)? {
            bail!("the VMM itself wrote to its guest's console");
        }
        let start = Instant::now();
        self.client.send(request)?;
        // An answer that comes first is to be a good one.
        if !self.is_heard(patience()?, true)? {
            self.client.done()?;
            self.wait_for_output()?;
        }
        let now = Instant::now();
        let mut said = Vec::new();
        self.hear(&mut said)?;
        if !said.iter().all(|byte| b"probe: chatter\r\n".contains(byte)) {
            bail!("not the guest: {}", String::from_utf8_lossy(&said));
        }
        Ok((now - start, now - self.start))
    }

    /// Another connection to its API.
    ///
    /// # Errors
    /// When there can be none.
    pub fn another_client(&self) -> Result<Client> {
        Client::connect(&self.socket)
    }

    /// All that it says from now on until it ends, each piece with when it was heard; after `enough` has come it is not
    /// listened to any more.
    pub fn listen(&mut self, enough: usize) -> Vec<(Instant, usize)> {
        let (mut heard, mut all) = (Vec::new(), 0);
        let mut chunk = [0; 4096];
        while all < enough {
            let Ok(count @ 1..) = self.output.read(&mut chunk) else {
                break;
            };
            all += count;
            heard.push((Instant::now(), count));
        }
        heard
    }

    /// Whether there is output, after waiting for it or, if `or_answer`, an answer of the API.
    fn is_heard(&self, timeout: PollTimeout, or_answer: bool) -> Result<bool> {
        let output = PollFd::new(self.output.as_fd(), PollFlags::POLLIN);
        let answer = PollFd::new(self.client.as_fd(), PollFlags::POLLIN);
        let mut both = [output, answer];
        let count = if or_answer { 2 } else { 1 };
        poll(both.get_mut(..count).unwrap_or_default(), timeout)?;
        let [output, _] = both;
        Ok(output.any().unwrap_or(false))
    }

    fn wait_for_output(&self) -> Result<()> {
        if !self.is_heard(patience()?, false)? {
            bail!("the guest says nothing");
        }
        Ok(())
    }

    fn hear(&mut self, said: &mut Vec<u8>) -> Result<()> {
        let mut chunk = [0; 4096];
        let length = self.output.read(&mut chunk)?;
        if length == 0 {
            bail!("the VMM ended");
        }
        said.extend_from_slice(chunk.get(..length).unwrap_or_default());
        Ok(())
    }

    /// Its processes: the one that was started and all below it.
    pub fn processes(&self) -> Vec<Pid> {
        processes(&self.child)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        end(&mut self.child);
        // Not there any more if the VMM ended by itself.
        let _ = fs::remove_file(&self.socket);
    }
}

fn command(
    kind: &Kind,
    artifacts: &Artifacts,
    name: &str,
    socket: &Path,
    snapshot: Option<&Snapshot>,
) -> Result<Command> {
    let id = format!("bench-{}-{name}", std::process::id());
    let mut command = match kind {
        Kind::Vmm => Command::new(artifacts.program("casemate-vmm")),
        Kind::Jailed => Command::new(artifacts.program("casemate-jailer")),
        Kind::Firecracker(path) => Command::new(path),
    };
    command.args(["--id", &id]);
    match kind {
        Kind::Jailed => {
            command.args(["--uid", UID, "--gid", UID, "--exec-file"]);
            command.arg(artifacts.program("casemate-vmm"));
            for path in snapshot
                .iter()
                .flat_map(|snapshot| [&snapshot.state, &snapshot.memory])
            {
                command.arg("--grant-ro").arg(path);
            }
            command.arg("--");
        }
        Kind::Firecracker(_) => {
            command.args(QUIET);
        }
        Kind::Vmm => {}
    }
    command.arg("--api-sock").arg(socket);
    Ok(command)
}

fn load_request(snapshot: &Snapshot, resume: bool) -> Result<Vec<u8>> {
    let memory = json!({ "backend_type": "File", "backend_path": text(&snapshot.memory)? });
    let body = json!({
        "snapshot_path": text(&snapshot.state)?,
        "mem_backend": memory,
        "resume_vm": resume,
    });
    Ok(Client::request("PUT", "/snapshot/load", &body))
}

fn patience() -> Result<PollTimeout> {
    PollTimeout::try_from(PATIENCE).context("a wait that is too long")
}

fn processes(child: &Child) -> Vec<Pid> {
    let own = Pid::from_raw(child.id().cast_signed());
    let mut all = vec![own];
    let mut next = 0;
    while let Some(pid) = all.get(next).copied() {
        next += 1;
        let path = format!("/proc/{pid}/task/{pid}/children");
        // One that has ended has none.
        let children = fs::read_to_string(path).unwrap_or_default();
        let children = children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok());
        all.extend(children.map(Pid::from_raw));
    }
    all
}

/// Ends all processes, and waits until they are gone: the kernel's work on them would be measured with the next one's.
fn end(child: &mut Child) {
    let all = processes(child);
    for pid in all.iter().rev() {
        // It may have ended already.
        let _ = kill(*pid, Signal::SIGKILL);
    }
    let _ = child.wait();
    for pid in all.iter().skip(1) {
        // Those that their parent has not waited for are ours now (see `adopt`).
        let _ = waitpid(*pid, None);
    }
}

/// Has the processes whose parent ends become this one's, so that their end can be waited for.
///
/// # Errors
/// When the kernel refuses.
pub fn adopt() -> Result<()> {
    prctl::set_child_subreaper(true).context("become the parent of orphans")
}

//! A process beside `snapshot create`: should that be killed, it has the machine go on, and removes what is half done.

use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::lock;
use crate::api;
use crate::cli::GuardArgs;

/// How long the VMM may take until it has written a snapshot that nobody waits for any more.
const PATIENCE: Duration = Duration::from_secs(3600);
/// What says that there is nothing to do.
const DONE: &[u8] = b"done";

/// The guard, seen from `create`.
#[derive(Debug)]
pub struct Guard(Child);

impl Guard {
    /// Starts it, before anything is done that it may have to undo.
    pub fn start(socket: &Path, saved: &Path, staged: &Path) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("casemate").arg("snapshot-guard");
        command.arg(socket).arg(saved).arg(staged);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .env_clear()
            // What ends a whole terminal's foreground group is not for it.
            .process_group(0);
        command.spawn().map(Self)
    }

    /// All is as it should be: it ends.
    pub fn release(mut self) {
        if let Some(mut stdin) = self.0.stdin.take() {
            let _ = stdin.write_all(DONE);
        }
        let _ = self.0.wait();
    }
}

/// `casemate snapshot-guard`: waits for the end of whoever started it.
pub fn guard(args: &GuardArgs) -> io::Result<()> {
    let mut said = Vec::new();
    io::stdin().take(16).read_to_end(&mut said)?;
    if said == DONE {
        return Ok(());
    }
    let end = Instant::now() + PATIENCE;
    let body = json!({ "state": "Resumed" });
    // Its answer comes when the snapshot is written that it may be at. If it is not paused, that is what is wanted.
    let asked = api::ask_while(&args.socket, "PATCH", "/vm", &body, &mut || {
        Instant::now() < end
    });
    // Unless somebody else is at them already.
    if let Ok(Some(_lock)) = lock(&args.saved) {
        for file in crate::run::FILES {
            let _ = std::fs::remove_file(args.saved.join(file));
        }
    }
    let _ = std::fs::remove_dir_all(&args.staged);
    asked.map(drop)
}

//! A VMM in its jail is told which snapshot to go on from.

use std::io;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use casemate_broker::exit;
use nix::sys::signal::{Signal, raise};
use nix::sys::signalfd::SignalFd;
use serde_json::json;

use super::Error;
use super::children::Children;
use super::machine_config::FROM;
use super::plan::Plan;
use super::supervise::Outcome;
use crate::api;

/// How long the jailer may take until somebody listens, and then the VMM to load: with huge pages it reads all memory.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks whether somebody listens.
const TURN: Duration = Duration::from_micros(500);

/// Has the machine go on. Gives an outcome when a signal came in the way; nothing when all is well, or when the
/// jailer has ended, which has its own words for that.
pub fn resume(
    plan: &Plan,
    socket: &Path,
    children: &mut Children,
    signals: &SignalFd,
) -> Result<Option<Outcome>, Error> {
    let deadline = Instant::now() + PATIENCE;
    let [state, memory] = FROM;
    let body = json!({
        "snapshot_path": state,
        "mem_backend": { "backend_type": "File", "backend_path": memory },
        "resume_vm": true,
        // It would be written by one clone, and believed by others.
        "working_set": { "enabled": false },
        // The guest's init sets its clock; a bare kernel has none to do so.
        "clock_realtime": plan.spec.is_none(),
    });
    let mut pending = Pending::default();
    let outcome = loop {
        let ended = children.jailer.try_wait();
        if ended
            .map_err(Error::system("wait for the jailer"))?
            .is_some()
        {
            break Ok(None);
        }
        let mut waits = || Instant::now() < deadline && !pending.look(signals);
        match api::ask_while(socket, "PUT", "/snapshot/load", &body, &mut waits) {
            Ok(answer) if answer.is_done() => break Ok(None),
            Ok(answer) => break Err(Error::Refused(answer.words())),
            // Not made yet, or nobody listens yet.
            Err(error) if is_early(&error) && waits() => sleep(TURN),
            // The VMM has ended: the jailer will, too.
            Err(error) if is_end(&error) => break Ok(None),
            Err(error) => {
                break match pending.signal {
                    Some(number) => Ok(Some(Outcome {
                        code: exit::by_signal(number),
                        all_ended: false,
                    })),
                    None => Err(Error::Load(error)),
                };
            }
        }
    };
    pending.give_back();
    outcome
}

fn is_early(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

/// Signals that came meanwhile.
#[derive(Debug, Default)]
struct Pending {
    /// One that ends the run.
    signal: Option<i32>,
    /// A child has ended, which whoever watches next has to hear.
    child: bool,
}

impl Pending {
    /// Whether the run is to end.
    fn look(&mut self, signals: &SignalFd) -> bool {
        while let Ok(Some(info)) = signals.read_signal() {
            let number = info.ssi_signo.cast_signed();
            match Signal::try_from(number) {
                Ok(Signal::SIGCHLD) => self.child = true,
                Ok(Signal::SIGWINCH) | Err(_) => {}
                Ok(_) => self.signal = Some(number),
            }
        }
        self.signal.is_some()
    }

    fn give_back(&self) {
        if self.child {
            // It is held, and thus read from the descriptor again.
            let _ = raise(Signal::SIGCHLD);
        }
    }
}

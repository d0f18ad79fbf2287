//! The working set of a snapshot: read when a machine goes on from it, recorded by the first that does.

use std::time::{Duration, Instant};

use log::{debug, info, warn};
use serde::Deserialize;

use super::Desk;
use crate::machine::RunningMachine;
use crate::machine::state::Saved;
use crate::resources;
use crate::snapshot::memory::PAGE;
use crate::snapshot::working_set::{self, Run};

/// What errors call the file.
const FILE: &str = "working set";
/// What its name is the memory file's with.
const SUFFIX: &str = ".working-set";
/// How long the first machine runs before it is recorded, unless said otherwise.
const RECORD_AFTER: u64 = 2000;

/// Of `PUT /snapshot/load`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkingSet {
    /// Whether there is to be one.
    enabled: bool,
    /// Where it is, or is to be.
    path: Option<String>,
    /// How long the first machine runs before it is recorded.
    record_after_ms: u32,
}

impl Default for WorkingSet {
    fn default() -> Self {
        Self {
            enabled: true,
            path: None,
            record_after_ms: RECORD_AFTER as u32,
        }
    }
}

/// What is still to be recorded.
pub(super) struct Recording {
    path: String,
    after: Duration,
    /// When; none while the guest has not run.
    due: Option<Instant>,
}

impl Desk {
    /// The working set of the snapshot whose memory is in the file called `memory`. If there is none yet, it will be recorded.
    pub(super) fn working_set(
        &mut self,
        asked: &WorkingSet,
        memory: &str,
        saved: &Saved,
    ) -> Option<Vec<Run>> {
        self.recording = None;
        if !asked.enabled {
            return None;
        }
        let default = || format!("{memory}{SUFFIX}");
        let path = asked.path.clone().unwrap_or_else(default);
        let regions = saved.machine.memory.iter();
        let bytes = regions.fold(0_u64, |sum, (_, length)| sum.saturating_add(*length));
        let file = self.source.open_file(FILE, &path);
        let file = file.inspect_err(|error| debug!("{error}"));
        let runs = file.ok().and_then(|file| {
            let runs = working_set::read(&file, saved.id, bytes / PAGE);
            let unused = |error: &_| warn!("the working set {path:?} is not used: {error}");
            runs.inspect_err(unused).ok()
        });
        match &runs {
            Some(runs) => info!("working set: {} pages", working_set::pages(runs)),
            None => {
                self.recording = Some(Recording {
                    path,
                    after: Duration::from_millis(asked.record_after_ms.into()),
                    due: None,
                });
            }
        }
        runs
    }

    /// The guest runs.
    pub(super) fn guest_runs(&mut self) {
        if let Some(recording) = &mut self.recording {
            let due = Instant::now().checked_add(recording.after);
            recording.due = recording.due.or(due);
        }
    }

    /// When a working set is to be recorded.
    pub(super) fn recording_due(&self) -> Option<Instant> {
        self.recording.as_ref().and_then(|recording| recording.due)
    }

    /// Records it if it is time, or if the guest, which has run, stops `now`.
    pub(super) fn record_working_set(&mut self, machine: &RunningMachine, now: bool) {
        let due = self.recording_due();
        if !due.is_some_and(|due| now || due <= Instant::now()) {
            return;
        }
        let Some(recording) = self.recording.take() else {
            return;
        };
        if !machine.has_working_set() {
            debug!("no working set: the memory does not come page by page from a file");
            return;
        }
        let path = &recording.path;
        let file = match self.source.create_later(FILE, path) {
            Ok(file) => file,
            Err(error) => return debug!("no working set is recorded: {error}"),
        };
        let recorded = machine.record_working_set(file);
        let named = recorded.map_err(|error| error.to_string()).and_then(|set| {
            let named = self.source.commit(FILE, path);
            named
                .map(|()| set)
                .map_err(|error: resources::Error| error.to_string())
        });
        match named {
            Ok(set) => info!(
                "working set: {} pages of {} MiB recorded",
                set.pages,
                set.ram >> 20
            ),
            Err(error) => {
                // What has its name already cannot be given up.
                let _ = self.source.discard(FILE, path);
                warn!("no working set is recorded: {error}");
            }
        }
    }
}

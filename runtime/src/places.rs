//! Where the runtime keeps things.

use std::env;
use std::path::{Path, PathBuf};

/// The directories in use.
#[derive(Debug, Clone)]
pub struct Places {
    /// Kernels and caches; survives a restart (`CASEMATE_DATA_DIR`).
    pub data: PathBuf,
    /// Running machines (`CASEMATE_STATE_DIR`).
    pub state: PathBuf,
    /// Where `casemate-jailer` and `casemate-vmm` are (`CASEMATE_LIBEXEC`).
    pub libexec: PathBuf,
}

/// A program of ours is not where it should be.
#[derive(Debug, thiserror::Error)]
#[error("{} does not exist: install it beside casemate, or set CASEMATE_LIBEXEC to its directory", path.display())]
pub struct MissingProgram {
    path: PathBuf,
}

impl Places {
    /// From the environment and this program's own place.
    pub fn from_env() -> Self {
        let from = |key, default: &str| {
            env::var_os(key)
                .filter(|value| !value.is_empty())
                .map_or_else(|| PathBuf::from(default), PathBuf::from)
        };
        let beside = env::current_exe()
            .ok()
            .and_then(|program| program.parent().map(Path::to_path_buf))
            .unwrap_or_else(|| PathBuf::from("/usr/libexec/casemate"));
        Self {
            data: from("CASEMATE_DATA_DIR", "/var/lib/casemate"),
            state: from("CASEMATE_STATE_DIR", "/run/casemate"),
            libexec: env::var_os("CASEMATE_LIBEXEC").map_or(beside, PathBuf::from),
        }
    }

    /// One of our other programs.
    pub fn program(&self, name: &str) -> Result<PathBuf, MissingProgram> {
        let path = self.libexec.join(name);
        if path.is_file() {
            Ok(path)
        } else {
            Err(MissingProgram { path })
        }
    }

    /// Directory of the running machines.
    pub fn machines(&self) -> PathBuf {
        self.state.join("vms")
    }

    /// The disk of a machine for what it writes to its root: not in memory, as the state may be.
    pub fn layer(&self, id: &str) -> PathBuf {
        self.data.join("layers").join(format!("{id}.img"))
    }

    /// Directory of snapshots, one directory each.
    pub fn snapshots(&self) -> PathBuf {
        self.data.join("snapshots")
    }

    /// Where a machine that can be saved puts its files, before they are a snapshot: it may write there, and nowhere else.
    pub fn saved(&self, id: &str) -> PathBuf {
        self.snapshots().join(".new").join(id).join("files")
    }

    /// Directory of one machine.
    pub fn machine(&self, id: &str) -> PathBuf {
        self.machines().join(id)
    }
}

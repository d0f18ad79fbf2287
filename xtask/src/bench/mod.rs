//! `cargo xtask bench`: measurements that stay comparable.
//!
//! All contestants take turns in one run, because absolute times drift on any host; the ratios are
//! what to rely on.

mod contestant;
mod measure;
mod snapshot;
mod start;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::artifacts::{self, Artifacts};
use crate::host::{Host, Where};
use crate::workspace;

/// What to measure.
#[derive(clap::Subcommand)]
pub enum Benchmark {
    /// From a process's start to its guest's first output, and to its own end; and memory
    Start(start::Arguments),
    /// Snapshots: from a load request, and from a process's start, to the guest's first output; what making one costs; memory
    /// of clones
    Snapshot(snapshot::Arguments),
}

/// Measures.
///
/// # Errors
/// When a contestant fails.
pub fn main(benchmark: &Benchmark) -> Result<ExitCode> {
    match benchmark {
        Benchmark::Start(arguments) => start::main(arguments),
        Benchmark::Snapshot(arguments) => snapshot::main(arguments),
    }
}

/// Builds what is measured, on a host where there is something to measure.
fn built() -> Result<Artifacts> {
    let artifacts = artifacts::build()?;
    let choice = Host::look(&artifacts)?.for_probe();
    anyhow::ensure!(
        choice.place == Where::Here,
        "nothing to measure here: {}",
        choice.reason
    );
    // The pages of a program that was built just now would count as dirty ones of its process.
    nix::unistd::sync();
    Ok(artifacts)
}

/// A temporary directory.
fn scratch() -> Result<tempfile::TempDir> {
    // Beside the products, so that a hard link to the probe works.
    let dir = workspace::target_dir();
    tempfile::Builder::new()
        .prefix("bench-")
        .tempdir_in(&dir)
        .context("make a directory")
}

/// A peer's program, from wherever it is run.
fn program(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).with_context(|| format!("find {}", path.display()))
}

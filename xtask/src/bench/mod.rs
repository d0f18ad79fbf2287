//! `cargo xtask bench`: measurements that stay comparable.
//!
//! All contestants take turns in one run, because absolute times drift on any host; the ratios are
//! what to rely on.

mod contestant;
mod measure;
mod start;

use std::process::ExitCode;

use anyhow::Result;

/// What to measure.
#[derive(clap::Subcommand)]
pub enum Benchmark {
    /// From a process's start to its guest's first output, and to its own end; and memory
    Start(start::Arguments),
}

/// Measures.
///
/// # Errors
/// When a contestant fails.
pub fn main(benchmark: &Benchmark) -> Result<ExitCode> {
    match benchmark {
        Benchmark::Start(arguments) => start::main(arguments),
    }
}

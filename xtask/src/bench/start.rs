//! `cargo xtask bench start`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use super::contestant::{Contestant, Task};
use super::measure::{self, Memory, Times};
use super::{built, program, scratch};
use crate::artifacts::Artifacts;
use crate::host::need_root;
use crate::packages;
use crate::workspace::say;

/// `cargo xtask bench start`
#[derive(clap::Args)]
pub struct Arguments {
    /// Starts of each contestant
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Also measure this Firecracker
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// And this jailer of it
    #[arg(long, value_name = "PATH", requires = "firecracker")]
    jailer: Option<PathBuf>,
}

/// One contestant's numbers.
struct Row {
    contestant: Contestant,
    times: Vec<Times>,
    memory: Memory,
}

/// Measures all contestants in turn and prints a table.
///
/// # Errors
/// When one of them fails.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    need_root("bench")?;
    packages::install(&[&packages::QEMU])?;
    let artifacts = built()?;
    let mut rows = Vec::new();
    for contestant in contestants(arguments)? {
        let dir = scratch()?;
        let idle = contestant.prepare(&artifacts, dir.path(), "idle", Task::Idle);
        let memory = measure::idle_memory(&mut idle?, Task::Idle.expected())
            .with_context(|| format!("{}, idle", contestant.name()))?;
        rows.push(Row {
            contestant,
            times: Vec::new(),
            memory,
        });
    }
    say(format_args!(
        "{} starts of each of {} contestants, in turn",
        arguments.runs,
        rows.len()
    ));
    let dir = scratch()?;
    // One round goes uncounted: it brings programs into the page cache.
    for round in 0..=arguments.runs {
        for row in &mut rows {
            let times = start(&row.contestant, &artifacts, dir.path(), round)
                .with_context(|| format!("{}, start {round}", row.contestant.name()))?;
            if round > 0 {
                row.times.push(times);
            }
        }
    }
    print(&rows, arguments.runs);
    Ok(ExitCode::SUCCESS)
}

fn contestants(arguments: &Arguments) -> Result<Vec<Contestant>> {
    let mut all = vec![Contestant::Vmm, Contestant::Jailed];
    if let Some(vmm) = &arguments.firecracker {
        let vmm = program(vmm)?;
        all.push(Contestant::Firecracker(vmm.clone()));
        if let Some(jailer) = &arguments.jailer {
            let jailer = program(jailer)?;
            all.push(Contestant::FirecrackerJailed { jailer, vmm });
        }
    }
    all.push(Contestant::Qemu);
    Ok(all)
}

fn start(
    contestant: &Contestant,
    artifacts: &Artifacts,
    dir: &std::path::Path,
    round: u32,
) -> Result<Times> {
    let id = format!("bench-{}-{round}", std::process::id());
    let mut command = contestant.prepare(artifacts, dir, &id, Task::Boot)?;
    let times = measure::time_start(&mut command, Task::Boot.expected());
    contestant.clean(dir, &id);
    times
}

fn print(rows: &[Row], runs: u32) {
    println!(
        "Probe guest, 128 MiB, one vCPU; {runs} starts each, in turn. Times in ms, memory in MiB.\n"
    );
    println!(
        "| | first output, median | p90 | reaped, median | p90 | first output, ratio | resident | private dirty |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|");
    let median = |row: &Row, field: fn(&Times) -> Duration, percent| {
        let mut values: Vec<_> = row.times.iter().map(field).collect();
        measure::percentile(&mut values, percent).as_secs_f64() * 1000.0
    };
    let first = |times: &Times| times.first_output;
    let reaped = |times: &Times| times.reaped;
    let base = rows.first().map_or(1.0, |row| median(row, first, 50));
    for row in rows {
        let mib = |kib: u64| f64::from(u32::try_from(kib).unwrap_or(u32::MAX)) / 1024.0;
        println!(
            "| {} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |",
            row.contestant.name(),
            median(row, first, 50),
            median(row, first, 90),
            median(row, reaped, 50),
            median(row, reaped, 90),
            median(row, first, 50) / base,
            mib(row.memory.resident),
            mib(row.memory.private_dirty),
        );
    }
    println!("\nRatio: to casemate-vmm. Resident: of the VMM's process while the guest idles.");
}

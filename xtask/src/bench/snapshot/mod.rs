//! `cargo xtask bench snapshot`: saving machines and going on from what was saved, beside Firecracker.
//!
//! To measure more, write another [`Subject`] and name it in [`main`].

mod client;
mod clones;
mod create;
mod machine;
mod moving;
mod plot;
mod restore;
mod row;
mod sizes;

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::contestant::Task;
use super::{built, program, scratch};
use crate::artifacts::Artifacts;
use crate::host::need_root;
use crate::workspace::{self, say};
use machine::{Kind, Machine, Snapshot};
use row::{Row, Series};

/// `cargo xtask bench snapshot`
#[derive(clap::Args)]
pub struct Arguments {
    /// How often everything is measured, in turn
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Clones of one snapshot, all there at once
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    clones: u32,
    /// Also measure this Firecracker
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Where snapshot.json and restore-by-memory.svg are written
    #[arg(long, value_name = "DIR", default_value_os_t = workspace::target_dir().join("bench"))]
    out: PathBuf,
}

/// Whom to measure.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Contestant {
    Ours,
    Jailed,
    Peer,
}

impl Contestant {
    fn series(self, row: &mut Row) -> &mut Series {
        match self {
            Self::Ours | Self::Jailed => &mut row.ours,
            Self::Peer => &mut row.peer,
        }
    }
}

/// Something to measure.
trait Subject {
    /// Once each contestant, in turn.
    fn round(&mut self, _: &Bench) -> Result<()> {
        Ok(())
    }

    /// What is measured once, and what follows from the rounds.
    fn finish(&mut self, _: &Bench) -> Result<()> {
        Ok(())
    }

    /// Its lines of the table.
    fn rows(&mut self) -> Vec<&mut Row>;
}

/// What is measured with.
struct Bench {
    artifacts: Artifacts,
    firecracker: Option<PathBuf>,
    dir: tempfile::TempDir,
    snapshots: Cell<u32>,
}

impl Bench {
    fn kind(&self, who: Contestant) -> Result<Kind> {
        Ok(match who {
            Contestant::Ours => Kind::Vmm,
            Contestant::Jailed => Kind::Jailed,
            Contestant::Peer => {
                let path = self.firecracker.clone();
                Kind::Firecracker(path.context("no Firecracker was named")?)
            }
        })
    }

    /// What `measure` gives, if there is a peer.
    fn with_peer<T>(&self, measure: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        self.firecracker.as_ref().map(|_| measure()).transpose()
    }

    /// A new snapshot of a machine that ran `task`.
    fn save(&self, who: Contestant, task: Task, memory_mib: u32) -> Result<Snapshot> {
        let number = self.snapshots.replace(self.snapshots.get() + 1);
        let dir = self.dir.path().join(format!("snapshot{number}"));
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let kind = self.kind(who)?;
        let mut machine = Machine::boot(&kind, &self.artifacts, &dir, task, memory_mib)?;
        let snapshot = machine.save(&dir);
        snapshot.with_context(|| format!("save a machine of {kind:?} with {memory_mib} MiB"))
    }

    /// A VMM that waits for the request to load `snapshot`.
    fn waiting(&self, who: Contestant, name: &str, snapshot: &Snapshot) -> Result<Machine> {
        let (kind, dir) = (self.kind(who)?, self.dir.path());
        Machine::wait_for(&kind, &self.artifacts, dir, name, snapshot)
    }
}

/// Measures all subjects, and says what came out.
///
/// # Errors
/// When something fails; figures that are not as they are to be are no failure.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    need_root("bench")?;
    machine::adopt()?;
    let bench = Bench {
        artifacts: built()?,
        firecracker: arguments.firecracker.as_deref().map(program).transpose()?,
        dir: scratch()?,
        snapshots: Cell::new(0),
    };
    // A jailed VMM has its socket there.
    fs::set_permissions(bench.dir.path(), fs::Permissions::from_mode(0o755))?;
    let mut restore = restore::Restore::new(&bench)?;
    let mut create = create::Create::new();
    let mut sizes = sizes::Sizes::new(&bench)?;
    let mut clones = clones::Clones::new(&bench, arguments.clones)?;
    let mut moving = moving::Moving::new();
    let subjects: &mut [&mut dyn Subject] = &mut [
        &mut restore,
        &mut create,
        &mut sizes,
        &mut clones,
        &mut moving,
    ];
    say(format_args!("{} rounds", arguments.rounds));
    // One round goes uncounted: it brings programs and files into the page cache.
    for round in 0..=arguments.rounds {
        for subject in subjects.iter_mut() {
            subject
                .round(&bench)
                .with_context(|| format!("round {round}"))?;
            if round == 0 {
                subject.rows().into_iter().for_each(Row::forget);
            }
        }
    }
    say("what is measured once");
    let mut lines = Vec::new();
    let mut figures = Vec::new();
    for subject in subjects.iter_mut() {
        subject.finish(&bench)?;
        for row in subject.rows() {
            lines.push(row.line());
            figures.push(row.json());
        }
    }
    println!(
        "Probe guest, one vCPU; {} rounds, in turn.\n",
        arguments.rounds
    );
    println!("{}\n{}", Row::HEAD, lines.join("\n"));
    println!("\nRatio: ours to Firecracker's, the median of the rounds' ratios.");
    let title = "Load request to the guest's first output";
    let plot = plot::draw(title, &sizes.curves()).context("draw")?;
    let figures =
        json!({ "rounds": arguments.rounds, "clones": arguments.clones, "rows": figures });
    write(&arguments.out, &figures, &plot)?;
    Ok(ExitCode::SUCCESS)
}

fn write(dir: &Path, figures: &Value, plot: &str) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let json = format!("{figures:#}\n");
    for (name, content) in [
        ("snapshot.json", json.as_str()),
        ("restore-by-memory.svg", plot),
    ] {
        let path = dir.join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
        say(format_args!("wrote {}", path.display()));
    }
    Ok(())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[allow(
    clippy::cast_precision_loss,
    reason = "bytes that a disk or a memory has"
)]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1u32 << 20)
}

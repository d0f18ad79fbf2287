//! `cargo xtask test`: all three tiers, each where this host can run it.
//!
//! A test program of `tests/` belongs to the tier that ends its name: `security_host` needs no KVM,
//! `functional_kvm` drives the bare-metal probe on `/dev/kvm`, `functional_linux` runs Linux guests.
//! The tests beside the code are in the host tier. What cannot run on this host runs in the lab.

mod programs;
mod tally;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::artifacts::{self, Artifacts};
use crate::guests;
use crate::host::{Choice, Host, Where};
use crate::packages::{self, Flavour};
use crate::workspace::{self, say};
use programs::{Program, Settings};
use tally::Tally;

/// `cargo xtask test`
#[derive(clap::Args, Default)]
pub struct Arguments {
    /// Also the tests that are marked as long (`#[ignore]`), and the generic kernel
    #[arg(long)]
    full: bool,
    /// One tier only
    #[arg(long)]
    tier: Option<Tier>,
    /// The kvm and linux tiers in the lab, also where this host could run them
    #[arg(long)]
    lab: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// A tier.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum Tier {
    /// No KVM.
    Host,
    /// The probe guest on KVM.
    Kvm,
    /// Linux guests.
    Linux,
}

impl Tier {
    fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Kvm => "kvm",
            Self::Linux => "linux",
        }
    }
}

/// Runs the tiers.
///
/// # Errors
/// When nothing can be run at all; what fails later is in the summary.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    packages::install(&[
        &packages::QEMU,
        &packages::BUSYBOX,
        &packages::EROFS,
        &packages::IPROUTE,
        &packages::EXT4,
    ])?;
    let artifacts = artifacts::build()?;
    let host = Host::look(&artifacts)?;
    let tiers: Vec<Tier> = [Tier::Host, Tier::Kvm, Tier::Linux]
        .into_iter()
        .filter(|tier| arguments.tier.is_none_or(|only| only == *tier))
        .collect();
    let mut places = Vec::new();
    for tier in &tiers {
        let choice = match tier {
            Tier::Host => None,
            _ if arguments.lab => Some(Choice {
                place: Where::Lab,
                reason: "--lab asks for it".to_owned(),
            }),
            Tier::Kvm => Some(host.for_probe()),
            Tier::Linux => Some(host.for_linux()),
        };
        match &choice {
            None => say("tier host runs on this host: it needs no KVM"),
            Some(choice) => say(format_args!("tier {} runs {choice}", tier.name())),
        }
        places.push(choice.map_or(Where::Here, |choice| choice.place));
    }

    let mut results = Vec::new();
    for (tier, place) in tiers.into_iter().zip(places) {
        let started = Instant::now();
        let tally = run(tier, place, arguments, &artifacts).unwrap_or_else(|error| {
            let mut tally = Tally::default();
            tally.problem(format!("the {} tier could not run: {error:#}", tier.name()));
            tally
        });
        results.push((tier, tally, started.elapsed()));
    }
    Ok(summary(results))
}

fn run(tier: Tier, place: Where, arguments: &Arguments, artifacts: &Artifacts) -> Result<Tally> {
    let filter = arguments.filter.as_deref();
    let mut total = Tally::default();
    if tier == Tier::Host {
        total.add(programs::run_unit_tests(filter)?);
    }
    let programs: Vec<Program> = programs::build()?
        .into_iter()
        .filter(|program| program.name.ends_with(&format!("_{}", tier.name())))
        .collect();
    anyhow::ensure!(
        !programs.is_empty(),
        "tests/ has no program named *_{}",
        tier.name()
    );
    let env = environment(tier, arguments, artifacts)?;
    let minutes = if arguments.full { 60 } else { 20 };
    let timeout = Duration::from_secs(minutes * 60);
    let settings = Settings {
        filter,
        full: arguments.full,
        env: &env,
        timeout,
    };
    // Two labs are what two cores carry; each holds 3 GiB.
    let labs = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(2));
    for program in programs {
        let tests = program.list(&settings)?;
        if tests.is_empty() {
            continue;
        }
        say(format_args!("{}: {} tests", program.name, tests.len()));
        total.add(match place {
            Where::Here => program.run_here(&settings, &tests)?,
            Where::Lab => program.run_in_labs(&settings, &tests, labs),
        });
    }
    // Only a filter may leave a tier without a test: an empty one must not pass in silence.
    anyhow::ensure!(filter.is_some() || total.reported() > 0, "it has no tests");
    Ok(total)
}

/// What `tests/README.md` promises the test programs.
fn environment(
    tier: Tier,
    arguments: &Arguments,
    artifacts: &Artifacts,
) -> Result<Vec<(String, String)>> {
    let text = |path: &std::path::Path| {
        path.to_str()
            .map(str::to_owned)
            .with_context(|| format!("{} is not UTF-8", path.display()))
    };
    let mut env = vec![("CASEMATE_BIN_DIR".to_owned(), text(&artifacts.dir)?)];
    if tier == Tier::Linux {
        let place = workspace::target_dir().join("test");
        let data = place.join("data");
        guests::register(artifacts, &data, Flavour::Cloud)?;
        if arguments.full {
            guests::register(artifacts, &data, Flavour::Generic)?;
        }
        let rootfs = place.join("rootfs");
        guests::busybox_rootfs(&rootfs)?;
        env.push(("CASEMATE_DATA_DIR".to_owned(), text(&data)?));
        env.push(("CASEMATE_TEST_ROOTFS".to_owned(), text(&rootfs)?));
    }
    Ok(env)
}

fn summary(results: Vec<(Tier, Tally, Duration)>) -> ExitCode {
    println!();
    let mut total = Tally::default();
    for (tier, tally, time) in results {
        for problem in &tally.problems {
            println!("{}: {problem}", tier.name());
        }
        println!(
            "{} {} passed, {} failed{} in {:.0} s",
            tier.name(),
            tally.passed,
            tally.failed,
            skipped(&tally),
            time.as_secs_f64()
        );
        total.add(tally);
    }
    println!(
        "{} passed, {} failed{}",
        total.passed,
        total.failed,
        skipped(&total)
    );
    if total.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn skipped(tally: &Tally) -> String {
    if tally.skipped == 0 {
        String::new()
    } else {
        format!(", {} skipped", tally.skipped)
    }
}

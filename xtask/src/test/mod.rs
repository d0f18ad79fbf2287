//! `cargo xtask test`: all three tiers, each where this host can run it.
//!
//! A test program of `tests/` belongs to the tier that ends its name: `security_host` needs no KVM,
//! `functional_kvm` drives the bare-metal probe on `/dev/kvm`, `functional_linux` runs Linux guests.
//! The tests beside the code are in the host tier; those of them that build jails or enter a VM are known by name.
//! What cannot run on this host runs in the lab.

mod clients;
mod needs;
mod programs;
mod smoke;
mod tally;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::artifacts::{self, Artifacts};
use crate::guests;
use crate::host::{Choice, Host, Where, need_root};
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
    /// What needs KVM in the lab, also where this host could run it
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
    need_root("test")?;
    packages::install(&[
        &packages::QEMU,
        &packages::BUSYBOX,
        &packages::EROFS,
        &packages::IPROUTE,
        &packages::EXT4,
        &packages::GDB,
    ])?;
    artifacts::build_debugged()?;
    let artifacts = artifacts::build()?;
    let host = Host::look(&artifacts)?;
    let tiers: Vec<Tier> = [Tier::Host, Tier::Kvm, Tier::Linux]
        .into_iter()
        .filter(|tier| arguments.tier.is_none_or(|only| only == *tier))
        .collect();
    let mut places = Vec::new();
    for tier in &tiers {
        let choice = match tier {
            _ if arguments.lab => Choice {
                place: Where::Lab,
                reason: "--lab asks for it".to_owned(),
            },
            Tier::Host | Tier::Kvm => host.for_probe(),
            Tier::Linux => host.for_linux(),
        };
        match (tier, choice.place) {
            (Tier::Host, Where::Here) => say("tier host runs on this host: it has what it takes"),
            (Tier::Host, Where::Lab) => say(format_args!(
                "tier host runs on this host; its tests of jails and vCPUs {choice}"
            )),
            _ => say(format_args!("tier {} runs {choice}", tier.name())),
        }
        places.push(choice.place);
    }
    let programs = programs::build()?;

    let mut results = Vec::new();
    for (tier, place) in tiers.into_iter().zip(places) {
        let started = Instant::now();
        let tally = run(tier, place, &programs, arguments, &artifacts).unwrap_or_else(|error| {
            let mut tally = Tally::default();
            tally.problem(format!("the {} tier could not run: {error:#}", tier.name()));
            tally
        });
        results.push((tier, tally, started.elapsed()));
    }
    Ok(summary(results))
}

fn run(
    tier: Tier,
    place: Where,
    programs: &[Program],
    arguments: &Arguments,
    artifacts: &Artifacts,
) -> Result<Tally> {
    let filter = arguments.filter.as_deref();
    let suffix = format!("_{}", tier.name());
    let mine: Vec<&Program> = programs
        .iter()
        .filter(|program| match program.crosses_processes() {
            true => program.name.ends_with(&suffix),
            false => tier == Tier::Host,
        })
        .collect();
    anyhow::ensure!(!mine.is_empty(), "there is no program named *{suffix}");
    let env = environment(tier, arguments, artifacts)?;
    let minutes = if arguments.full { 60 } else { 20 };
    let settings = Settings {
        filter,
        full: arguments.full,
        env: &env,
        timeout: Duration::from_secs(minutes * 60),
    };
    let mut total = Tally::default();
    for program in mine {
        total.add(run_program(program, tier, place, &settings)?);
    }
    if tier == Tier::Host {
        total.add(programs::run_examples(filter)?);
    }
    total.add(match (tier, place) {
        (Tier::Linux, _) => smoke::DEMO.run(filter)?,
        // In a lab there is nothing to measure.
        (Tier::Kvm, Where::Here) => {
            let mut tally = smoke::BENCH.run(filter)?;
            tally.add(smoke::BENCH_SNAPSHOT.run(filter)?);
            tally
        }
        _ => Tally::default(),
    });
    // Only a filter may leave a tier without a test: an empty one must not pass in silence.
    anyhow::ensure!(filter.is_some() || total.reported() > 0, "it has no tests");
    Ok(total)
}

fn run_program(program: &Program, tier: Tier, place: Where, settings: &Settings) -> Result<Tally> {
    if program.is_without_harness() {
        return match settings.filter {
            Some(filter) if !program.name.contains(filter) => Ok(Tally::default()),
            _ => program.run_whole(settings),
        };
    }
    let tests = program.list(settings)?;
    let (movable, fixed): (Vec<String>, Vec<String>) = tests
        .into_iter()
        .partition(|test| tier != Tier::Host || needs::kvm(&program.name, test));
    let (here, in_lab) = match place {
        Where::Here => ([fixed, movable].concat(), Vec::new()),
        Where::Lab => (fixed, movable),
    };
    let mut total = Tally::default();
    if !here.is_empty() {
        say(format_args!("{}: {} tests", program.name, here.len()));
        total.add(program.run_here(settings, &here)?);
    }
    if !in_lab.is_empty() {
        say(format_args!(
            "{}: {} tests in the lab",
            program.name,
            in_lab.len()
        ));
        // Two labs are what two cores carry; each holds 3 GiB.
        let labs = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(2));
        total.add(program.run_in_labs(settings, &in_lab, labs));
    }
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
    if tier == Tier::Host && arguments.full {
        guests::packages_for_tests()?;
    }
    if tier == Tier::Kvm {
        let python = clients::python()?;
        env.push(("CASEMATE_TEST_PYTHON".to_owned(), text(&python)?));
    }
    if tier == Tier::Linux {
        let place = workspace::target_dir().join("test");
        let data = place.join("data");
        guests::register(artifacts, &data, Flavour::Cloud)?;
        if arguments.full {
            guests::register(artifacts, &data, Flavour::Generic)?;
        }
        let rootfs = place.join("rootfs");
        guests::busybox_rootfs(&rootfs)?;
        let bzimage = place.join("bzimage");
        guests::bzimage(&bzimage)?;
        env.push(("CASEMATE_TEST_BZIMAGE".to_owned(), text(&bzimage)?));
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

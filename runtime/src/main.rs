//! `casemate`: run untrusted code in jailed microVMs.

mod api;
mod cgroups;
mod cli;
mod clone;
mod doctor;
mod inspect;
mod kernels;
mod layer;
mod metrics;
mod migrate;
mod monitor;
mod page_handler;
mod places;
mod ps;
mod rootfs;
mod run;
mod sandbox;
mod say;
mod snapshot;
mod state;
mod units;
mod vcpus;

use std::fmt::Display;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use cli::{Cli, Command};
use places::Places;

/// Exit code when casemate itself failed, as container tools have it.
const FAILED: u8 = 125;
/// Exit code for a command line that makes no sense.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    // In a guest this very program is PID 1.
    if casemate_init::is_init() {
        casemate_init::main();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            return usage(&error);
        }
    };
    match cli.command {
        Command::Run(args) => run::run(&args).map_or_else(|error| fail(&error), ExitCode::from),
        Command::Ps(args) => written(ps::run(&args)),
        Command::Inspect(args) => done(inspect::run(&args.id, args.json)),
        Command::Doctor(args) => written(doctor::run(args.json)),
        Command::Metrics(args) => done(metrics::run(&args.file)),
        Command::Vcpus(args) => done(vcpus::run(&args.id, args.count)),
        Command::Snapshot(command) => {
            snapshot::run(&command).map_or_else(|error| fail(&error), ExitCode::from)
        }
        Command::Clone(args) => clone::run(&args).map_or_else(|error| fail(&error), ExitCode::from),
        Command::SnapshotGuard(args) => done(snapshot::guard(&args)),
        Command::Migrate(args) => done(migrate::run(&args)),
        Command::Gc => done(gc()),
        Command::Kernel(args) => done(kernels::cli(&args.args)),
        Command::Monitor(args) => done(monitor::main(&args)),
    }
}

/// Help and version as they come; anything else in one line, as all our errors.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    ) {
        let _ = error.print();
        return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
    }
    let text = error.render().to_string();
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    let said = lines.join(" ");
    let said = said.strip_prefix("error: ").unwrap_or(&said);
    say::warn(format_args!("{said} (see --help)"));
    ExitCode::from(USAGE)
}

fn done<E: Display>(result: Result<(), E>) -> ExitCode {
    result.map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS)
}

/// That nobody reads on (`| head`) is no failure.
fn written(result: std::io::Result<()>) -> ExitCode {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        other => done(other),
    }
}

fn fail(error: &dyn Display) -> ExitCode {
    say::warn(error);
    ExitCode::from(FAILED)
}

fn gc() -> Result<(), state::Error> {
    for id in state::gc::run(&Places::from_env())? {
        say::line(format_args!("removed {id}"));
    }
    Ok(())
}

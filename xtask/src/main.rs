//! The project's own tasks, run as `cargo xtask TASK`.
//!
//! The same program is also process 1 of the lab's virtual machine (see [`lab`]): it is
//! static, so it can be its `/init`, and both ends of the lab's wire are one piece of code.

mod artifacts;
mod bench;
mod checks;
mod demo;
mod guests;
mod host;
mod kernels;
mod lab;
mod packages;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Casemate's own tasks", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing, build, and run a program in a jailed microVM
    Demo(demo::Arguments),
    /// Install what is missing, build, and run all tests
    Test(test::Arguments),
    /// Measure
    #[command(subcommand)]
    Bench(bench::Benchmark),
    /// Run a command as root in a software-emulated machine that sees this host's files
    Lab(lab::Arguments),
    /// Build all programs and the probe guest for release
    Build,
    /// Check formatting and lints
    Lint,
    /// Check licences, sources and known vulnerabilities of what we depend on
    Deny,
    /// Lint, deny and test: what must pass before a push
    Prepush,
}

fn main() -> ExitCode {
    if lab::guest::is_process_one() {
        lab::guest::main();
    }
    let outcome = match Arguments::parse().task {
        Task::Demo(arguments) => demo::main(&arguments),
        Task::Test(arguments) => test::main(&arguments),
        Task::Bench(benchmark) => bench::main(&benchmark),
        Task::Lab(arguments) => lab::main(&arguments),
        Task::Build => artifacts::build().map(|artifacts| {
            println!("{}", artifacts.dir.display());
            ExitCode::SUCCESS
        }),
        Task::Lint => checks::lint().map(|()| ExitCode::SUCCESS),
        Task::Deny => checks::deny().map(|()| ExitCode::SUCCESS),
        Task::Prepush => checks::prepush(),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

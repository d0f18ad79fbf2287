//! The checks before tests: formatting, lints, and what we depend on.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::artifacts::{cargo, probe_cargo, run};
use crate::test;
use crate::workspace::{self, say};

/// What the checks run beside cargo's own, and the component that has it: a minimal toolchain comes without.
const COMPONENTS: [(&str, &str); 2] = [("fmt", "rustfmt"), ("clippy", "clippy")];

/// Another version may find other things: what a commit passed must not depend on the day.
const DENY_VERSION: &str = "0.20.2";

/// `cargo xtask prepush`: formatting, lints, dependencies, then all tests.
///
/// # Errors
/// When formatting, a lint or a dependency fails.
pub fn prepush() -> Result<ExitCode> {
    lint()?;
    deny()?;
    test::main(&test::Arguments::default())
}

/// Checks formatting and lints.
///
/// # Errors
/// When one of them complains.
pub fn lint() -> Result<()> {
    add_components()?;
    say("cargo fmt --check");
    run(cargo().args(["fmt", "--all", "--check"]))?;
    say("cargo clippy, warnings are errors");
    let deny = ["--", "--deny", "warnings"];
    run(cargo()
        .args([
            "clippy",
            "--workspace",
            "--exclude",
            "casemate-probe",
            "--all-targets",
        ])
        .args(deny))?;
    run(cargo()
        .args(["clippy", "--package", "casemate-vmm", "--all-targets"])
        .args(["--features", "gdb"])
        .args(deny))?;
    run(probe_cargo("clippy").arg("--release").args(deny))
}

/// Checks licences, sources and banned crates against `deny.toml`, and, where the advisory
/// database can be had, known vulnerabilities.
///
/// # Errors
/// When a check finds something, or cargo-deny cannot be installed.
pub fn deny() -> Result<()> {
    let program = cargo_deny()?;
    let deny = || {
        let mut command = Command::new(&program);
        command.current_dir(workspace::root()).stdin(Stdio::null());
        command.args(["--log-level", "error", "check"]);
        command
    };
    run(deny().args(["bans", "licenses", "sources"]))?;
    say("licences, sources and bans are as deny.toml wants them");
    let advisories = deny()
        .arg("advisories")
        .output()
        .context("run cargo deny check advisories")?;
    if advisories.status.success() {
        say("no known vulnerability in what we depend on");
        return Ok(());
    }
    let said = String::from_utf8_lossy(&advisories.stderr);
    if said.contains("failed to fetch advisory database") {
        say("known vulnerabilities NOT checked: the advisory database cannot be fetched here");
        return Ok(());
    }
    eprint!("{said}");
    bail!(
        "cargo deny check advisories found something in {}",
        workspace::root().display()
    )
}

fn add_components() -> Result<()> {
    for (subcommand, component) in COMPONENTS {
        let works = cargo()
            .args([subcommand, "--version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !works.is_ok_and(|status| status.success()) {
            say(format_args!("adding {component} to the toolchain"));
            let mut rustup = Command::new("rustup");
            // In the checkout, whose toolchain it is.
            rustup
                .args(["component", "add", component])
                .current_dir(workspace::root());
            run(&mut rustup).with_context(|| format!("install {component} by hand"))?;
        }
    }
    Ok(())
}

/// The program of [`DENY_VERSION`]: the user's own if it is that one, else one below the target directory.
fn cargo_deny() -> Result<PathBuf> {
    let tools = workspace::target_dir().join("tools");
    let ours = tools.join("bin/cargo-deny");
    if let Some(found) = [PathBuf::from("cargo-deny"), ours.clone()]
        .into_iter()
        .find(|program| is_right_deny(program))
    {
        return Ok(found);
    }
    say(format_args!(
        "installing cargo-deny {DENY_VERSION} (a few minutes, once)"
    ));
    let mut install = cargo();
    install
        // Outside the checkout, whose configuration makes static programs.
        .current_dir("/")
        .args(["install", "--locked", "--quiet", "--version", DENY_VERSION])
        .arg("--root")
        .arg(&tools)
        .arg("cargo-deny");
    run(&mut install).with_context(|| {
        format!("cargo-deny {DENY_VERSION} cannot be installed: is the crate registry reachable?")
    })?;
    Ok(ours)
}

fn is_right_deny(program: &Path) -> bool {
    let version = Command::new(program).arg("--version").output();
    version.is_ok_and(|output| {
        String::from_utf8_lossy(&output.stdout).trim() == format!("cargo-deny {DENY_VERSION}")
    })
}

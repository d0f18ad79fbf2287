//! The checks before tests: formatting, lints, and what we depend on.

use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::artifacts::{cargo, probe_cargo, run};
use crate::test;
use crate::workspace::{self, say};

/// `cargo xtask prepush`: formatting, lints, then all tests.
///
/// # Errors
/// When formatting or a lint fails.
pub fn prepush() -> Result<ExitCode> {
    lint()?;
    test::main(&test::Arguments::default())
}

/// Checks formatting and lints.
///
/// # Errors
/// When one of them complains.
pub fn lint() -> Result<()> {
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
    run(probe_cargo("clippy").arg("--release").args(deny))
}

/// Checks licences, sources and banned crates against `deny.toml`, and, where the advisory
/// database can be had, known vulnerabilities.
///
/// # Errors
/// When a check finds something, or cargo-deny cannot be installed.
pub fn deny() -> Result<()> {
    if !is_installed() {
        say("installing cargo-deny (a few minutes, once)");
        run(cargo()
            // Outside the checkout, whose configuration makes static programs.
            .current_dir("/")
            .args(["install", "--locked", "--quiet", "cargo-deny"]))
        .context("install cargo-deny by hand, or run without the `deny` task")?;
    }
    run(cargo().args([
        "deny",
        "--log-level",
        "error",
        "check",
        "bans",
        "licenses",
        "sources",
    ]))?;
    say("licences, sources and bans are as deny.toml wants them");
    let advisories = cargo()
        .args(["deny", "--log-level", "error", "check", "advisories"])
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

fn is_installed() -> bool {
    Command::new("cargo-deny")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

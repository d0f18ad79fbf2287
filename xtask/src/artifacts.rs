//! Builds the programs, and the bare-metal probe with flags of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::workspace::{self, say};

/// The programs that make up Casemate.
const PROGRAMS: [&str; 3] = ["casemate", "casemate-jailer", "casemate-vmm"];

/// Bare metal: no C runtime, fixed addresses.
const PROBE_FLAGS: &str = "-C target-feature=-crt-static -C relocation-model=static";

/// The built programs: a directory with all of them.
pub struct Artifacts {
    /// `…/x86_64-unknown-linux-gnu/release`.
    pub dir: PathBuf,
}

impl Artifacts {
    /// The path of one of them.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The path of the probe guest's kernel image.
    pub fn probe(&self) -> PathBuf {
        self.program("casemate-probe")
    }
}

/// Builds everything for release.
///
/// # Errors
/// When cargo fails; it has said why.
pub fn build() -> Result<Artifacts> {
    say("building the programs (cargo build --release)");
    let mut command = cargo();
    command.args(["build", "--release"]);
    for name in PROGRAMS {
        command.args(["--package", name]);
    }
    run(&mut command)?;
    run(probe_cargo("build").arg("--release"))?;
    let dir = workspace::target_dir()
        .join(workspace::TRIPLE)
        .join("release");
    let artifacts = Artifacts { dir };
    for name in PROGRAMS.iter().chain(&["casemate-probe"]) {
        let path = artifacts.program(name);
        if !path.exists() {
            bail!("cargo built no {}", path.display());
        }
    }
    Ok(artifacts)
}

/// Builds the VMM with a debugger's stub as `casemate-vmm-gdb`, which only tests need. To be called before [`build`], for cargo calls it
/// by the same name as the one without.
///
/// # Errors
/// When cargo fails, or its product cannot be renamed.
pub fn build_debugged() -> Result<()> {
    say("building a VMM with its debugger's stub");
    let mut command = cargo();
    command.args([
        "build",
        "--release",
        "--package",
        "casemate-vmm",
        "--features",
        "gdb",
    ]);
    run(&mut command)?;
    let dir = workspace::target_dir()
        .join(workspace::TRIPLE)
        .join("release");
    let (from, to) = (dir.join("casemate-vmm"), dir.join("casemate-vmm-gdb"));
    std::fs::rename(&from, &to).with_context(|| format!("rename {}", from.display()))
}

/// Cargo, in the checkout. Its messages go to standard error.
pub fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(workspace::root()).stdin(Stdio::null());
    command
}

/// A cargo command on the probe alone, with its flags.
pub fn probe_cargo(subcommand: &str) -> Command {
    let mut command = cargo();
    command.env("RUSTFLAGS", PROBE_FLAGS);
    // It would win over RUSTFLAGS.
    command.env_remove("CARGO_ENCODED_RUSTFLAGS");
    command.args([subcommand, "--package", "casemate-probe"]);
    command
}

/// Runs a command that speaks for itself.
///
/// # Errors
/// When it does not succeed.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("run {}", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", shown(command));
    }
    Ok(())
}

/// A command as a person would type it, without directories and environment.
fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program())
        .file_name()
        .unwrap_or(command.get_program());
    std::iter::once(program)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

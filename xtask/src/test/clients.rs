//! The Python environment in which real clients drive the VMM's API: `tests/clients`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::artifacts::run;
use crate::packages;
use crate::workspace::{self, lock, say};

/// Debian's, whatever else is called `python3` here: the clients find the module of package `python3-nftables` by
/// its place.
const PYTHON: &str = "/usr/bin/python3";

/// The environment's Python. It is made unless it is there as `requirements.txt` wants it.
///
/// # Errors
/// When a Debian package or one of PyPI's cannot be installed.
pub fn python() -> Result<PathBuf> {
    packages::install(&[&packages::PYTHON_VENV, &packages::PYTHON_NFTABLES])
        .context("real clients of the API (tests/clients) are Python programs")?;
    let place = workspace::target_dir().join("clients");
    let python = place.join("bin/python");
    let wanted = workspace::root().join("tests/clients/requirements.txt");
    let wanted_text = fs::read(&wanted).with_context(|| format!("read {}", wanted.display()))?;
    // Copied here when all is installed: an interrupted run leaves an environment that does not count.
    let installed = place.join("requirements.txt");
    let is_ready =
        || python.exists() && fs::read(&installed).is_ok_and(|installed| installed == wanted_text);
    if is_ready() {
        return Ok(python);
    }
    let _lock = lock("clients")?;
    // Another run may have made it.
    if !is_ready() {
        make(&place, &wanted).with_context(|| {
            format!(
                "the API's clients could not be installed in {}: is PyPI, or pip's `index-url`, reachable?",
                place.display()
            )
        })?;
        fs::write(&installed, &wanted_text)
            .with_context(|| format!("write {}", installed.display()))?;
    }
    Ok(python)
}

fn make(place: &Path, requirements: &Path) -> Result<()> {
    say(format_args!(
        "installing {} from PyPI in {}",
        requirements.display(),
        place.display()
    ));
    run(Command::new(PYTHON)
        .args(["-m", "venv", "--clear"])
        .arg(place))?;
    let mut pip = Command::new(place.join("bin/python"));
    pip.args(["-m", "pip", "install", "--quiet"]);
    pip.args(["--disable-pip-version-check", "--no-input"]);
    run(pip.arg("--requirement").arg(requirements))
}

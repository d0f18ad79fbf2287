//! The test programs, those of the crates and those of `tests/`, and how one is run here or in the lab.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::tally::{Counter, Tally};
use crate::artifacts::cargo;
use crate::lab::{self, Outcome};
use crate::workspace;

/// The package of `tests/`.
const CROSSING: &str = "tests";

/// Programs without libtest's harness (`harness = false`): they know no options and run as a whole.
const WITHOUT_HARNESS: [&str; 2] = ["session", "unjailed"];

/// A built test program.
pub struct Program {
    /// The target's name, such as `functional_kvm`.
    pub name: String,
    path: PathBuf,
    /// The directory of its package, in which cargo would run it.
    dir: PathBuf,
}

/// How to run it.
pub struct Settings<'a> {
    /// Only tests whose name contains this.
    pub filter: Option<&'a str>,
    /// The `#[ignore]`d ones too.
    pub full: bool,
    /// Variables for the tests.
    pub env: &'a [(String, String)],
    /// The bound of one program.
    pub timeout: Duration,
}

#[derive(Deserialize)]
struct Message {
    reason: String,
    executable: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
    manifest_path: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Builds the test programs of all crates, without running them.
///
/// # Errors
/// When cargo fails.
pub fn build() -> Result<Vec<Program>> {
    let output = cargo()
        .args(["test", "--no-run", "--workspace"])
        .args(["--exclude", "casemate-probe"])
        // The tests beside the code cover it, too; what users get is built without and driven as a whole.
        .args(["--features", "casemate-vmm/gdb"])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("run cargo test --no-run")?;
    if !output.status.success() {
        bail!("the test programs did not build ({})", output.status);
    }
    let mut programs = Vec::new();
    for line in output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let message: Message = serde_json::from_slice(line).context("read cargo's messages")?;
        if let ("compiler-artifact", Some(target), Some(path), Some(manifest)) = (
            message.reason.as_str(),
            message.target,
            message.executable,
            message.manifest_path,
        ) && message.profile.is_some_and(|profile| profile.test)
        {
            let dir = manifest.parent().context("a package without a directory")?;
            programs.push(Program {
                name: target.name,
                path,
                dir: dir.to_path_buf(),
            });
        }
    }
    Ok(programs)
}

/// Runs the examples in the documentation of all crates.
///
/// # Errors
/// When cargo cannot be started.
pub fn run_examples(filter: Option<&str>) -> Result<Tally> {
    let mut command = cargo();
    command.args(["test", "--quiet", "--doc", "--workspace", "--no-fail-fast"]);
    command.args(["--exclude", "casemate-probe"]);
    command.args(filter);
    run_here(&mut command, Duration::from_secs(600), None)
}

impl Program {
    /// Whether it is one of `tests/`, whose name says its tier.
    pub fn crosses_processes(&self) -> bool {
        self.dir == workspace::root().join(CROSSING)
    }

    /// Whether it runs as a whole, by [`Program::run_whole`] only.
    pub fn is_without_harness(&self) -> bool {
        WITHOUT_HARNESS.contains(&self.name.as_str())
    }

    /// The names of its tests that match.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn list(&self, settings: &Settings) -> Result<Vec<String>> {
        let output = Command::new(&self.path)
            .args(["--list", "--format", "terse"])
            .args(settings.filter)
            .output()
            .with_context(|| format!("list the tests of {}", self.name))?;
        if !output.status.success() {
            bail!("{} cannot list its tests ({})", self.name, output.status);
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let tests = text.lines().map(|line| line.strip_suffix(": test"));
        tests
            .map(|test| test.map(str::to_owned))
            .collect::<Option<_>>()
            .with_context(|| format!("{} is no libtest program: see WITHOUT_HARNESS", self.name))
    }

    /// Runs a program without a harness on this host: one test.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run_whole(&self, settings: &Settings) -> Result<Tally> {
        let mut command = self.command(settings);
        let mut tally = run_here(&mut command, settings.timeout, Some((&self.name, 0)))?;
        if tally.failed == 0 {
            tally.passed += 1;
        }
        Ok(tally)
    }

    fn command(&self, settings: &Settings) -> Command {
        let mut command = Command::new(&self.path);
        command.envs(settings.env.iter().map(|(name, value)| (name, value)));
        command
            .env("CARGO_MANIFEST_DIR", &self.dir)
            .current_dir(&self.dir)
            .stdin(Stdio::null());
        command
    }

    fn arguments(&self, settings: &Settings, tests: &[String]) -> Vec<String> {
        let mut words = vec!["--exact".to_owned()];
        if settings.full {
            words.push("--include-ignored".to_owned());
        }
        words.extend_from_slice(tests);
        words
    }

    /// Runs `tests` on this host.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run_here(&self, settings: &Settings, tests: &[String]) -> Result<Tally> {
        let mut command = self.command(settings);
        command.args(self.arguments(settings, tests));
        run_here(
            &mut command,
            settings.timeout,
            Some((&self.name, tests.len())),
        )
    }

    /// Runs `tests` in labs, as many side by side as this host has room for.
    ///
    /// A lab has one CPU, and so its tests run one by one.
    pub fn run_in_labs(&self, settings: &Settings, tests: &[String], labs: usize) -> Tally {
        let total = Mutex::new(Tally::default());
        let labs = labs.clamp(1, tests.len().max(1));
        thread::scope(|scope| {
            for number in 0..labs {
                let share: Vec<String> = tests.iter().skip(number).step_by(labs).cloned().collect();
                let total = &total;
                scope.spawn(move || {
                    let prefix = format!("{} in lab {}: ", self.name, number + 1);
                    let tally =
                        self.run_in_lab(settings, &share, &prefix)
                            .unwrap_or_else(|error| {
                                let mut tally = Tally::default();
                                tally.problem(format!("{prefix}{error:#}"));
                                tally
                            });
                    total
                        .lock()
                        .unwrap_or_else(std::sync::PoisonError::into_inner)
                        .add(tally);
                });
            }
        });
        total
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn run_in_lab(&self, settings: &Settings, tests: &[String], prefix: &str) -> Result<Tally> {
        let path = self
            .path
            .to_str()
            .context("a test program's name is not UTF-8")?;
        let mut command = vec![path.to_owned(), "--test-threads=1".to_owned()];
        command.extend(self.arguments(settings, tests));
        let job = lab::Job {
            command,
            timeout: settings.timeout,
            silence: lab::SILENCE,
            memory: lab::DEFAULT_MEMORY,
            env: settings.env.to_vec(),
            keep_log: None,
            stdin: false,
        };
        let counter = Counter::new(prefix);
        let outcome = lab::run(&job, &mut counter.clone(), &mut io::stderr())?;
        let mut tally = counter.tally();
        let end = match outcome {
            Outcome::Exited(code) => format!("it ended with code {code}"),
            Outcome::Hung => "the lab hung".to_owned(),
            Outcome::TimedOut => format!("its {} s were over", settings.timeout.as_secs()),
            Outcome::Broken => "the lab broke".to_owned(),
        };
        settle(
            &mut tally,
            outcome == Outcome::Exited(0),
            &end,
            prefix,
            Some(tests.len()),
        );
        Ok(tally)
    }
}

/// Counts as failed what never reported, so that no test disappears in silence.
fn settle(tally: &mut Tally, success: bool, end: &str, name: &str, expected: Option<usize>) {
    let name = name.trim_end_matches(": ");
    let missing = expected.map_or(0, |expected| expected.saturating_sub(tally.reported()));
    if missing > 0 {
        tally.failed += missing;
        tally
            .problems
            .push(format!("{name}: {missing} tests did not report, {end}"));
    } else if !success && tally.failed == 0 {
        tally.problem(format!("{name}: {end}"));
    }
}

/// Runs a command on this host within a bound, its output shown and counted.
fn run_here(command: &mut Command, bound: Duration, tests: Option<(&str, usize)>) -> Result<Tally> {
    let name = tests.map_or("cargo test", |(name, _)| name);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {name}"))?;
    let mut stdout = child.stdout.take().context("no pipe")?;
    let counter = Counter::new("");
    let mut writer = counter.clone();
    let (done, ended) = mpsc::channel::<()>();
    // It ends with the pipe; the channel's end closes with it.
    let reader = thread::spawn(move || {
        let _done = done;
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length) = stdout.read(&mut buffer) {
            let Some(read) = buffer.get(..length).filter(|read| !read.is_empty()) else {
                break;
            };
            if writer.write_all(read).is_err() {
                break;
            }
        }
    });
    let in_time = ended.recv_timeout(bound) != Err(RecvTimeoutError::Timeout);
    let (success, end) = finish(&mut child, in_time)?;
    if in_time {
        // A panic in it has been printed; what it counted until then still counts.
        let _ = reader.join();
    }
    let mut tally = counter.tally();
    settle(
        &mut tally,
        success,
        &end,
        name,
        tests.map(|(_, count)| count),
    );
    Ok(tally)
}

fn finish(child: &mut Child, in_time: bool) -> Result<(bool, String)> {
    if !in_time {
        child.kill()?;
    }
    let status = child.wait()?;
    let end = if in_time {
        format!("it ended with {status}")
    } else {
        "it was ended: too slow".into()
    };
    Ok((in_time && status.success(), end))
}

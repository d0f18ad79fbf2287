//! `cargo xtask demo`: from a clean checkout to a program in a jailed microVM.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::artifacts::{self, Artifacts};
use crate::guests;
use crate::host::{Host, Where, need_root};
use crate::lab;
use crate::packages::{self, Flavour};
use crate::workspace::{self, say};

/// What runs in the guest unless a script is given.
const PROGRAM: &str = r#"
uname -a
echo "CPUs: $(nproc)"
grep MemTotal /proc/meminfo
"#;

/// Runs a machine, shows its exit code, then the report that was taken while it ran.
const SHOW: &str = r#"
report=$(mktemp) || exit 1
"$@" --confinement-report "$report" -- sh -c "$PROGRAM"
code=$?
echo
echo "exit code: $code"
echo
echo "--- what confined it, as the kernel showed it while the guest ran"
cat "$report"
rm -f "$report"
exit "$code"
"#;

/// `cargo xtask demo`
#[derive(clap::Args)]
#[command(after_help = "The script's exit code is the demo's: try `cargo xtask demo -- 'exit 7'`.")]
pub struct Arguments {
    /// The guest's kernel: an ELF image or a bzImage [default: the distribution's cloud kernel]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// A shell script to run in the guest
    #[arg(last = true, value_name = "SCRIPT")]
    script: Option<String>,
}

/// Runs the demo.
///
/// # Errors
/// When something on the way to the guest fails.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    let started = Instant::now();
    need_root("demo")?;
    packages::install(&[&packages::BUSYBOX, &packages::EROFS])?;
    let artifacts = artifacts::build()?;
    let choice = Host::look(&artifacts)?.for_linux();
    say(format_args!("the guest runs {choice}"));

    let data = workspace::target_dir().join("demo/data");
    let kernel = match &arguments.kernel {
        Some(file) => {
            guests::register_file(&artifacts, &data, "own", file)?;
            "own"
        }
        None => guests::register(&artifacts, &data, Flavour::Cloud)?,
    };
    let rootfs = workspace::target_dir().join("demo/rootfs");
    guests::busybox_rootfs(&rootfs)?;

    let script = arguments.script.as_deref().unwrap_or(PROGRAM);
    let machine = machine(&artifacts, kernel, &rootfs)?;
    say(format_args!(
        "casemate {}",
        machine.get(1..).unwrap_or_default().join(" ")
    ));
    let code = run(choice.place, &machine, script, &data)?;
    say(format_args!(
        "done in {:.0} s",
        started.elapsed().as_secs_f64()
    ));
    Ok(ExitCode::from(code))
}

fn machine(artifacts: &Artifacts, kernel: &str, rootfs: &Path) -> Result<Vec<String>> {
    let text = |path: &Path| {
        path.to_str()
            .map(str::to_owned)
            .with_context(|| format!("{} is not UTF-8", path.display()))
    };
    let casemate = text(&artifacts.program("casemate"))?;
    let rootfs = text(rootfs)?;
    let words = [
        &casemate, "run", "--kernel", kernel, "--rootfs", &rootfs, "--cpus", "2", "--memory", "256",
    ];
    Ok(words.map(str::to_owned).to_vec())
}

fn run(place: Where, machine: &[String], program: &str, data: &Path) -> Result<u8> {
    let mut command: Vec<String> = ["sh", "-c", SHOW, "demo"].map(str::to_owned).to_vec();
    command.extend_from_slice(machine);
    let data = data
        .to_str()
        .context("the target directory's name is not UTF-8")?;
    match place {
        Where::Here => {
            let status = Command::new("sh")
                .args(command.iter().skip(1))
                .env("CASEMATE_DATA_DIR", data)
                .env("PROGRAM", program)
                .status()
                .context("run sh")?;
            // A shell ended by a signal has no code.
            Ok(status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(1))
        }
        Where::Lab => {
            say("starting the lab (about 5 s), and the guest in it (about 10 s)");
            let job = lab::Job {
                command,
                timeout: Duration::from_secs(150),
                silence: lab::SILENCE,
                memory: lab::DEFAULT_MEMORY,
                env: vec![
                    ("CASEMATE_DATA_DIR".to_owned(), data.to_owned()),
                    ("PROGRAM".to_owned(), program.to_owned()),
                ],
                keep_log: None,
                stdin: false,
            };
            Ok(lab::run(&job, &mut io::stdout(), &mut io::stderr())?.code())
        }
    }
}

//! A prisoner: a static program that stands where the VMM stands, behind the same walls, and tries
//! to get out. Started by hand or by the jailer (`--exec-file`), it prints one line per attempt:
//! `ATTEMPT: possible` or `ATTEMPT: refused: ERROR`.
//!
//! `casemate-prisoner [--landlock] [--seccomp ROLE STAGE] ATTEMPT…|all`
//!
//! The switches put up the walls that the VMM puts up itself; the jailer's are there or not.
//!
//! `casemate-prisoner … ask WORD…` attacks its broker instead (see [`ask`]). With `stay` among the
//! attempts it goes on after them until its standard input ends, to be looked at from outside.

mod ask;
mod attempts;
mod broker;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use casemate_seccomp_filters::{Role, Stage, install, install_violation_reporter};
use casemate_vmm::lockdown::landlock_nothing;

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("casemate-prisoner: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    install_violation_reporter()?;
    let mut landlock = false;
    let mut seccomp = None;
    let mut names = Vec::new();
    let mut handover = None;
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .with_context(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            "--landlock" => landlock = true,
            "--seccomp" => seccomp = Some((role(&value()?)?, stage(&value()?)?)),
            // The jailer adds these for a VMM.
            "--id" => drop(value()?),
            "--handover-fd" => handover = Some(value()?.parse()?),
            option if option.starts_with('-') => bail!("unknown option {option}"),
            _ => names.push(argument),
        }
    }
    if let [what, name] = names.as_slice()
        && what == "sealed-broker"
    {
        return broker::serve_sealed(role(name)?);
    }
    if let Some(("ask", words)) = names
        .split_first()
        .map(|(first, rest)| (first.as_str(), rest))
    {
        return ask::run(handover.context("ask needs --handover-fd")?, words);
    }
    if names == ["all"] {
        names = attempts::ALL
            .iter()
            .map(|(name, _)| (*name).into())
            .collect();
    }
    // Opened while it is allowed: attempts start from what a VMM has, too.
    let held = attempts::Held::open();
    if landlock {
        println!("{}", landlock_nothing(false)?);
    }
    if let Some((role, stage)) = seccomp {
        install(role, stage)?;
    }
    for name in names {
        if name == "stay" {
            println!("stays");
            std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
            continue;
        }
        let (_, attempt) = attempts::ALL
            .iter()
            .find(|(known, _)| *known == name)
            .with_context(|| format!("no attempt {name}"))?;
        match attempt(&held) {
            Ok(()) => println!("{name}: possible"),
            Err(error) => println!("{name}: refused: {error}"),
        }
    }
    Ok(())
}

fn role(name: &str) -> Result<Role> {
    let mut roles = Role::ALL.into_iter();
    let found = roles.find(|role| role.name() == name);
    found.with_context(|| format!("no role {name}"))
}

fn stage(name: &str) -> Result<Stage> {
    let mut stages = Stage::ALL.into_iter();
    let found = stages.find(|stage| stage.name() == name);
    found.with_context(|| format!("no stage {name}"))
}

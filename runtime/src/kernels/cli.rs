//! `casemate kernel …`.

use super::add::{Origin, add};
use super::store::Store;
use super::{Error, jail};
use crate::say;
use clap::{Parser, Subcommand};
use serde::Serialize;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

/// Register, list and remove guest kernels
#[derive(Debug, Parser)]
#[command(
    name = "casemate kernel",
    bin_name = "casemate kernel",
    disable_help_subcommand = true
)]
struct KernelCli {
    #[command(subcommand)]
    command: KernelCommand,
}

#[derive(Debug, Subcommand)]
enum KernelCommand {
    /// Register a kernel: unpack it once, jailed, with its modules
    Add {
        /// A kernel image: bzImage or ELF (vmlinux)
        #[arg(required_unless_present_any = ["deb", "host"], conflicts_with_all = ["deb", "host"])]
        file: Option<PathBuf>,
        /// The name to register it under [default: its release]
        #[arg(long)]
        name: Option<String>,
        /// The directory of FILE's modules, such as /lib/modules/RELEASE
        #[arg(long, value_name = "DIR", requires = "file")]
        modules: Option<PathBuf>,
        /// A Debian package with the kernel (once more for modules in a package of their own)
        #[arg(long, value_name = "PACKAGE", conflicts_with = "host")]
        deb: Vec<PathBuf>,
        /// The kernel that this host runs, from /boot and /lib/modules
        #[arg(long)]
        host: bool,
        /// Leave one of the unpacker's walls out where this host lacks it
        #[arg(long, value_name = "WALL", value_parser = ["landlock"])]
        allow_missing: Vec<String>,
    },
    /// List the registered kernels
    Ls {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove a kernel; running machines keep theirs
    Rm {
        /// Its name
        name: String,
    },
    /// Show or choose the kernel that is used when none is named
    Default {
        /// Its name
        name: Option<String>,
    },
    /// Unpack hostile input (started by `add`)
    #[command(hide = true)]
    Jailed {
        job: jail::Job,
        /// Who waits for the result.
        #[arg(long)]
        parent: i32,
        #[arg(long, value_name = "WALL", value_parser = ["landlock"])]
        allow_missing: Vec<String>,
    },
}

/// One line of `kernel ls`.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    release: String,
    /// Modules for machines; null when the kernel came without.
    modules: Option<usize>,
    size: u64,
    source: String,
    default: bool,
    /// An earlier version registered it, which knew of fewer drivers.
    outdated: bool,
}

/// Runs `casemate kernel` with what follows these two words.
pub fn cli(args: &[OsString]) -> Result<(), Error> {
    let words = std::iter::once(OsString::from("casemate kernel")).chain(args.iter().cloned());
    let cli = match KernelCli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            say::line(error.to_string().trim_end());
            return Ok(());
        }
        Err(error) => {
            return Err(Error::Usage(
                error
                    .to_string()
                    .trim_end()
                    .trim_start_matches("error: ")
                    .to_owned(),
            ));
        }
    };
    let store = Store::open();
    match cli.command {
        KernelCommand::Add {
            file,
            name,
            modules,
            deb,
            host,
            allow_missing,
        } => {
            let origin = match file {
                _ if host => Origin::host(),
                Some(image) => Origin::File { image, modules },
                None => Origin::Packages(deb),
            };
            let added = add(&store, &origin, name.as_deref(), !allow_missing.is_empty())?;
            let what = if added.already {
                "is registered already"
            } else {
                "registered"
            };
            say::line(format_args!("kernel {} {what}", added.name));
        }
        KernelCommand::Ls { json } => list(&store, json)?,
        KernelCommand::Rm { name } => {
            let _lock = store.lock()?;
            store.remove(&name)?;
        }
        KernelCommand::Default { name: Some(name) } => {
            let _lock = store.lock()?;
            store.set_default(&name)?;
        }
        KernelCommand::Default { name: None } => say::line(store.default_name()?),
        KernelCommand::Jailed {
            job,
            parent,
            allow_missing,
        } => {
            // A process of its own: its exit code is its answer.
            let done = jail::child(job, parent, !allow_missing.is_empty());
            std::process::exit(i32::from(!done));
        }
    }
    Ok(())
}

fn list(store: &Store, json: bool) -> Result<(), Error> {
    let default = store.default_name().unwrap_or_default();
    let mut lines = Vec::new();
    for name in store.names()? {
        let meta = store.meta(&name)?;
        lines.push(Line {
            outdated: meta
                .index
                .as_ref()
                .is_some_and(|index| !index.is_complete()),
            release: meta.release,
            modules: meta.index.map(|index| index.modules.len()),
            size: fs::metadata(store.vmlinux(&name)).map_or(0, |data| data.len()),
            source: meta.source,
            default: name == default,
            name,
        });
    }
    if json {
        let text = serde_json::to_string_pretty(&lines).unwrap_or_default();
        say::line(text);
        return Ok(());
    }
    say::line(format_args!(
        "{:<28} {:<28} {:>7} {:>8}  SOURCE",
        "NAME", "RELEASE", "MODULES", "SIZE"
    ));
    for line in lines {
        let modules = line.modules.map_or("-".into(), |count| count.to_string());
        let mark = if line.default { " *" } else { "" };
        let outdated = if line.outdated {
            "  (add it again for all drivers)"
        } else {
            ""
        };
        say::line(format_args!(
            "{:<28} {:<28} {modules:>7} {:>4} MiB  {}{outdated}",
            format!("{}{mark}", line.name),
            shown(&line.release),
            line.size >> 20,
            shown(&line.source)
        ));
    }
    Ok(())
}

/// Without what could steer a terminal: a package or a path said it.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

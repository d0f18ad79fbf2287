//! The program: arguments, what the jailer handed over, run.

use std::fs::File;
use std::io::Write;
use std::process::exit;

use casemate_broker::exit::BAD_INPUT;
use casemate_broker::{Handover, Kind};
use casemate_vmm::arguments::{self, Arguments, RunArguments};
use casemate_vmm::control::{Control, api, observe};
use casemate_vmm::devices::boot_timer::Moment;
use casemate_vmm::ending::End;
use casemate_vmm::metrics::{self, Reporter};
use casemate_vmm::resources::{Beginning, Jail, Served, Source};
use casemate_vmm::{Error, lockdown, logging, machine, memory, offline, snapshot};
use log::{error, info, warn};

fn main() {
    let code = match start() {
        Ok(None) => 0,
        Ok(Some(end)) => {
            match &end {
                End::Failed(why) => error!("the VMM failed: {why}"),
                End::Crashed(why) => error!("the guest crashed: {why}"),
                other => info!("the machine has ended: {other:?}"),
            }
            end.exit_code()
        }
        Err(error) => {
            // As one write, so that lines of several machines do not mix.
            let _ = std::io::stderr().write_all(format!("casemate-vmm: {error}\n").as_bytes());
            BAD_INPUT
        }
    };
    Control::restore_terminal();
    // At once: taking the machine down piece by piece would only delay whoever waits for the code.
    exit(code.into());
}

fn start() -> Result<Option<End>, Error> {
    lockdown::install_violation_reporter()?;
    memory::heap::share_among_threads();
    match arguments::parse(std::env::args_os().skip(1))? {
        Arguments::Help => println!("{}", arguments::HELP),
        Arguments::Version => {
            println!("casemate-vmm {}", env!("CARGO_PKG_VERSION"));
            // What tools look for that decide by it what they can ask for.
            println!("with the API of Firecracker v{}", api::API_VERSION);
        }
        Arguments::SnapshotVersion => println!("{}", snapshot::VERSION),
        Arguments::Look(look) => print!("{}", offline::look(&look)?),
        Arguments::MergeMemory(paths) => offline::merge(paths.each_ref().map(String::as_str))?,
        Arguments::Run(run) => return self::run(&run).map(Some),
    }
    Ok(None)
}

fn run(arguments: &RunArguments) -> Result<End, Error> {
    let start = Moment::now();
    let (mut source, log_file) = source(arguments)?;
    logging::start(
        arguments.id.to_string(),
        arguments.logging.clone(),
        log_file,
    );
    // Early, so that clients need not wait for it, and not before the broker, which shall not hold it.
    let listener = match (&mut source, &arguments.api_sock) {
        (Source::Served(served), Some(path)) => Some(served.api_listener(path)?),
        _ => None,
    };
    let config_file = arguments.config_file.as_deref();
    let config = config_file.map(|path| source.config(path)).transpose()?;
    let start_now = config.is_some();
    let config = config.unwrap_or_default();
    let mut reporter = Reporter::new(logging::metrics());
    if let Some(path) = &arguments.metrics_path {
        reporter.start(source.append("metrics", path)?, metrics::Options::default());
    }
    reporter.report_start(arguments.start_times);
    let id = arguments.id.as_str();
    observe::apply(&config, &mut source, &mut reporter, id)?;
    let metadata = source.metadata(arguments.metadata.as_deref(), arguments.mmds_size_limit)?;
    let machine = machine::Options {
        boot_timer: arguments.boot_timer.then_some(start),
        enable_pci: arguments.enable_pci,
        can_be_saved: arguments.api_sock.is_some(),
    };
    // Once there is a machine: who is refused one has another line to read.
    let warn_of_no_jail = || {
        if arguments.handover_fd.is_none() {
            warn!("there is no jail around this machine: start it with casemate-jailer");
        }
    };
    match listener {
        None => {
            let mut resources = source.open(&config, Beginning::Boot)?;
            resources.metadata = metadata;
            source.lock_down()?;
            let control = Control::new(reporter)?;
            let machine = machine::build(&config, resources, machine, None)?;
            warn_of_no_jail();
            control.run(machine)
        }
        Some(listener) => {
            let options = api::Options {
                listener,
                max_payload: arguments.max_payload,
                id: id.to_owned(),
                machine,
                config,
                metadata,
            };
            warn_of_no_jail();
            Control::new(reporter)?.serve(options, source, start_now)
        }
    }
}

/// Where everything comes from, and the log's file.
fn source(arguments: &RunArguments) -> Result<(Source, Option<File>), Error> {
    let api = arguments.api_sock.is_some();
    let (mut source, log) = match arguments.handover_fd {
        Some(number) => {
            // The jailer executes a descriptor, which has no name to show. Without a jailer the program
            // keeps the name that it was called by: other people's tools look for it.
            lockdown::name_thread("control");
            // Nothing needs opening, so the walls go up before the first byte is read.
            lockdown::lock_down()?;
            let mut handover = Handover::from_inherited(number)?;
            let log = handover.remaining().any(|(_, kind)| kind == Kind::Log);
            let log = log
                .then(|| handover.take("log", &[Kind::Log]))
                .transpose()?;
            let source = match api {
                true => Source::Served(Box::new(Served::jailed(handover)?)),
                false => Source::Jailed(Jail::new(handover)?),
            };
            (source, log.map(File::from))
        }
        None if api => (Source::Served(Box::new(Served::direct()?)), None),
        None => (Source::Direct, None),
    };
    let log = match (log, arguments.log_path.as_deref()) {
        (Some(log), _) => Some(log),
        (None, path) => path.map(|path| source.append("log", path)).transpose()?,
    };
    Ok((source, log))
}

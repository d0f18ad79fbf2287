//! The program: arguments, what the jailer handed over, run.

use std::fs::File;
use std::io::Write;
use std::process::exit;

use casemate_broker::exit::BAD_INPUT;
use casemate_broker::{Handover, Kind};
use casemate_vmm::arguments::{self, Arguments, RunArguments};
use casemate_vmm::config::Config;
use casemate_vmm::control::Control;
use casemate_vmm::devices::boot_timer::Moment;
use casemate_vmm::ending::End;
use casemate_vmm::lockdown::{self, Role, Stage};
use casemate_vmm::metrics::{self, Reporter};
use casemate_vmm::resources::{Jail, Source};
use casemate_vmm::{Error, logging, machine, memory};
use log::{debug, error, info, warn};

fn main() {
    let code = match start() {
        Ok(None) => 0,
        Ok(Some(end)) => {
            match &end {
                End::Failed(why) => error!("the VMM failed: {why}"),
                End::Crashed(why) => debug!("crash: {why}"),
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
    lockdown::name_thread("control");
    memory::heap::share_among_threads();
    match arguments::parse(std::env::args_os().skip(1))? {
        Arguments::Help => println!("{}", arguments::HELP),
        Arguments::Version => println!("casemate-vmm {}", env!("CARGO_PKG_VERSION")),
        Arguments::Run(run) => return self::run(&run).map(Some),
    }
    Ok(None)
}

fn run(arguments: &RunArguments) -> Result<End, Error> {
    let jailed = arguments.handover_fd.is_some();
    let start = Moment::now();
    let (mut source, log_file) = match arguments.handover_fd {
        Some(number) => {
            // Nothing needs opening, so the walls go up before the first byte is read.
            lock_down()?;
            let mut handover = Handover::from_inherited(number)?;
            let log = handover.remaining().any(|(_, kind)| kind == Kind::Log);
            let log = log
                .then(|| handover.take("log", &[Kind::Log]))
                .transpose()?;
            let mut source = Source::Jailed(Jail::new(handover)?);
            let log = match (log, arguments.log_path.as_deref()) {
                (Some(log), _) => Some(File::from(log)),
                (None, path) => path.map(|path| source.append("log", path)).transpose()?,
            };
            (source, log)
        }
        None => {
            let mut source = Source::Direct;
            let log = arguments.log_path.as_deref();
            let log = log.map(|path| source.append("log", path)).transpose()?;
            (source, log)
        }
    };
    logging::start(
        arguments.id.to_string(),
        arguments.logging.clone(),
        log_file,
    );
    let config = source.config(&arguments.config_file)?;
    if let Some(logger) = &config.logger {
        let file = logger.log_path.as_deref();
        let file = file.map(|path| source.append("log", path)).transpose()?;
        logging::apply(logger, file)?;
    }
    let reporter = reporter(arguments, &config, &mut source)?;
    let metadata = source.metadata(arguments.metadata.as_deref(), arguments.mmds_size_limit)?;
    let mut resources = source.open(&config)?;
    resources.metadata = metadata;
    if !jailed {
        lock_down()?;
    }
    let options = machine::Options {
        boot_timer: arguments.boot_timer.then_some(start),
        enable_pci: arguments.enable_pci,
    };
    let control = Control::new(reporter)?;
    let machine = machine::build(&config, resources, options)?;
    if !jailed {
        warn!("there is no jail around this machine: start it with casemate-jailer");
    }
    control.run(machine)
}

/// The metrics, which go where the command line says or else the config.
fn reporter(
    arguments: &RunArguments,
    config: &Config,
    source: &mut Source,
) -> Result<Reporter, Error> {
    let mut reporter = Reporter::new(logging::metrics());
    reporter.report_start(arguments.start_times);
    let (path, options) = match (&arguments.metrics_path, &config.metrics) {
        (Some(path), _) => (path, metrics::Options::default()),
        (None, Some(section)) => {
            let options = metrics::Options::of(section, arguments.id.as_str());
            (&section.metrics_path, options)
        }
        (None, None) => return Ok(reporter),
    };
    reporter.start(source.append("metrics", path)?, options);
    Ok(reporter)
}

/// Everything is open: from here on nothing can be opened any more.
fn lock_down() -> Result<(), Error> {
    lockdown::enter(Role::Control, Stage::Setup)?;
    // Whether its absence is tolerable is the jailer's decision, and it has been made.
    let outcome = lockdown::landlock_nothing(true)?;
    info!("{outcome}");
    Ok(())
}

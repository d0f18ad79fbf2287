//! The config's `logger` and `metrics`: what the VMM says of itself, and where to.

use thiserror::Error;

use crate::config::{Config, Logger, Metrics};
use crate::logging;
use crate::metrics::{self, Reporter};
use crate::resources::{self, Source};

/// Why the VMM cannot say it.
#[derive(Debug, Error)]
pub enum Error {
    /// The file is not there.
    #[error(transparent)]
    Resources(#[from] resources::Error),
    /// A module's name that is none.
    #[error("logger.module: {0}")]
    Module(#[from] logging::FilterError),
    /// Metrics go somewhere already.
    #[error("metrics go somewhere already, and that cannot be changed")]
    MetricsTwice,
}

/// Does what both sections of a config file say; its `metrics` only where the command line has not said
/// another place.
///
/// # Errors
/// See [`Error`].
pub fn apply(
    config: &Config,
    source: &mut Source,
    reporter: &mut Reporter,
    id: &str,
) -> Result<(), Error> {
    if let Some(logger) = &config.logger {
        log(logger, source)?;
    }
    match &config.metrics {
        Some(metrics) if !reporter.has_started() => self::metrics(metrics, source, reporter, id),
        _ => Ok(()),
    }
}

/// Changes the log.
///
/// # Errors
/// When its file cannot be had, or the module is none; it stays as it is then.
pub fn log(logger: &Logger, source: &mut Source) -> Result<(), Error> {
    let file = logger.log_path.as_deref();
    let file = file.map(|path| source.append("log", path)).transpose()?;
    Ok(logging::apply(logger, file)?)
}

/// Starts writing metrics.
///
/// # Errors
/// When their file cannot be had, or they are being written already.
pub fn metrics(
    metrics: &Metrics,
    source: &mut Source,
    reporter: &mut Reporter,
    id: &str,
) -> Result<(), Error> {
    if reporter.has_started() {
        return Err(Error::MetricsTwice);
    }
    let file = source.append("metrics", &metrics.metrics_path)?;
    let options = metrics::Options::of(metrics, id);
    reporter.start(file, options);
    Ok(())
}

//! `logger`: the VMM's log.

use log::LevelFilter;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What is logged, where to, and how it looks. What is not given stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file or pipe.
    pub log_path: Option<String>,
    /// What is logged.
    pub level: Option<Level>,
    /// Whether each line shows its level.
    pub show_level: Option<bool>,
    /// Whether each line shows its place in the source.
    pub show_log_origin: Option<bool>,
    /// The module, and those in it, that alone is logged.
    pub module: Option<String>,
}

/// A log level: `Off`, `Trace`, `Debug`, `Info`, `Warn` (also `Warning`) or `Error`, in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(pub LevelFilter);

impl Level {
    /// The level of that name.
    pub fn named(name: &str) -> Option<Self> {
        if name.eq_ignore_ascii_case("warning") {
            return Some(Self(LevelFilter::Warn));
        }
        name.parse().ok().map(Self)
    }
}

impl<'de> Deserialize<'de> for Level {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::named(&name).ok_or_else(|| {
            D::Error::custom(format!(
                "{name:.80?} is no level: use Off, Error, Warning, Info, Debug or Trace"
            ))
        })
    }
}

impl Serialize for Level {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self.0 {
            LevelFilter::Off => "Off",
            LevelFilter::Error => "Error",
            LevelFilter::Warn => "Warn",
            LevelFilter::Info => "Info",
            LevelFilter::Debug => "Debug",
            LevelFilter::Trace => "Trace",
        })
    }
}

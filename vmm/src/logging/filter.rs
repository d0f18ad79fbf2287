//! Which modules are logged, and how much of them (`--module`).

use log::LevelFilter;
use thiserror::Error;

/// What every module path of this program begins with; a filter may leave it out.
const CRATE: &str = "casemate_vmm::";

/// Which modules are logged.
///
/// `net` or `virtio::net` is one module with all below it: nothing else is logged.
/// `virtio::net=debug,boot=trace` gives modules levels of their own; everything else has the usual
/// one. Of several that fit, the longest counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only this module.
    only: Option<String>,
    levels: Vec<(String, LevelFilter)>,
}

/// Why a text is no filter.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FilterError {
    /// No level of that name.
    #[error("{0:?} is no level: use off, error, warn, info, debug or trace")]
    Level(String),
    /// A name that no module has.
    #[error("{0:?} is no module: use a path such as `virtio::net`")]
    Module(String),
}

impl std::str::FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        if !text.contains('=') {
            let only = Some(module(text)?);
            return Ok(Self {
                only,
                levels: Vec::new(),
            });
        }
        let levels = text
            .split(',')
            .map(|part| {
                let (name, level) = part.split_once('=').unwrap_or((part, ""));
                let level = level
                    .parse()
                    .map_err(|_| FilterError::Level(level.to_owned()))?;
                Ok((module(name)?, level))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { only: None, levels })
    }
}

fn module(text: &str) -> Result<String, FilterError> {
    let name = text.strip_prefix(CRATE).unwrap_or(text);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
    if name.is_empty() || !name.chars().all(plain) {
        return Err(FilterError::Module(text.to_owned()));
    }
    Ok(name.to_owned())
}

impl Filter {
    /// What of `target` (a module's path) is logged, where others are logged up to `level`.
    pub fn level_of(&self, target: &str, level: LevelFilter) -> LevelFilter {
        let path = target.strip_prefix(CRATE).unwrap_or(target);
        if self.only.as_ref().is_some_and(|only| !within(path, only)) {
            return LevelFilter::Off;
        }
        let fitting = self.levels.iter().filter(|(name, _)| within(path, name));
        let longest = fitting.max_by_key(|(name, _)| name.len());
        longest.map_or(level, |(_, level)| *level)
    }

    /// The most that any module is logged.
    pub fn max_level(&self, level: LevelFilter) -> LevelFilter {
        let levels = self.levels.iter().map(|(_, level)| *level);
        levels.fold(level, Ord::max)
    }
}

/// Whether `path` is `module`, or below it. A module is named from the root or from anywhere on the
/// way: `net` is also `virtio::net`.
fn within(path: &str, module: &str) -> bool {
    let mut rest = path;
    loop {
        if let Some(after) = rest.strip_prefix(module)
            && (after.is_empty() || after.starts_with("::"))
        {
            return true;
        }
        match rest.split_once("::") {
            Some((_, next)) => rest = next,
            None => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use LevelFilter::{Debug, Error, Off, Trace, Warn};

    fn level(filter: &str, path: &str) -> LevelFilter {
        let filter: Filter = filter.parse().unwrap();
        filter.level_of(path, Warn)
    }

    #[test]
    fn one_module_silences_the_others() {
        for name in ["net", "virtio::net", "casemate_vmm::virtio::net"] {
            assert_eq!(level(name, "casemate_vmm::virtio::net"), Warn);
            assert_eq!(level(name, "casemate_vmm::virtio::net::tap"), Warn);
            assert_eq!(level(name, "casemate_vmm::virtio::netting"), Off);
            assert_eq!(level(name, "casemate_vmm::virtio"), Off);
        }
    }

    #[test]
    fn modules_have_levels_of_their_own() {
        let filter = "virtio=debug,virtio::net=error,boot=trace";
        assert_eq!(level(filter, "casemate_vmm::virtio::block"), Debug);
        assert_eq!(level(filter, "casemate_vmm::virtio::net::tap"), Error);
        assert_eq!(level(filter, "casemate_vmm::boot"), Trace);
        assert_eq!(level(filter, "casemate_vmm::kvm"), Warn);
        let filter: Filter = filter.parse().unwrap();
        assert_eq!(filter.max_level(Warn), Trace);
        assert_eq!(Filter::default().max_level(Warn), Warn);
    }

    #[test]
    fn refuses_what_names_nothing() {
        for (text, part) in [
            ("", "module"),
            ("a b", "module"),
            ("net=loud", "loud"),
            ("net=debug,", "no level"),
            ("=debug", "module"),
        ] {
            let error = text.parse::<Filter>().unwrap_err().to_string();
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }
}

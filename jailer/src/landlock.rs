//! Landlock: the wall behind the empty root, for a descriptor that leads somewhere.

use std::os::fd::{BorrowedFd, OwnedFd};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

use crate::error::{Result, refused};
use crate::helper::root::Use;

/// The newest version whose rights were tested here. Older kernels enforce what they know.
const ABI_WANTED: ABI = ABI::V7;
const ABI_WANTED_NUMBER: i32 = 7;

/// What came with each version of Landlock, oldest first.
const RIGHTS: [(i32, &str); 5] = [
    (2, "moving files between directories"),
    (3, "truncation"),
    (4, "TCP"),
    (5, "device ioctls by path"),
    (6, "signals and abstract sockets"),
];

/// One half's domain.
#[derive(Debug)]
pub enum Domain<'a> {
    /// The VMM may read and execute its own program (or `execveat` fails), and nothing else.
    Vmm(BorrowedFd<'a>),
    /// The broker may open files beneath these directories.
    Broker(Vec<BorrowedFd<'a>>),
    /// A helper may use what is bound, each as it was bound.
    Helper(Vec<HelperRule>),
}

/// Something that is bound in a helper's jail.
#[derive(Debug)]
pub struct HelperRule {
    /// It (`O_PATH`).
    pub file: OwnedFd,
    /// What may be done with it.
    pub usage: Use,
    /// Whether it is a directory.
    pub directory: bool,
}

impl HelperRule {
    fn rights(&self) -> BitFlags<AccessFs> {
        let devices = AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev;
        let all = match self.usage {
            Use::Execute => AccessFs::Execute | AccessFs::ReadFile,
            Use::Read => AccessFs::ReadFile | AccessFs::ReadDir,
            Use::Write => AccessFs::from_all(ABI_WANTED) & !(devices | AccessFs::Execute),
            Use::Device => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
        };
        if self.directory {
            all
        } else {
            // Those of directories are refused on a file.
            all & AccessFs::from_file(ABI_WANTED)
        }
    }
}

/// Enters the domain. Returns a note about rights that this kernel does not know.
///
/// # Errors
/// If the kernel has no Landlock and that is not allowed, or refuses the ruleset.
pub fn enter(domain: &Domain<'_>, allow_missing: bool) -> Result<Option<String>> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI_WANTED))?
        .handle_access(AccessNet::from_all(ABI_WANTED))?
        // The broker signals its VMM, which is outside of its domain. The VMM signals only its own
        // threads, which will all be in this one; so does a helper.
        .scope(match domain {
            Domain::Vmm(_) | Domain::Helper(_) => Scope::from_all(ABI_WANTED),
            Domain::Broker(_) => Scope::AbstractUnixSocket.into(),
        })?
        .create()?;
    let program: BitFlags<AccessFs> = AccessFs::Execute | AccessFs::ReadFile;
    // Truncation is decided at open, so the VMM could not shorten such a file without it.
    let open: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    match domain {
        Domain::Vmm(file) => ruleset = ruleset.add_rule(PathBeneath::new(file, program))?,
        Domain::Broker(directories) => {
            for directory in directories {
                ruleset = ruleset.add_rule(PathBeneath::new(directory, open))?;
            }
        }
        Domain::Helper(rules) => {
            for rule in rules {
                ruleset = ruleset.add_rule(PathBeneath::new(&rule.file, rule.rights()))?;
            }
        }
    }
    let status = ruleset.restrict_self()?;
    let enforced = status.ruleset != RulesetStatus::NotEnforced;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } if enforced => Some(effective_abi as i32),
        _ => None,
    };
    judge(abi, allow_missing)
}

/// Whether that version of Landlock, or none, will do, and what there is to note about it.
fn judge(abi: Option<i32>, allow_missing: bool) -> Result<Option<String>> {
    match abi {
        Some(abi) => Ok(missing_rights(abi)),
        None if allow_missing => Ok(Some(
            "landlock: none on this kernel, allowed by --allow-missing=landlock".to_owned(),
        )),
        None => refused(
            "Landlock",
            "this kernel does not offer it: boot with `lsm=landlock,…`, or give \
             `--allow-missing=landlock` to do without this wall",
        ),
    }
}

fn missing_rights(abi: i32) -> Option<String> {
    let missing: Vec<_> = RIGHTS
        .iter()
        .filter(|(since, _)| *since > abi)
        .map(|(_, what)| *what)
        .collect();
    if missing.is_empty() {
        return None;
    }
    let missing = missing.join(", ");
    Some(format!(
        "landlock: this kernel has version {abi} of {ABI_WANTED_NUMBER}, which cannot restrict: {missing}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_an_older_kernel_lacks() {
        assert_eq!(missing_rights(7), None);
        assert_eq!(missing_rights(6), None);
        let two = missing_rights(2).unwrap();
        assert!(
            two.contains("version 2 of 7") && two.contains("truncation"),
            "{two}"
        );
        assert!(!two.contains("moving"), "{two}");
    }

    #[test]
    fn none_at_all_is_refused_unless_that_is_allowed() {
        let refusal = judge(None, false).unwrap_err().to_string();
        assert!(refusal.contains("--allow-missing=landlock"), "{refusal}");
        assert!(judge(None, true).unwrap().unwrap().contains("none"));
        // What an older kernel lacks is no reason to refuse, and allowing changes nothing.
        for allow in [false, true] {
            assert!(judge(Some(1), allow).unwrap().is_some());
            assert_eq!(judge(Some(7), allow).unwrap(), None);
        }
    }
}

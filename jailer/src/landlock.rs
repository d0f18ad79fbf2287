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
    Broker {
        /// Beneath these that is all.
        open: Vec<BorrowedFd<'a>>,
        /// Beneath these it may also make files, and replace those that are there.
        create: Vec<BorrowedFd<'a>>,
    },
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
            Domain::Broker { .. } => Scope::AbstractUnixSocket.into(),
        })?
        .create()?;
    let program: BitFlags<AccessFs> = AccessFs::Execute | AccessFs::ReadFile;
    // Truncation is decided at open, so the VMM could not shorten such a file without it.
    let open: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    // A file gets a new name, or another file's; nothing else is made. And a directory can be opened, to be
    // synced: listing it takes the same right, but the broker's filter has no call for that.
    let create = AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::ReadDir;
    match domain {
        Domain::Vmm(file) => ruleset = ruleset.add_rule(PathBeneath::new(file, program))?,
        Domain::Broker {
            open: directories,
            create: others,
        } => {
            for directory in directories {
                ruleset = ruleset.add_rule(PathBeneath::new(directory, open))?;
            }
            for directory in others {
                ruleset = ruleset.add_rule(PathBeneath::new(directory, open | create))?;
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

    /// What a broker may do to the file system, whatever its policy and its filter would let through.
    #[test]
    fn a_broker_makes_files_where_it_may_and_nothing_else_anywhere() {
        use std::fs::{self, File};
        use std::path::Path;
        let base = tempfile::tempdir().unwrap();
        let path = |name: &str| base.path().join(name);
        for place in ["open", "create", "neither"] {
            fs::create_dir(path(place)).unwrap();
            fs::write(path(place).join("old"), "old").unwrap();
        }
        let directories = ["open", "create"].map(|name| File::open(path(name)).unwrap());
        // A domain is the thread's that enters it.
        let inside = std::thread::spawn({
            let base = base.path().to_owned();
            move || {
                use std::os::fd::AsFd;
                let [open, create] = &directories;
                let domain = Domain::Broker {
                    open: vec![open.as_fd()],
                    create: vec![create.as_fd()],
                };
                enter(&domain, false).unwrap();
                let attempts = |place: &Path| {
                    let (old, new) = (place.join("old"), place.join("new"));
                    [
                        ("read", fs::read(&old).is_ok()),
                        ("write", fs::write(&old, "x").is_ok()),
                        ("make", File::create_new(&new).is_ok()),
                        ("replace", fs::rename(&new, &old).is_ok()),
                        ("link", fs::hard_link(&old, &new).is_ok()),
                        ("remove", fs::remove_file(&old).is_ok()),
                        ("sync", File::open(place).is_ok()),
                        ("directory", fs::create_dir(place.join("d")).is_ok()),
                        (
                            "pipe",
                            nix::unistd::mkfifo(&place.join("p"), nix::sys::stat::Mode::S_IRWXU)
                                .is_ok(),
                        ),
                        (
                            "symlink",
                            std::os::unix::fs::symlink("x", place.join("l")).is_ok(),
                        ),
                        (
                            "take away",
                            fs::rename(&old, base.join("open/taken")).is_ok(),
                        ),
                    ]
                };
                ["open", "create", "neither"].map(|name| {
                    let done = attempts(&base.join(name)).into_iter();
                    let done = done.filter(|(_, succeeded)| *succeeded);
                    done.map(|(what, _)| what).collect::<Vec<_>>()
                })
            }
        });
        let [open, create, neither] = inside.join().unwrap();
        assert_eq!(open, ["read", "write"]);
        let files = ["read", "write", "make", "replace", "link", "remove", "sync"];
        assert_eq!(create, files);
        assert!(neither.is_empty(), "{neither:?}");
    }
}

//! Picks kernel, configuration and modules out of a Debian package.
//!
//! A package is an `ar` archive with the files in a compressed `data.tar` (deb(5)). Only regular files under known paths are
//! unpacked, into paths that we make up from checked parts; links and everything else are never created. Runs in a
//! jailed process.

use super::decompress::{copy, reader};
use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, Read};

/// Most entries of a package; the largest kernel packages have about 7,000.
const MAX_ENTRIES: usize = 200_000;
/// Greatest size of one unpacked file, in bytes.
const MAX_FILE: u64 = 512 << 20;
/// Greatest size of all unpacked files together, in bytes.
const MAX_TOTAL: u64 = 6 << 30;

/// What a package held.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// The version in the kernel's and the modules' paths.
    pub release: String,
    /// Whether there was a kernel.
    pub kernel: bool,
    /// Number of modules.
    pub modules: usize,
}

/// Where a path of the package goes.
#[derive(Debug, PartialEq, Eq)]
struct Wanted<'a> {
    target: String,
    release: &'a str,
    is_kernel: bool,
    is_module: bool,
}

/// Unpacks the package into the current directory: `vmlinuz`, `config` and `modules/`.
pub fn unpack(package: impl Read) -> Result<Contents, String> {
    let mut archive = ar::Archive::new(BufReader::with_capacity(256 << 10, package));
    while let Some(member) = archive.next_entry() {
        let member = member.map_err(|error| format!("not a Debian package: {error}"))?;
        let name = String::from_utf8_lossy(member.header().identifier()).into_owned();
        if name == "data.tar" || name.starts_with("data.tar.") {
            if !matches!(
                name.as_str(),
                "data.tar" | "data.tar.xz" | "data.tar.gz" | "data.tar.zst"
            ) {
                return Err(format!(
                    "{name}: this compression is not supported (xz, zst and gz are)"
                ));
            }
            let data = reader(&name, member).map_err(|error| format!("{name}: {error}"))?;
            return unpack_tar(data).map_err(|error| format!("{name}: {error}"));
        }
    }
    Err("not a Debian package with files: no data.tar in it".into())
}

fn unpack_tar(data: impl Read) -> Result<Contents, String> {
    let mut contents = Contents::default();
    let mut directories = BTreeSet::new();
    let mut left = MAX_TOTAL;
    let mut archive = tar::Archive::new(data);
    let entries = archive.entries().map_err(|error| error.to_string())?;
    for (number, entry) in entries.enumerate() {
        let mut entry = entry.map_err(|error| format!("damaged: {error}"))?;
        if number >= MAX_ENTRIES {
            return Err(format!("more than {MAX_ENTRIES} entries"));
        }
        let path = entry.path_bytes();
        let path = std::str::from_utf8(&path)
            .map_err(|_| "a path that is not UTF-8".to_owned())?
            .to_owned();
        check(&path)?;
        let Some(wanted) = wanted(&path).filter(|_| entry.header().entry_type().is_file()) else {
            continue;
        };
        if contents.release.is_empty() {
            contents.release = wanted.release.into();
        } else if contents.release != wanted.release {
            return Err(format!(
                "two kernels, {} and {}: one is expected",
                contents.release, wanted.release
            ));
        }
        let mut file = create(&wanted.target, &mut directories)?;
        let size = copy(&mut entry, &mut file, left.min(MAX_FILE))
            .map_err(|error| format!("{path}: {error}"))?;
        left = left.saturating_sub(size);
        contents.kernel |= wanted.is_kernel;
        contents.modules += usize::from(wanted.is_module);
    }
    Ok(contents)
}

/// Refuses a path that leaves the archive. An honest package has none, so that is an error, not something to skip.
fn check(path: &str) -> Result<(), String> {
    if path.starts_with('/') || path.split('/').any(|part| part == "..") || path.contains('\0') {
        return Err(format!("path {path:?} leads out of the package"));
    }
    Ok(())
}

fn wanted(path: &str) -> Option<Wanted<'_>> {
    let path = path.strip_prefix("./").unwrap_or(path);
    if let Some(name) = path.strip_prefix("boot/") {
        let (target, release) = name.split_once('-')?;
        let plain = !release.is_empty() && !release.contains('/');
        let is_kernel = target == "vmlinuz";
        return (plain && (is_kernel || target == "config")).then(|| Wanted {
            target: target.into(),
            release,
            is_kernel,
            is_module: false,
        });
    }
    let path = path.strip_prefix("usr/").unwrap_or(path);
    let (release, rest) = path.strip_prefix("lib/modules/")?.split_once('/')?;
    let is_module = rest.starts_with("kernel/") && super::index::module_name(rest).is_some();
    let is_list = matches!(rest, "modules.builtin" | "modules.builtin.modinfo");
    (!release.is_empty() && (is_module || is_list)).then(|| Wanted {
        target: format!("modules/{rest}"),
        release,
        is_kernel: false,
        is_module,
    })
}

/// Makes a new file and the directories on its way. The path has no `..`, and nothing in it is a link, since we make none.
fn create(path: &str, directories: &mut BTreeSet<String>) -> Result<File, String> {
    for (end, _) in path.match_indices('/') {
        let directory = path.get(..end).unwrap_or_default();
        if directories.insert(directory.into()) {
            mkdirat(AT_FDCWD, directory, Mode::from_bits_truncate(0o755))
                .map_err(|errno| format!("{directory}: {errno}"))?;
        }
    }
    let flags =
        OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(AT_FDCWD, path, flags, Mode::from_bits_truncate(0o644))
        .map(File::from)
        .map_err(|errno| format!("{path}: {errno}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picks_what_a_kernel_is_made_of() {
        let target = |path| wanted(path).map(|wanted| (wanted.target, wanted.release.to_owned()));
        let some = |target: &str| Some((target.to_owned(), "6.1.0-9".to_owned()));
        assert_eq!(target("./boot/vmlinuz-6.1.0-9"), some("vmlinuz"));
        assert_eq!(target("./boot/config-6.1.0-9"), some("config"));
        assert_eq!(
            target("./lib/modules/6.1.0-9/kernel/fs/erofs/erofs.ko"),
            some("modules/kernel/fs/erofs/erofs.ko")
        );
        assert_eq!(
            target("usr/lib/modules/6.1.0-9/kernel/a.ko.xz"),
            some("modules/kernel/a.ko.xz")
        );
        assert_eq!(
            target("./lib/modules/6.1.0-9/modules.builtin"),
            some("modules/modules.builtin")
        );
        for other in [
            "./boot/System.map-6.1",
            "./boot/",
            "./usr/share/doc/x",
            "./lib/modules/6.1/modules.order",
            "./boot/vmlinuz-",
        ] {
            assert_eq!(target(other), None, "{other}");
        }
    }

    #[test]
    fn ways_out_are_refused() {
        for path in [
            "/etc/passwd",
            "../x",
            "boot/../../x",
            "lib/modules/../../../x",
            "a/..",
        ] {
            assert!(check(path).is_err(), "{path}");
        }
        assert!(check("./boot/vmlinuz-6..1").is_ok());
    }
}

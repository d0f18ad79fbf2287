//! Composes the initrd: this program as `/init`, and the modules in load order.
//!
//! Cached under the SHA-256 of all that goes into it, so a start usually only looks whether the file is there.

use super::Error;
use super::cpio::Archive;
use super::index::Load;
use super::store::Store;
use casemate_init::modules::{LIST, OPTIONAL};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Component, Path, PathBuf};

/// Changes when the same input makes another initrd.
const FORMAT: &[u8] = b"casemate initrd 1";
/// This program: it is init too (`casemate_init::main`).
const OURSELVES: &str = "/proc/self/exe";

/// Makes the initrd with these modules of a registered kernel, or finds it, and returns its path.
pub fn compose(store: &Store, kernel: &str, modules: &[Load]) -> Result<PathBuf, Error> {
    let init =
        fs::read(OURSELVES).map_err(|error| Error::io("read", Path::new(OURSELVES), error))?;
    let init = loadable_part(&init);
    compose_with(store, kernel, modules, init)
}

fn compose_with(
    store: &Store,
    kernel: &str,
    modules: &[Load],
    init: &[u8],
) -> Result<PathBuf, Error> {
    let cache = store.initrd_cache();
    let path = cache.join(key(init, modules));
    if path.is_file() {
        return Ok(path);
    }
    fs::create_dir_all(&cache).map_err(|error| Error::io("make", &cache, error))?;
    let failed = |error| Error::io("write an initrd in", &cache, error);
    crate::rootfs::sweep(&cache);
    let new = tempfile::Builder::new()
        .prefix(crate::rootfs::BUILDING)
        .tempfile_in(&cache)
        .map_err(failed)?;
    let mut archive = Archive::new(BufWriter::with_capacity(1 << 20, new));
    let directory = store.directory(kernel).join("modules");
    let mut list = String::new();
    let mut write = || -> io::Result<()> {
        for empty in ["dev", "proc", "sys", "modules"] {
            archive.directory(empty, 0o755)?;
        }
        archive.file("init", 0o755, init)?;
        for (number, module) in modules.iter().enumerate() {
            let name = format!("{number:02}-{}.ko", module.name);
            let content = read_module(&directory, &module.file)?;
            archive.file(&format!("modules/{name}"), 0o644, &content)?;
            list.push_str(&name);
            if module.optional {
                list.push(' ');
                list.push_str(OPTIONAL);
            }
            list.push('\n');
        }
        if !list.is_empty() {
            archive.file(&format!("modules/{LIST}"), 0o644, list.as_bytes())?;
        }
        Ok(())
    };
    write().map_err(failed)?;
    let new = archive
        .finish()
        .and_then(|output| output.into_inner().map_err(|error| error.into_error()))
        .map_err(failed)?;
    // Read by the VMM through a descriptor; nothing secret is in it.
    set_mode(new.as_file(), 0o644).map_err(failed)?;
    new.persist(&path).map_err(|error| failed(error.error))?;
    Ok(path)
}

fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(mode))
}

/// Reads a module by the path that the index has for it. The index comes out of a jail: the path is checked again.
fn read_module(directory: &Path, file: &str) -> io::Result<Vec<u8>> {
    let inside = Path::new(file)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    let path = directory.join(file);
    if !inside {
        return Err(io::Error::other(format!(
            "module path {file:?} leads out of the kernel's directory"
        )));
    }
    fs::read(&path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

fn key(init: &[u8], modules: &[Load]) -> String {
    let mut hash = Sha256::new();
    hash.update(FORMAT);
    hash.update(Sha256::digest(init));
    for module in modules {
        hash.update(format!(
            "\n{} {} {}",
            module.name, module.digest, module.optional
        ));
    }
    hex(&hash.finalize())
}

/// Bytes as hexadecimal text.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The part of a program's file that the kernel maps: what follows the last segment are symbols, debug information and
/// section headers, which can be most of a file and are nothing for a guest's memory.
///
/// The header still names the section table, which nobody reads when a program is started. Falls back to the whole file.
fn loadable_part(program: &[u8]) -> &[u8] {
    loadable_end(program)
        .and_then(|end| program.get(..end))
        .unwrap_or(program)
}

/// Where the last segment of an ELF64 program ends in its file.
fn loadable_end(program: &[u8]) -> Option<usize> {
    const LOAD: u32 = 1;
    let u16_at = |at: usize| Some(u16::from_le_bytes(*program.get(at..)?.first_chunk()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(*program.get(at..)?.first_chunk()?));
    if !program.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = usize::try_from(u64_at(32)?).ok()?;
    let (size, count) = (usize::from(u16_at(54)?), usize::from(u16_at(56)?));
    let mut end = table.checked_add(size.checked_mul(count)?)?;
    for number in 0..count {
        let header = table.checked_add(number.checked_mul(size)?)?;
        if u32::from_le_bytes(*program.get(header..)?.first_chunk()?) == LOAD {
            let segment_end =
                u64_at(header.checked_add(8)?)?.checked_add(u64_at(header.checked_add(32)?)?)?;
            end = end.max(usize::try_from(segment_end).ok()?);
        }
    }
    Some(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn load(name: &str, file: &str) -> Load {
        Load {
            name: name.into(),
            file: file.into(),
            digest: "d".into(),
            optional: name == "b",
        }
    }

    #[test]
    fn composes_once() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::at(data.path().into());
        let modules = store.directory("k").join("modules/kernel");
        fs::create_dir_all(&modules).unwrap();
        for name in ["a", "b"] {
            fs::write(modules.join(format!("{name}.ko")), name).unwrap();
        }
        let loads = [load("a", "kernel/a.ko"), load("b", "kernel/b.ko")];
        let path = compose_with(&store, "k", &loads, b"init").unwrap();
        let bytes = fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("modules/00-a.ko\0") && text.contains("00-a.ko\n01-b.ko optional\n"));

        // The same again is the same file, without a look at the modules.
        fs::remove_dir_all(&modules).unwrap();
        assert_eq!(compose_with(&store, "k", &loads, b"init").unwrap(), path);
        assert_eq!(fs::read_dir(store.initrd_cache()).unwrap().count(), 1);

        // Another init, order or content is another.
        let other = [load("b", "kernel/b.ko"), load("a", "kernel/a.ko")];
        assert_ne!(key(b"init", &loads), key(b"init2", &loads));
        assert_ne!(key(b"init", &loads), key(b"init", &other));
        assert!(compose_with(&store, "k", &other, b"init").is_err());
    }

    #[test]
    fn an_index_cannot_name_other_files() {
        let data = tempfile::tempdir().unwrap();
        for file in ["/etc/passwd", "../../meta.json", "a/../../x"] {
            let error = read_module(data.path(), file).unwrap_err();
            assert!(error.to_string().contains("leads out"), "{error}");
        }
    }

    #[test]
    fn what_is_cut_off_is_not_missed() {
        let whole = fs::read("/proc/self/exe").unwrap();
        let part = loadable_part(&whole);
        assert!(part.len() < whole.len());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        fs::write(&path, part).unwrap();
        set_mode(&File::open(&path).unwrap(), 0o755).unwrap();
        let output = Command::new(&path).arg("--list").output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("what_is_cut_off_is_not_missed"));
        for garbage in [&b"\x7fELF\x02\x01"[..], b"", b"#!/bin/sh", &[0xff; 200]] {
            assert_eq!(loadable_part(garbage), garbage);
        }
    }
}

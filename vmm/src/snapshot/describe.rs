//! A file of a snapshot in words, for `--describe-snapshot`; both, read to their last byte, for `--verify-snapshot`.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;

use thiserror::Error;

use super::SnapshotId;
use super::format::{self, Role, read_as};
use super::memory::{self, PAGE, trailer};

/// What sections are called, by their kinds: those of a machine's state.
const KINDS: [(u32, &str); 3] = [(1, "machine"), (2, "vcpu"), (3, "vm")];

/// Why a file is not described.
#[derive(Debug, Error)]
pub enum Error {
    /// It cannot be opened.
    #[error("cannot open it: {0}")]
    Open(#[source] io::Error),
    /// It is no state file, or not whole.
    #[error(transparent)]
    State(#[from] format::Error),
    /// It is a memory file that is not whole.
    #[error(transparent)]
    Memory(memory::Error),
    /// The two files are of two snapshots.
    #[error("the state file is that of snapshot {state}, the memory file that of {memory}")]
    Two {
        /// Whose the state is.
        state: SnapshotId,
        /// Whose the memory is.
        memory: SnapshotId,
    },
}

/// Opens what is to be described, and waits for nobody: it may be anything.
///
/// # Errors
/// What the host says.
pub fn open(path: &str) -> Result<File, Error> {
    File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(Error::Open)
}

/// A line with the version, as Firecracker's program prints it; then which snapshot it is, and a line for each
/// section or region.
///
/// # Errors
/// When the file is no whole one of a snapshot.
pub fn describe(file: &File) -> Result<String, Error> {
    let (version, id, sections) = match read_as(Role::State, file) {
        Ok(state) => state,
        // A memory file begins with the guest's memory.
        Err(error @ format::Error::NoSnapshot) => return describe_memory(file, error),
        Err(error) => return Err(error.into()),
    };
    let mut lines = vec![version.to_string(), format!("state of snapshot {id}")];
    lines.extend(sections.iter().map(|section| {
        format!(
            "section {}, index {}, version {}: {} bytes",
            kind(section.kind),
            section.index,
            section.version,
            section.payload.len()
        )
    }));
    Ok(lines.join("\n") + "\n")
}

/// A kind of sections in a word.
pub fn kind(number: u32) -> String {
    let known = KINDS.iter().find(|(kind, _)| *kind == number);
    known.map_or_else(
        || format!("of kind {number}"),
        |(_, name)| (*name).to_owned(),
    )
}

/// Reads all of both files, and compares them with their checksums and with each other.
///
/// # Errors
/// What is wrong with the first that is.
pub fn verify(state: &File, memory: &File) -> Result<String, Error> {
    let (id, _) = format::read(state)?;
    let found = memory::verify(memory).map_err(Error::Memory)?;
    if found.id != id {
        return Err(Error::Two {
            state: id,
            memory: found.id,
        });
    }
    Ok(format!("snapshot {id}: {} pages are whole\n", found.pages))
}

/// The same of the other file; `none` where it is not that either.
fn describe_memory(file: &File, none: format::Error) -> Result<String, Error> {
    let found = match trailer(file) {
        Ok(found) => found,
        Err(memory::Error::NoTrailer) => return Err(none.into()),
        Err(error) => return Err(Error::Memory(error)),
    };
    let what = match found.base {
        None => "memory of snapshot".to_owned(),
        Some(base) => format!("what has changed in memory since snapshot {base}: of snapshot"),
    };
    let bytes = found.pages.saturating_mul(PAGE);
    let mut lines = vec![
        found.version.to_string(),
        format!("{what} {}", found.id),
        format!("{bytes} bytes in pages that are not zero"),
    ];
    let regions = found.regions.iter();
    lines.extend(regions.map(|(start, length)| format!("region at {start:#x}: {length} bytes")));
    Ok(lines.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::memory::allocate;
    use crate::memory::touched::Untouched;
    use crate::snapshot::Section;

    const ID: SnapshotId = SnapshotId::from_bytes([0xab; 16]);
    const BASE: SnapshotId = SnapshotId::from_bytes([1; 16]);

    fn refused(bytes: &[u8]) -> String {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        describe(&file).unwrap_err().to_string()
    }

    #[test]
    fn a_state_is_described() {
        let section = |kind, index| Section {
            kind,
            index,
            version: 3,
            payload: vec![1; 5],
        };
        let sections = [section(1, 0), section(4, 2)];
        let bytes = format::encode(ID, &sections).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        assert_eq!(
            describe(&file).unwrap(),
            "v1.0.0\n\
             state of snapshot abababababababababababababababab\n\
             section machine, index 0, version 3: 5 bytes\n\
             section of kind 4, index 2, version 3: 5 bytes\n"
        );
        assert!(refused(&bytes[..100]).contains("cut off"));
    }

    #[test]
    fn a_memory_is_described() {
        let memory = allocate(3073 << 20).unwrap();
        let file = tempfile::tempfile().unwrap();
        memory::write(&memory, Untouched::Mapped, &file, ID).unwrap();
        let regions = "region at 0x0: 3221225472 bytes\nregion at 0x100000000: 1048576 bytes\n";
        assert_eq!(
            describe(&file).unwrap(),
            format!(
                "v1.0.0\nmemory of snapshot {ID}\n0 bytes in pages that are not zero\n{regions}"
            )
        );
        let dirty = [vec![0; 12288], vec![0; 4]];
        memory::write_diff(&memory, Untouched::Mapped, &file, ID, BASE, &dirty).unwrap();
        let text = describe(&file).unwrap();
        assert!(
            text.contains(&format!("since snapshot {BASE}: of snapshot {ID}\n")),
            "{text}"
        );
        file.set_len(4096).unwrap();
        assert_eq!(
            describe(&file).unwrap_err().to_string(),
            "it is no snapshot of Casemate's"
        );
    }

    #[test]
    fn both_files_are_read_to_the_last_byte() {
        let state = |id| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&format::encode(id, &[]).unwrap()).unwrap();
            file
        };
        let guest = allocate(1 << 20).unwrap();
        guest.write_slice(&[7; 9000], GuestAddress(8192)).unwrap();
        let file = tempfile::tempfile().unwrap();
        memory::write(&guest, Untouched::Mapped, &file, ID).unwrap();
        let whole = format!("snapshot {ID}: 3 pages are whole\n");
        assert_eq!(verify(&state(ID), &file).unwrap(), whole);
        let error = verify(&state(BASE), &file).unwrap_err().to_string();
        let names = [ID, BASE].map(|id| id.to_string());
        assert!(names.iter().all(|id| error.contains(id)), "{error}");
        file.write_all_at(&[8], 8200).unwrap();
        let error = verify(&state(ID), &file).unwrap_err().to_string();
        assert!(error.contains("damaged"), "{error}");
    }

    #[test]
    fn what_is_neither_is_refused() {
        assert!(refused(b"").contains("cut off: it has 0 bytes"));
        assert_eq!(refused(&[0; 9000]), "it is no snapshot of Casemate's");
        let null = open("/dev/null").unwrap();
        assert!(
            describe(&null)
                .unwrap_err()
                .to_string()
                .contains("not a regular file")
        );
        assert!(matches!(open("/nowhere/at/all"), Err(Error::Open(_))));
    }
}

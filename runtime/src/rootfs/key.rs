//! The key of a directory tree: SHA-256 over everything that becomes part of its image.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use sha2::{Digest, Sha256};
use walkdir::WalkDir;

use super::{Error, io_error};

/// Changes whenever the same tree should give another image.
const FORMAT: &[u8] = b"casemate erofs 2";

/// A tree's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key([u8; 32]);

impl Key {
    /// The same bytes as the image's UUID, as far as they fit.
    pub fn uuid(&self) -> String {
        let hex = self.to_string();
        let part = |range: std::ops::Range<usize>| hex.get(range).unwrap_or_default().to_string();
        [
            part(0..8),
            part(8..12),
            part(12..16),
            part(16..20),
            part(20..32),
        ]
        .join("-")
    }
}

impl fmt::Display for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

/// Reads the whole tree. Symbolic links are part of it, and not followed.
pub fn of_tree(root: &Path) -> Result<Key, Error> {
    let mut hash = Sha256::new();
    hash.update(FORMAT);
    // Files with several names: which was the first, since the image has one file for all of them.
    let mut linked = BTreeMap::new();
    for entry in WalkDir::new(root).sort_by_file_name() {
        let entry = entry.map_err(|error| {
            let path = error.path().unwrap_or(root).to_path_buf();
            let source = error
                .into_io_error()
                .unwrap_or_else(|| io::Error::other("a loop"));
            Error::Io {
                what: "cannot read",
                path,
                source,
            }
        })?;
        let path = entry.path();
        let metadata = fs::symlink_metadata(path).map_err(io_error("cannot look at", path))?;
        let relative = path.strip_prefix(root).unwrap_or(path);
        field(&mut hash, relative.as_os_str());
        for number in [
            u64::from(metadata.mode()),
            metadata.uid().into(),
            metadata.gid().into(),
        ] {
            hash.update(number.to_le_bytes());
        }
        let kind = metadata.file_type();
        if kind.is_file() {
            if metadata.nlink() > 1 {
                let number = u64::try_from(linked.len()).unwrap_or(u64::MAX);
                let first = linked.entry((metadata.dev(), metadata.ino()));
                hash.update(first.or_insert(number).to_le_bytes());
            }
            hash.update(metadata.size().to_le_bytes());
            let length = content(&mut hash, path).map_err(io_error("cannot read", path))?;
            // The length above must be that of the content, or two trees could have one key.
            if length != metadata.size() {
                return Err(Error::Changing(root.to_path_buf()));
            }
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(io_error("cannot read", path))?;
            field(&mut hash, target.as_os_str());
        } else if kind.is_block_device() || kind.is_char_device() {
            hash.update(metadata.rdev().to_le_bytes());
        }
    }
    Ok(Key(hash.finalize().into()))
}

/// A string with its length, so that no two sequences of strings are alike.
fn field(hash: &mut Sha256, text: &OsStr) {
    let length = u64::try_from(text.len()).unwrap_or(u64::MAX);
    hash.update(length.to_le_bytes());
    hash.update(text.as_bytes());
}

/// Returns how many bytes there were.
fn content(hash: &mut Sha256, path: &Path) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let mut total = 0u64;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(length) => {
                hash.update(buffer.get(..length).unwrap_or_default());
                total = total.saturating_add(u64::try_from(length).unwrap_or(u64::MAX));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn everything_in_the_image_is_in_the_key() {
        let root = tempfile::tempdir().unwrap();
        let tree = root.path();
        let mut seen = vec![of_tree(tree).unwrap()];
        let mut differs = |what: &str| {
            let key = of_tree(tree).unwrap();
            assert!(!seen.contains(&key), "{what} does not change the key");
            assert_eq!(of_tree(tree).unwrap(), key);
            seen.push(key);
        };
        fs::write(tree.join("a"), "1").unwrap();
        differs("a new file");
        fs::write(tree.join("a"), "2").unwrap();
        differs("content");
        fs::rename(tree.join("a"), tree.join("b")).unwrap();
        differs("a name");
        fs::set_permissions(tree.join("b"), fs::Permissions::from_mode(0o711)).unwrap();
        differs("a mode");
        symlink("x", tree.join("l")).unwrap();
        differs("a link");
        fs::remove_file(tree.join("l")).unwrap();
        symlink("y", tree.join("l")).unwrap();
        differs("a link's target");
        fs::create_dir(tree.join("d")).unwrap();
        differs("an empty directory");
        fs::write(tree.join("c"), "2").unwrap();
        fs::set_permissions(tree.join("c"), fs::Permissions::from_mode(0o711)).unwrap();
        differs("a copy");
        fs::remove_file(tree.join("c")).unwrap();
        fs::hard_link(tree.join("b"), tree.join("c")).unwrap();
        differs("a hard link in place of the copy");
    }

    #[test]
    fn the_place_of_the_tree_is_not_in_the_key() {
        let root = tempfile::tempdir().unwrap();
        for name in ["one", "two"] {
            fs::create_dir(root.path().join(name)).unwrap();
            fs::write(root.path().join(name).join("f"), "x").unwrap();
        }
        assert_eq!(
            of_tree(&root.path().join("one")).unwrap(),
            of_tree(&root.path().join("two")).unwrap()
        );
    }

    #[test]
    fn a_uuid_looks_like_one() {
        assert_eq!(
            Key([0xab; 32]).uuid(),
            "abababab-abab-abab-abab-abababababab"
        );
    }
}

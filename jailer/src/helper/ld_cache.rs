//! The dynamic loader's list of libraries, `/etc/ld.so.cache` (glibc, dl-cache.h).

use std::path::PathBuf;

/// Where it is.
pub const PATH: &str = "/etc/ld.so.cache";

/// How the newer format begins; glibc writes no other one since 2.32.
const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const HEADER: usize = 48;
const ENTRY: usize = 24;

/// The paths that the cache `bytes` has for `name`, best first; none if it is no cache.
///
/// Without variants for some processors: what is chosen here must run on every one.
pub fn lookup(bytes: &[u8], name: &str) -> Vec<PathBuf> {
    if !bytes.starts_with(MAGIC) {
        return Vec::new();
    }
    let count = word(bytes, MAGIC.len()).unwrap_or_default();
    let entries = bytes.get(HEADER..).unwrap_or_default().chunks_exact(ENTRY);
    let found = entries.take(count as usize).filter_map(|entry| {
        let variant = entry.get(16..24)?;
        let named = text(bytes, word(entry, 4)?)? == name;
        let path = text(bytes, word(entry, 8)?)?;
        (named && variant == [0; 8]).then(|| path.into())
    });
    found.collect()
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*word))
}

/// A string that ends in a NUL. Offsets count from the beginning of the file.
fn text(bytes: &[u8], at: u32) -> Option<&str> {
    let rest = bytes.get(at as usize..)?;
    let end = rest.iter().take(4096).position(|byte| *byte == 0)?;
    std::str::from_utf8(rest.get(..end)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache of (name, path, variant).
    fn cache(entries: &[(&str, &str, u64)]) -> Vec<u8> {
        let mut strings = Vec::new();
        let mut table = Vec::new();
        let base = HEADER + entries.len() * ENTRY;
        let mut place = |text: &str| {
            let at = (base + strings.len()) as u32;
            strings.extend(text.bytes().chain([0]));
            at
        };
        for (name, path, variant) in entries {
            table.extend(
                [0x303, place(name), place(path), 0]
                    .map(u32::to_le_bytes)
                    .concat(),
            );
            table.extend(variant.to_le_bytes());
        }
        let mut header = MAGIC.to_vec();
        header.extend((entries.len() as u32).to_le_bytes());
        header.resize(HEADER, 0);
        [header, table, strings].concat()
    }

    #[test]
    fn finds_what_runs_on_every_processor() {
        let bytes = cache(&[
            ("liba.so.1", "/lib/v3/liba.so.1", 1 << 62),
            ("liba.so.1", "/lib/liba.so.1", 0),
            ("liba.so.1", "/lib32/liba.so.1", 0),
            ("libb.so", "/lib/libb.so", 0),
        ]);
        let paths = ["/lib/liba.so.1", "/lib32/liba.so.1"].map(PathBuf::from);
        assert_eq!(lookup(&bytes, "liba.so.1"), paths);
        assert!(lookup(&bytes, "lib").is_empty());
    }

    #[test]
    fn a_broken_cache_has_nothing() {
        let good = cache(&[("liba.so.1", "/lib/liba.so.1", 0)]);
        for length in 0..good.len() {
            assert!(lookup(&good[..length], "liba.so.1").is_empty(), "{length}");
        }
        for at in 0..HEADER + ENTRY {
            let mut bytes = good.clone();
            bytes[at] = 0xff;
            lookup(&bytes, "liba.so.1");
        }
        assert!(lookup(b"ld.so-1.7.0", "liba.so.1").is_empty());
    }
}

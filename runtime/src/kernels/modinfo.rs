//! What a kernel module says of itself: its `.modinfo` section.
//!
//! A module is an ELF64 relocatable file; the section holds NUL-terminated `key=value` strings (the kernel's
//! `include/linux/module.h`). Parsed in a jailed process, from input that may be hostile: every offset is checked, every
//! read bounded.

use casemate_kernel_image::ReadAt;

/// Most section headers that are looked at; real modules have a few hundred.
const MAX_SECTIONS: u64 = 65_535;
/// Longest section that is read, in bytes: names of sections, or `.modinfo`.
const MAX_SECTION: u64 = 4 << 20;
/// Size of an ELF64 section header.
const SECTION_HEADER: u64 = 64;

/// The lines of `.modinfo` that matter for loading.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ModInfo {
    /// `depends=`: modules that must be loaded before.
    pub depends: Vec<String>,
    /// `softdep=pre:`: modules or aliases that should be loaded before.
    pub soft_before: Vec<String>,
    /// `softdep=post:`: those that should be loaded after.
    pub soft_after: Vec<String>,
    /// `alias=`: other names that it answers to, patterns included.
    pub aliases: Vec<String>,
}

/// Reads the module's description. The error says what is wrong with the file.
pub fn read(module: &(impl ReadAt + ?Sized)) -> Result<ModInfo, String> {
    let header: [u8; 64] = module
        .array_at(0)
        .map_err(|_| "shorter than an ELF header")?;
    // Magic, 64 bits, little-endian, current version; type relocatable.
    if !header.starts_with(b"\x7fELF\x02\x01\x01") || header.get(16..18) != Some(&[1, 0]) {
        return Err("not an ELF64 relocatable file".into());
    }
    let table = u64_at(&header, 40);
    let entry_size = u64::from(u16_at(&header, 58));
    let count = u64::from(u16_at(&header, 60));
    let names_index = u64::from(u16_at(&header, 62));
    if entry_size != SECTION_HEADER || count == 0 || count > MAX_SECTIONS || names_index >= count {
        return Err("bad section table".into());
    }
    let headers = bytes_at(module, table, count * SECTION_HEADER)?;
    let header = |index: u64| -> Option<&[u8]> {
        let start = usize::try_from(index.checked_mul(SECTION_HEADER)?).ok()?;
        headers.get(start..)?.get(..64)
    };
    let section = |header: &[u8]| bytes_at(module, u64_at(header, 24), u64_at(header, 32));
    let names = section(header(names_index).ok_or("bad section table")?)?;
    for index in 0..count {
        let Some(header) = header(index) else { break };
        let name = usize::try_from(u32_at(header, 0))
            .ok()
            .and_then(|start| names.get(start..))
            .unwrap_or_default();
        if name.starts_with(b".modinfo\0") {
            return Ok(parse(&section(header)?));
        }
    }
    Err("no .modinfo section".into())
}

/// Parses the section's content.
fn parse(bytes: &[u8]) -> ModInfo {
    let mut info = ModInfo::default();
    for line in bytes
        .split(|byte| *byte == 0)
        .filter_map(|line| std::str::from_utf8(line).ok())
    {
        match line.split_once('=') {
            Some(("depends", names)) => info.depends.extend(
                names
                    .split(',')
                    .filter(|name| !name.is_empty())
                    .map(Into::into),
            ),
            Some(("alias", name)) => info.aliases.push(name.into()),
            Some(("softdep", text)) => soft_dependencies(text, &mut info),
            _ => {}
        }
    }
    info
}

/// `pre: a b post: c`, as modprobe.d(5) has it.
fn soft_dependencies(text: &str, info: &mut ModInfo) {
    let mut list = None;
    for word in text.split_ascii_whitespace() {
        match word {
            "pre:" => list = Some(&mut info.soft_before),
            "post:" => list = Some(&mut info.soft_after),
            name => {
                if let Some(list) = &mut list {
                    list.push(name.into());
                }
            }
        }
    }
}

fn bytes_at(module: &(impl ReadAt + ?Sized), offset: u64, length: u64) -> Result<Vec<u8>, String> {
    let size = module.size().map_err(|error| error.to_string())?;
    if length > MAX_SECTION || offset.checked_add(length).is_none_or(|end| end > size) {
        return Err("a section lies outside the file or is too long".into());
    }
    let mut bytes = vec![0; usize::try_from(length).map_err(|_| "too long")?];
    module
        .read_exact_at(&mut bytes, offset)
        .map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// The `N` bytes at a constant offset; zeroes beyond the end.
fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(at(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(at(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(at(bytes, offset))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A module with this `.modinfo`, lines separated by newlines.
    pub fn module(lines: &str) -> Vec<u8> {
        let modinfo = format!("{lines}\n").replace('\n', "\0").into_bytes();
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(64, 0);
        let modinfo_at = file.len();
        file.extend(&modinfo);
        let names_at = file.len();
        file.extend(names);
        let table_at = file.len();
        for (name, offset, length) in [
            (0, 0, 0),
            (1, modinfo_at, modinfo.len()),
            (10, names_at, names.len()),
        ] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&(name as u32).to_le_bytes());
            header[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(length as u64).to_le_bytes());
            file.extend(header);
        }
        file[16] = 1;
        file[40..48].copy_from_slice(&(table_at as u64).to_le_bytes());
        file[58..64].copy_from_slice(&[64, 0, 3, 0, 2, 0]);
        file
    }

    #[test]
    fn reads_what_matters() {
        let file = module(
            "license=GPL\nalias=fs-x\nalias=y\ndepends=a,b-c\nsoftdep=pre: crc32c d post: e\nname=x",
        );
        let info = read(file.as_slice()).unwrap();
        assert_eq!(info.depends, ["a", "b-c"]);
        assert_eq!(info.soft_before, ["crc32c", "d"]);
        assert_eq!(info.soft_after, ["e"]);
        assert_eq!(info.aliases, ["fs-x", "y"]);
        assert_eq!(
            read(module("depends=").as_slice()).unwrap(),
            ModInfo::default()
        );
    }

    #[test]
    fn every_truncation_and_every_changed_byte_is_survived() {
        let file = module("depends=a\nalias=b");
        for length in 0..file.len() {
            assert!(read(&file[..length]).is_err(), "{length} bytes");
        }
        for position in 0..file.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut changed = file.clone();
                changed[position] = value;
                let _ = read(changed.as_slice());
            }
        }
    }

    #[test]
    fn a_long_section_is_refused_before_memory_is_taken() {
        let mut file = module("depends=a");
        let table = file.len() - 3 * 64;
        file[table + 64 + 32..table + 64 + 40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(read(file.as_slice()).unwrap_err().contains("outside"));
    }
}

//! Where a VMM says that its memory is: Firecracker's handshake, which is one message.
//!
//! ```text
//! [{"base_host_virt_addr":140099999,"size":134217728,"offset":0,"page_size":4096,"page_size_kib":4096}, ...]
//! ```
//!
//! Addresses are the VMM's, offsets the memory file's, and all units bytes, whatever their names say. It is hostile: all
//! of it is checked, and nothing is as large as it says.

use serde::Deserialize;

use super::source::PAGE;

/// Longest message in bytes.
pub const MAX_MESSAGE: usize = 16 << 10;
/// Most regions.
const MAX_REGIONS: usize = 64;
/// A page's bytes.
const PAGE_SIZE: u64 = PAGE as u64;

/// What is wrong with a message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not the JSON that it should be. The text is not repeated: it could steer a terminal.
    #[error("it is no list of regions of memory (line {line}, column {column})")]
    Json {
        /// Where it ceases to be.
        line: usize,
        /// And in it.
        column: usize,
    },
    /// Too long, or in pieces.
    #[error("it is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// None, or too many.
    #[error("{0} regions: 1 to {MAX_REGIONS} are served")]
    Count(usize),
    /// Pages of another size.
    #[error("pages of {0} bytes: only those of {PAGE_SIZE} are served")]
    PageSize(u64),
    /// Not whole pages, or beyond all addresses.
    #[error("{size:#x} bytes at {base:#x}, {offset:#x} in the file, are not whole pages")]
    Unfit {
        /// Where it is in the VMM.
        base: u64,
        /// Its bytes.
        size: u64,
        /// Where it is in the file.
        offset: u64,
    },
    /// Two share pages.
    #[error("two regions share the pages at {0:#x}")]
    Overlap(u64),
    /// It is another machine's.
    #[error(
        "the machine has {has} bytes of memory, and the file {expected}: it is another machine's"
    )]
    OtherSize {
        /// What the VMM says.
        has: u64,
        /// What there is.
        expected: u64,
    },
    /// No userfaultfd with it.
    #[error("no userfaultfd came with it")]
    NoDescriptor,
}

#[derive(Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    /// The newer name.
    page_size: Option<u64>,
    /// The older name, and what it means is the same.
    page_size_kib: Option<u64>,
}

/// One region, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    base: u64,
    size: u64,
    offset: u64,
}

/// A machine's memory, and what of it was given back.
#[derive(Debug)]
pub struct Regions {
    /// In the order of addresses.
    regions: Vec<Region>,
    /// A bit for each page of the file.
    removed: Vec<u64>,
}

/// What is to be in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// What the file has there.
    At(u64),
    /// Nothing: the guest has given it back.
    Zero,
}

impl Regions {
    /// Reads a message of a VMM, which has `ram` bytes of memory.
    pub fn parse(message: &[u8], ram: u64) -> Result<Self, Error> {
        if message.len() > MAX_MESSAGE {
            return Err(Error::TooLong);
        }
        let mappings: Vec<Mapping> =
            serde_json::from_slice(message).map_err(|error| Error::Json {
                line: error.line(),
                column: error.column(),
            })?;
        if !(1..=MAX_REGIONS).contains(&mappings.len()) {
            return Err(Error::Count(mappings.len()));
        }
        let regions = mappings.iter().map(|mapping| region(mapping, ram));
        let mut regions = regions.collect::<Result<Vec<_>, _>>()?;
        regions.sort_unstable_by_key(|region| region.base);
        disjoint(regions.iter().map(|region| (region.base, region.size)))?;
        let mut places: Vec<_> = regions.iter().map(|it| (it.offset, it.size)).collect();
        places.sort_unstable();
        disjoint(places.into_iter())?;
        // They share nothing of the file, so this does not wrap.
        let has = regions
            .iter()
            .map(|it| it.size)
            .fold(0, u64::saturating_add);
        if has != ram {
            return Err(Error::OtherSize { has, expected: ram });
        }
        let words = (ram / PAGE_SIZE).div_ceil(64);
        let words = usize::try_from(words).map_err(|_| Error::OtherSize { has, expected: ram })?;
        Ok(Self {
            regions,
            removed: vec![0; words],
        })
    }

    /// The page with `address` in it: where it begins, and what it is to hold. None outside of the memory.
    pub fn page(&self, address: u64) -> Option<(u64, Contents)> {
        let start = address & !(PAGE_SIZE - 1);
        let region = self.regions.iter().find(|region| {
            let inside = start.checked_sub(region.base);
            inside.is_some_and(|inside| inside < region.size)
        })?;
        let offset = start.checked_sub(region.base)?.checked_add(region.offset)?;
        let page = offset / PAGE_SIZE;
        let word = self.removed.get(usize::try_from(page / 64).ok()?)?;
        let contents = match word >> (page % 64) & 1 {
            0 => Contents::At(offset),
            _ => Contents::Zero,
        };
        Some((start, contents))
    }

    /// The guest gave the pages from `start` to `end` back. What is not its memory is passed over.
    pub fn remove(&mut self, start: u64, end: u64) {
        for region in &self.regions {
            let last = region.base.saturating_add(region.size);
            let (from, to) = (start.max(region.base), end.min(last));
            if from >= to {
                continue;
            }
            let place = |address: u64| {
                let inside = address.saturating_sub(region.base);
                inside.saturating_add(region.offset)
            };
            let pages = place(from) / PAGE_SIZE..place(to).div_ceil(PAGE_SIZE);
            for page in pages {
                let word = usize::try_from(page / 64).ok();
                if let Some(word) = word.and_then(|word| self.removed.get_mut(word)) {
                    *word |= 1 << (page % 64);
                }
            }
        }
    }
}

fn region(mapping: &Mapping, ram: u64) -> Result<Region, Error> {
    let page_size = mapping.page_size.or(mapping.page_size_kib);
    let page_size = page_size.unwrap_or(PAGE_SIZE);
    if page_size != PAGE_SIZE {
        return Err(Error::PageSize(page_size));
    }
    let (base, size, offset) = (mapping.base_host_virt_addr, mapping.size, mapping.offset);
    let whole = [base, size, offset]
        .iter()
        .all(|number| number.is_multiple_of(PAGE_SIZE));
    let addressed = base.checked_add(size).is_some();
    let inside = offset.checked_add(size).is_some_and(|end| end <= ram);
    if !whole || !addressed || size == 0 {
        return Err(Error::Unfit { base, size, offset });
    }
    if !inside {
        let has = offset.saturating_add(size);
        return Err(Error::OtherSize { has, expected: ram });
    }
    Ok(Region { base, size, offset })
}

/// Ranges in the order of their starts: none ends after the next one's.
fn disjoint(ranges: impl Iterator<Item = (u64, u64)>) -> Result<(), Error> {
    let mut end = 0_u64;
    for (start, size) in ranges {
        if start < end {
            return Err(Error::Overlap(start));
        }
        end = start.saturating_add(size);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn message(regions: &[(u64, u64, u64)]) -> Vec<u8> {
        let regions: Vec<_> = regions
            .iter()
            .map(|(base, size, offset)| {
                serde_json::json!({ "base_host_virt_addr": base, "size": size, "offset": offset,
                                    "page_size": 4096, "page_size_kib": 4096 })
            })
            .collect();
        serde_json::to_vec(&regions).unwrap()
    }

    #[test]
    fn pages_are_found_where_the_file_has_them() {
        let text = message(&[(0x10_0000, MIB, 0), (0x40_0000, MIB, MIB)]);
        let mut regions = Regions::parse(&text, 2 * MIB).unwrap();
        for (address, page) in [
            (0x10_0000, Some((0x10_0000, Contents::At(0)))),
            (0x10_1fff, Some((0x10_1000, Contents::At(0x1000)))),
            (0x40_0001, Some((0x40_0000, Contents::At(MIB)))),
            (0x4f_ffff, Some((0x4f_f000, Contents::At(2 * MIB - 4096)))),
            (0xf_ffff, None),
            (0x20_0000, None),
            (0x50_0000, None),
            (0, None),
            (u64::MAX, None),
        ] {
            assert_eq!(regions.page(address), page, "{address:#x}");
        }
        // Across what is no memory, and beyond all of it.
        regions.remove(0x1f_f000, 0x40_2000);
        regions.remove(0x4f_f000, u64::MAX);
        regions.remove(5, 4);
        for (address, contents) in [
            (0x1f_e000, Contents::At(MIB - 8192)),
            (0x1f_f000, Contents::Zero),
            (0x40_1fff, Contents::Zero),
            (0x40_2000, Contents::At(MIB + 8192)),
            (0x4f_f000, Contents::Zero),
        ] {
            assert_eq!(regions.page(address).unwrap().1, contents, "{address:#x}");
        }
    }

    #[test]
    fn the_size_of_a_page_has_two_names() {
        for (text, served) in [
            (
                r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0}]"#,
                true,
            ),
            (
                r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size_kib":4096}]"#,
                true,
            ),
            (
                r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096,"new":[]}]"#,
                true,
            ),
            (
                r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size_kib":4}]"#,
                false,
            ),
            (
                r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":2097152}]"#,
                false,
            ),
            (
                r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":0}]"#,
                false,
            ),
        ] {
            assert_eq!(
                Regions::parse(text.as_bytes(), 4096).is_ok(),
                served,
                "{text}"
            );
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let top = !4095_u64;
        for (regions, words) in [
            (vec![], "0 regions"),
            (vec![(4096, 4096, 0); 65], "65 regions"),
            (vec![(4096, 0, 0)], "not whole pages"),
            (vec![(4097, 4096, 0)], "not whole pages"),
            (vec![(4096, 4095, 0)], "not whole pages"),
            (vec![(4096, 4096, 1)], "not whole pages"),
            (vec![(top, 8192, 0)], "not whole pages"),
            (vec![(4096, top, 0)], "not whole pages"),
            (vec![(0, top, 4096)], "another machine's"),
            (vec![(4096, 4096, top)], "another machine's"),
            (vec![(4096, 4096, 2 * 4096)], "another machine's"),
            (vec![(4096, 4096, 0)], "another machine's"),
            (vec![(4096, 3 * 4096, 0)], "another machine's"),
            (vec![(4096, 4096, 0), (4096, 4096, 4096)], "share"),
            (vec![(4096, 8192, 0), (8192, 4096, 4096)], "share"),
            (vec![(4096, 4096, 0), (65536, 4096, 0)], "share"),
        ] {
            let error = Regions::parse(&message(&regions), 2 * 4096).unwrap_err();
            assert!(error.to_string().contains(words), "{words}: {error}");
        }
    }

    #[test]
    fn what_is_no_message_is_refused_without_being_repeated() {
        let deep = "[".repeat(MAX_MESSAGE);
        for text in [
            "",
            "null",
            "{}",
            "[1]",
            "[{}]",
            deep.as_str(),
            r#"[{"base_host_virt_addr":-1,"size":4096,"offset":0}]"#,
            r#"[{"base_host_virt_addr":1e9,"size":4096,"offset":0}]"#,
            r#"[{"base_host_virt_addr":18446744073709551616,"size":4096,"offset":0}]"#,
            "[{\"base_host_virt_addr\":\"\u{1b}[2J\",\"size\":4096,\"offset\":0}]",
            r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0}] x"#,
        ] {
            let error = Regions::parse(text.as_bytes(), 4096).unwrap_err();
            assert!(matches!(error, Error::Json { .. }), "{text:.40}: {error}");
            assert!(!error.to_string().contains('\u{1b}'));
        }
        let long = vec![b' '; MAX_MESSAGE + 1];
        assert_eq!(Regions::parse(&long, 4096).unwrap_err(), Error::TooLong);
    }
}

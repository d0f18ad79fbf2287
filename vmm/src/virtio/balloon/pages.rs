//! Lists of page frame numbers, as the inflate queue brings them.

use crate::memory::release::PAGE;

/// Most pages looked at in one chain; Linux sends 256. Those beyond stay with the guest, which is
/// allowed: a page in the balloon is one that the host may take, not one that it must.
pub const MAX_PAGES: usize = 1024;
/// Length of one number in bytes.
const NUMBER_LEN: usize = 4;
/// Most bytes looked at in one chain.
pub const MAX_LIST_LEN: usize = MAX_PAGES * NUMBER_LEN;

/// Calls `each` with start and length of every run of pages in `list`, in bytes; a page that is
/// named twice is in one of them, once. `list` holds little-endian 32-bit numbers; what is left at
/// its end is none.
pub fn runs(list: &[u8], mut each: impl FnMut(u64, u64)) {
    let mut numbers = [0u32; MAX_PAGES];
    let mut count = 0;
    for (number, bytes) in numbers.iter_mut().zip(list.as_chunks::<NUMBER_LEN>().0) {
        *number = u32::from_le_bytes(*bytes);
        count += 1;
    }
    let numbers = numbers.get_mut(..count).unwrap_or_default();
    // The guest's allocator hands pages out in any order.
    numbers.sort_unstable();
    let follows = |a: &u32, b: &u32| b.saturating_sub(*a) <= 1;
    for run in numbers.chunk_by(follows) {
        if let (Some(first), Some(last)) = (run.first(), run.last()) {
            let pages = u64::from(last.saturating_sub(*first)) + 1;
            // Both have at most 45 bits.
            each(u64::from(*first) * PAGE, pages * PAGE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn found(numbers: &[u32]) -> Vec<(u64, u64)> {
        let list: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        let mut found = Vec::new();
        runs(&list, |start, len| found.push((start / PAGE, len / PAGE)));
        found
    }

    #[test]
    fn neighbours_become_one_run() {
        assert_eq!(found(&[]), []);
        assert_eq!(found(&[5, 4, 3, 9, 7, 8, 3]), [(3, 3), (7, 3)]);
        let top = u32::MAX;
        assert_eq!(found(&[top, 0, top - 1]), [(0, 1), (u64::from(top) - 1, 2)]);
    }

    #[test]
    fn half_a_number_is_none() {
        let mut found = Vec::new();
        runs(&[1, 0, 0, 0, 2, 0, 0], |start, len| {
            found.push((start, len))
        });
        assert_eq!(found, [(PAGE, PAGE)]);
    }

    #[test]
    fn more_than_the_most_are_left_out() {
        let numbers: Vec<u32> = (0..MAX_PAGES as u32 + 100).collect();
        assert_eq!(found(&numbers), [(0, MAX_PAGES as u64)]);
    }

    proptest! {
        #[test]
        fn every_page_is_in_exactly_one_run(
            numbers in prop::collection::vec(prop_oneof![0..64u32, any::<u32>()], 0..MAX_PAGES),
        ) {
            let mut pages = Vec::new();
            for (start, len) in found(&numbers) {
                pages.extend(start..start + len);
            }
            let expected: BTreeSet<u64> = numbers.iter().map(|n| u64::from(*n)).collect();
            prop_assert_eq!(pages, expected.into_iter().collect::<Vec<_>>());
        }
    }
}

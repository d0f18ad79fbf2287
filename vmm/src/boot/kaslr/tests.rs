use proptest::prelude::*;

use super::*;

#[test]
fn words_are_whole() {
    assert!(disabled_by("quiet nokaslr ro"));
    assert!(!disabled_by("quiet nokaslrx xnokaslr a=nokaslr"));
}

proptest! {
    #[test]
    fn picks_stay_inside(room in any::<u64>(), random in any::<u64>()) {
        let offset = pick(room, random);
        prop_assert!(offset <= room);
        prop_assert_eq!(offset % ALIGNMENT, 0);
    }

    #[test]
    fn every_slot_can_be_picked(slots in 1_u64..512, slot in 0_u64..512) {
        let room = (slots - 1) * ALIGNMENT;
        prop_assert_eq!(pick(room, slot), slot % slots * ALIGNMENT);
    }
}

use proptest::prelude::*;

use super::*;

#[test]
fn words_are_whole() {
    assert!(disabled_by("quiet nokaslr ro"));
    assert!(!disabled_by("quiet nokaslrx xnokaslr a=nokaslr"));
}

#[test]
fn memory_ends_where_the_command_line_says() {
    for (cmdline, end) in [
        ("quiet", Some(u64::MAX)),
        ("xmem=1M highmem=1 memory=5", Some(u64::MAX)),
        ("mem=64M", Some(64 << 20)),
        ("mem=1g quiet mem=0x2000k", Some(8 << 20)),
        ("mem=1048576", Some(1 << 20)),
        ("mem=0x10", Some(16)),
        ("mem=1T", Some(1 << 40)),
        ("mem=64M memmap=1M$32M", None),
        ("memmap=exactmap", None),
        ("mem=", None),
        ("mem=M", None),
        ("mem=nopentium", None),
        ("mem=+1M", None),
        ("mem=0x+1M", None),
        ("mem=0100M", None),
        ("mem=0", None),
        ("mem=64Mx", None),
        ("mem=64\u{e9}", None),
        ("mem=18446744073709551615K", None),
    ] {
        assert_eq!(memory_end(cmdline), end, "{cmdline}");
    }
}

proptest! {
    #[test]
    fn picks_stay_inside(room in any::<u64>(), random in any::<u64>()) {
        let offset = pick(room, random);
        prop_assert!(offset <= room);
        prop_assert_eq!(offset % ALIGNMENT, 0);
    }

    #[test]
    fn any_command_line_is_read(cmdline in "(mem=|memmap=)?[0-9a-fx+KMGT ]{0,24}") {
        memory_end(&cmdline);
    }

    #[test]
    fn every_slot_can_be_picked(slots in 1_u64..512, slot in 0_u64..512) {
        let room = (slots - 1) * ALIGNMENT;
        prop_assert_eq!(pick(room, slot), slot % slots * ALIGNMENT);
    }
}

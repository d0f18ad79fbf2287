use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use proptest::prelude::*;
use vm_memory::GuestMemoryRegion as _;

use super::*;
use crate::memory::add_hotplug;
use crate::memory::touched::Untouched;
use crate::testing::alone;

pub(super) const ID: SnapshotId = SnapshotId::from_bytes(*b"0123456789abcdef");
pub(super) const OTHER: SnapshotId = SnapshotId::from_bytes(*b"0123456789abcdeF");
pub(super) const MIB: u64 = 1 << 20;
pub(super) const HIGH: u64 = 4 << 30;
pub(super) const REGIONS: [Region; 2] = [(0, 4 * MIB), (HIGH, 2 * MIB)];

/// Memory below and above the MMIO hole.
pub(super) fn machine(options: Options) -> GuestMemory {
    allocate_regions(&REGIONS, options).unwrap()
}

fn shared() -> Options {
    Options {
        shared: true,
        ..Options::default()
    }
}

fn transparent() -> Options {
    Options {
        huge_pages: HugePages::Transparent,
        ..Options::default()
    }
}

pub(super) fn poke(memory: &GuestMemory, address: u64, bytes: &[u8]) {
    memory.write_slice(bytes, GuestAddress(address)).unwrap();
}

/// Bytes at the edges of pages, regions and chunks.
pub(super) fn fill(memory: &GuestMemory) {
    poke(memory, 0, b"first");
    poke(memory, 5 * PAGE - 1, b"ab"); // two pages
    poke(memory, 9 * PAGE, &[0; 5000]); // touched, and zero
    poke(memory, MIB, &[7; 600 << 10]); // more than is written at once
    poke(memory, 4 * MIB - 1, b"z");
    poke(memory, HIGH, b"high");
    poke(memory, HIGH + 2 * MIB - 4, b"last");
}

pub(super) fn contents(memory: &GuestMemory) -> Vec<u8> {
    let mut all = Vec::new();
    for region in memory.iter() {
        let mut bytes = vec![0; region.len() as usize];
        memory.read_slice(&mut bytes, region.start_addr()).unwrap();
        all.extend(bytes);
    }
    all
}

pub(super) fn saved(memory: &GuestMemory) -> (Arc<File>, Written) {
    let file = Arc::new(tempfile::tempfile().unwrap());
    let written = write(memory, Untouched::Mapped, &file, ID).unwrap();
    (file, written)
}

pub(super) fn refused(file: &File, id: SnapshotId, regions: &[Region]) -> String {
    let error = check(file, id, regions).expect_err("should be refused");
    let error = error.to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn what_was_written_is_there_again() {
    for from in [Options::default(), shared(), transparent()] {
        let memory = machine(from);
        fill(&memory);
        let before = contents(&memory);
        let (file, written) = saved(&memory);
        let expected = Written {
            ram: 6 * MIB,
            pages: 1 + 2 + 150 + 1 + 2,
        };
        assert_eq!(written, expected);
        assert_eq!(regions(&memory), REGIONS);
        check(&file, ID, &REGIONS).unwrap();
        verify(&file).unwrap();
        let mut raw = vec![0; before.len()];
        file.read_exact_at(&mut raw, 0).unwrap();
        assert!(raw == before, "the file has the memory from its start");
        for to in [Options::default(), shared(), transparent()] {
            let again = map(&file, &REGIONS, to).unwrap();
            assert!(contents(&again) == before, "{from:?} to {to:?}");
            assert_eq!(regions(&again), REGIONS);
        }
    }
}

#[test]
fn zeroes_are_never_written() {
    let memory = allocate_regions(&[(0, 128 * MIB)], Options::default()).unwrap();
    poke(&memory, 77 * MIB, b"x");
    poke(&memory, 20 * MIB, &[0; 1 << 20]);
    let (file, written) = saved(&memory);
    assert_eq!(written.pages, 1);
    let metadata = file.metadata().unwrap();
    assert_eq!(metadata.len(), 128 * MIB + PAGE);
    assert!(metadata.blocks() * 512 <= 64 << 10, "{}", metadata.blocks());
}

#[test]
fn memory_behind_a_handler_is_read_whole() {
    let memory = machine(Options::default());
    fill(&memory);
    let (file, _) = saved(&memory);
    let all = tempfile::tempfile().unwrap();
    write(&memory, Untouched::Elsewhere, &all, ID).unwrap();
    assert_eq!(trailer(&file).unwrap(), trailer(&all).unwrap());
}

#[test]
fn what_was_in_the_file_is_gone() {
    let memory = machine(Options::default());
    poke(&memory, 0, b"x");
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.write_all_at(&vec![9; 9 << 20], 0).unwrap();
    write(&memory, Untouched::Mapped, &file, ID).unwrap();
    verify(&file).unwrap();
    let again = map(&file, &REGIONS, Options::default()).unwrap();
    assert!(contents(&again) == contents(&memory));
}

#[test]
fn a_machine_that_was_restored_is_saved_again() {
    let memory = machine(Options::default());
    fill(&memory);
    let (file, _) = saved(&memory);
    // Of a file that may only be read, as a restored machine has it.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*file));
    let read_only = Arc::new(File::open(path).unwrap());
    for options in [Options::default(), shared()] {
        for file in [&file, &read_only] {
            let again = map(file, &REGIONS, options).unwrap();
            // One page new, one changed, one become zero; all others were not touched since.
            poke(&again, 3 * MIB, b"new");
            poke(&again, MIB + 10 * PAGE, b"changed");
            poke(&again, 0, &[0; 5]);
            let (second, written) = saved(&again);
            assert_eq!(written.pages, 156);
            let third = map(&second, &REGIONS, Options::default()).unwrap();
            assert!(contents(&third) == contents(&again));
        }
    }
    verify(&file).unwrap();
}

#[test]
fn a_guest_never_writes_to_the_file() {
    let memory = machine(Options::default());
    fill(&memory);
    let (file, _) = saved(&memory);
    let before = trailer(&file).unwrap();
    for options in [Options::default(), shared(), transparent()] {
        let again = map(&file, &REGIONS, options).unwrap();
        for (start, length) in REGIONS {
            poke(&again, start, &vec![0xaa; length as usize]);
        }
        drop(again);
        assert_eq!(verify(&file).unwrap(), before);
    }
}

#[test]
fn writes_are_tracked_from_then_on() {
    let memory = machine(Options::default());
    fill(&memory);
    let (file, _) = saved(&memory);
    for options in [Options::default(), shared(), transparent()] {
        let options = Options {
            track_dirty_pages: true,
            ..options
        };
        let again = map(&file, &REGIONS, options).unwrap();
        poke(&again, HIGH + PAGE, b"x");
        let taken: Vec<Vec<u64>> = again.iter().map(|each| dirty::of(each).take()).collect();
        let mut expected = [vec![0; 16], vec![0; 8]];
        expected[1][0] = 2;
        assert_eq!(taken, expected, "{options:?}");
    }
}

#[test]
fn a_file_has_one_length() {
    let memory = machine(Options::default());
    fill(&memory);
    let (file, _) = saved(&memory);
    let whole = file.metadata().unwrap().len();
    for length in [0, 1, PAGE, whole - PAGE, whole - 1, whole + 1, whole + PAGE] {
        let file = Arc::new(tempfile::tempfile().unwrap());
        write(&memory, Untouched::Mapped, &file, ID).unwrap();
        file.set_len(length).unwrap();
        let error = refused(&file, ID, &REGIONS);
        let expected = format!("has {length} bytes and needs {whole}");
        assert!(error.contains(&expected), "{error}");
        assert_eq!(error.contains("cut off"), length < whole, "{error}");
        assert!(verify(&file).is_err());
        assert_eq!(
            map(&file, &REGIONS, Options::default()).is_ok(),
            length >= whole
        );
    }
    // A trailer in the wrong place.
    let page = trailer(&file).unwrap().encode();
    file.write_all_at(&page, whole).unwrap();
    let error = refused(&file, ID, &REGIONS);
    assert!(error.contains("something was appended"), "{error}");
    file.set_len(whole).unwrap();
    file.write_all_at(&[0; 8], whole - PAGE).unwrap();
    assert!(refused(&file, ID, &REGIONS).contains("does not end as one"));
}

#[test]
fn another_memory_is_told_from_this() {
    let memory = machine(Options::default());
    let (file, _) = saved(&memory);
    let error = refused(&file, OTHER, &REGIONS);
    let (one, other) = (ID.to_string(), OTHER.to_string());
    assert!(error.contains(&one) && error.contains(&other), "{error}");
    for regions in [
        vec![(0, 6 * MIB)],
        vec![(0, 4 * MIB)],
        vec![(0, 4 * MIB), (HIGH + MIB, 2 * MIB)],
        vec![(0, 4 * MIB), (HIGH, MIB), (HIGH + MIB, MIB)],
    ] {
        let error = refused(&file, ID, &regions);
        assert!(error.contains("0x400000 bytes at 0x0, 0x200000"), "{error}");
    }
    // More than is said, in an error of one line.
    let many: Vec<_> = (0..9).map(|page| (page * PAGE, PAGE)).collect();
    let error = refused(&file, ID, &many);
    assert!(
        error.ends_with("0x1000 bytes at 0x3000 and 5 more regions"),
        "{error}"
    );
}

#[test]
fn regions_that_no_file_has_are_refused() {
    let memory = machine(Options::default());
    let (file, _) = saved(&memory);
    for regions in [
        vec![],
        vec![(0, 0)],
        vec![(0, 4097)],
        vec![(1, 4096)],
        vec![(0, 2 * PAGE), (PAGE, PAGE)],
        vec![(PAGE, PAGE), (0, PAGE)],
        vec![(u64::MAX - PAGE + 1, PAGE)],
        vec![(0, 1 << 62), (1 << 62, 1 << 62)],
        vec![(0, 17 << 40)],
        (0..251).map(|page| (page * PAGE, PAGE)).collect(),
    ] {
        refused(&file, ID, &regions);
        assert!(map(&file, &regions, Options::default()).is_err());
        assert!(read_region(&file, &regions, 0, &memory).is_err());
    }
    let odd = GuestMemory::from_ranges(&[(GuestAddress(0), 4097)]).unwrap();
    let error = write(&odd, Untouched::Mapped, &file, ID).unwrap_err();
    assert!(matches!(error, Error::Unfit(_)), "{error}");
    verify(&file).unwrap();
}

#[test]
fn no_byte_of_the_trailer_may_be_another() {
    let memory = machine(Options::default());
    let (file, _) = saved(&memory);
    let start = trailer(&file).unwrap().ram();
    let mut page = [0; PAGE as usize];
    file.read_exact_at(&mut page, start).unwrap();
    for (offset, byte) in (start..).zip(page) {
        file.write_all_at(&[byte ^ 0x10], offset).unwrap();
        refused(&file, ID, &REGIONS);
        file.write_all_at(&[byte], offset).unwrap();
    }
    check(&file, ID, &REGIONS).unwrap();
}

#[test]
fn verifying_finds_what_has_changed() {
    let memory = machine(Options::default());
    fill(&memory);
    let (file, _) = saved(&memory);
    let ram = trailer(&file).unwrap().ram();
    for (offset, byte) in [(0, b'F'), (9 * PAGE, 1), (MIB, 8), (ram - 1, 0)] {
        let mut before = [0];
        file.read_exact_at(&mut before, offset).unwrap();
        file.write_all_at(&[byte], offset).unwrap();
        let error = verify(&file).unwrap_err().to_string();
        assert!(error.contains("is damaged"), "{error}");
        file.write_all_at(&before, offset).unwrap();
        verify(&file).unwrap();
    }
    // A whole page lost, or in another's place.
    let mut page = [0; PAGE as usize];
    file.read_exact_at(&mut page, 0).unwrap();
    file.write_all_at(&ZEROES, 0).unwrap();
    assert!(verify(&file).is_err());
    file.write_all_at(&page, 2 * PAGE).unwrap();
    assert!(verify(&file).is_err());
    // Zeroes instead of a hole are the same.
    file.write_all_at(&page, 0).unwrap();
    file.write_all_at(&ZEROES, 2 * PAGE).unwrap();
    verify(&file).unwrap();
}

#[test]
fn memory_that_came_later_comes_again() {
    let block = 2 * MIB;
    let grow = |memory: &GuestMemory| add_hotplug(memory, 4 * block, block).unwrap();
    let memory = grow(&machine(Options::default()));
    let hotplug = memory.hotplug().unwrap();
    let start = hotplug.start();
    hotplug.plug(1..3).unwrap();
    poke(&memory, start + block, b"plugged");
    poke(&memory, start + 3 * block - 1, b"!");
    fill(&memory);
    let (file, _) = saved(&memory);
    let all = regions(&memory);
    assert_eq!(all, [REGIONS[0], REGIONS[1], (start, 4 * block)]);
    check(&file, ID, &all).unwrap();
    for options in [Options::default(), shared()] {
        let ram = map(&file, &all[..2], options).unwrap();
        let again = grow(&ram);
        let error = read_region(&file, &all, start, &again).unwrap_err();
        assert!(
            matches!(error, Error::Guest { .. }),
            "not plugged in: {error}"
        );
        again.hotplug().unwrap().plug(1..3).unwrap();
        read_region(&file, &all, start, &again).unwrap();
        let mut bytes = vec![0; 2 * block as usize];
        again
            .read_slice(&mut bytes, GuestAddress(start + block))
            .unwrap();
        assert!(bytes.starts_with(b"plugged\0") && bytes.ends_with(b"\0!"));
        assert!(contents(&ram) == contents(&machine_of(&file)));
    }
    let error = read_region(&file, &all, start + 1, &memory).unwrap_err();
    assert!(matches!(error, Error::NoRegion(_)), "{error}");
}

fn machine_of(file: &Arc<File>) -> GuestMemory {
    map(file, &REGIONS, Options::default()).unwrap()
}

#[test]
fn a_limit_of_file_sizes_is_named() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use nix::sys::signal::{SigSet, Signal};
    if !alone("snapshot::memory::tests::a_limit_of_file_sizes_is_named") {
        return;
    }
    // As the VMM does it: an error, and not a death.
    SigSet::from(Signal::SIGXFSZ).thread_block().unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    setrlimit(Resource::RLIMIT_FSIZE, MIB, hard).unwrap();
    let file = tempfile::tempfile().unwrap();
    let error = write(&machine(Options::default()), Untouched::Mapped, &file, ID).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("6295552 bytes long: File too large"),
        "{error}"
    );
    assert!(error.contains("--resource-limit fsize="), "{error}");
}

/// In a namespace with a file system of 64 KiB.
#[test]
fn a_full_disk_is_named() {
    const PLACE: &str = "CASEMATE_TEST_FULL_DISK";
    let name = "snapshot::memory::tests::a_full_disk_is_named";
    let Some(place) = std::env::var_os(PLACE) else {
        let place = tempfile::tempdir().unwrap();
        let script = r#"mount -t tmpfs -o size=64k none "$1" && exec "$2" --exact "$3""#;
        let output = Command::new("unshare")
            .args([
                "--user",
                "--map-root-user",
                "--mount",
                "sh",
                "-ec",
                script,
                "sh",
            ])
            .args([place.path(), &std::env::current_exe().unwrap()])
            .arg(name)
            .env(PLACE, place.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("1 passed"), "{text}{errors}");
        return;
    };
    let memory = machine(Options::default());
    fill(&memory);
    let path = std::path::Path::new(&place).join("memory");
    let file = File::create_new(path).unwrap();
    let error = write(&memory, Untouched::Mapped, &file, ID).unwrap_err();
    assert!(matches!(error, Error::Write { .. }), "{error}");
    let error = error.to_string();
    assert!(
        error.contains("No space left on device") && error.contains("; free space"),
        "{error}"
    );
    assert!(refused(&file, ID, &REGIONS).contains("does not end as one"));
}

#[test]
fn what_is_no_file_is_refused() {
    let null = Arc::new(File::open("/dev/null").unwrap());
    assert!(matches!(check(&null, ID, &REGIONS), Err(Error::NotAFile)));
    assert!(matches!(
        map(&null, &REGIONS, shared()),
        Err(Error::NotAFile)
    ));
    let memory = machine(Options::default());
    let path = tempfile::NamedTempFile::new().unwrap();
    let read_only = File::open(path.path()).unwrap();
    let error = write(&memory, Untouched::Mapped, &read_only, ID).unwrap_err();
    assert!(matches!(error, Error::SetLength { .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_memory_comes_back(
        writes in proptest::collection::vec((0..6 * MIB, 0..20_000_usize, any::<u8>()), 0..12),
        shared: bool,
    ) {
        let memory = machine(Options { shared, ..Options::default() });
        for (offset, length, byte) in writes {
            let high = offset.checked_sub(4 * MIB);
            let (start, room) = match high {
                None => (offset, 4 * MIB - offset),
                Some(inside) => (HIGH + inside, 2 * MIB - inside),
            };
            poke(&memory, start, &vec![byte; length.min(room as usize)]);
        }
        let (file, written) = saved(&memory);
        check(&file, ID, &REGIONS).unwrap();
        prop_assert_eq!(verify(&file).unwrap().pages, written.pages);
        let expected = contents(&memory);
        let used = expected.chunks(PAGE as usize).filter(|page| *page != ZEROES).count();
        prop_assert_eq!(written.pages, used as u64);
        prop_assert!(contents(&machine_of(&file)) == expected);
    }
}

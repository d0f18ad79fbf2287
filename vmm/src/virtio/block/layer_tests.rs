use super::*;
use crate::memory::GuestMemory;
use crate::memory::iovec::Segment;
use crate::virtio::testing::memory;
use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

const AT: u64 = 0x1000;

/// A layer, its files, and a guest's buffer.
struct Rig {
    layer: Layer,
    base: File,
    upper: File,
    memory: GuestMemory,
    pieces: IoVecBuffer,
}

fn base(len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    let bytes: Vec<u8> = (0..len).map(|at| (at / 512 % 251) as u8 + 1).collect();
    write(&file, &bytes, 0).unwrap();
    file
}

impl Rig {
    fn new(len: u64, most: u64, deferred: bool) -> Self {
        let upper = tempfile::tempfile().unwrap();
        upper.set_len(file_len(len)).unwrap();
        Self::over(base(len), upper, len, most, deferred).unwrap()
    }

    fn over(base: File, upper: File, len: u64, most: u64, deferred: bool) -> Result<Self, Error> {
        let clone = |file: &File| file.try_clone().unwrap();
        Ok(Self {
            layer: Layer::open(clone(&base), clone(&upper), len, most, deferred)?,
            base,
            upper,
            memory: memory(),
            pieces: IoVecBuffer::default(),
        })
    }

    fn read(&mut self, offset: u64, len: u32) -> io::Result<Vec<u8>> {
        let segments = [Segment {
            address: GuestAddress(AT),
            len,
        }];
        let span = Span::new(&self.memory, &segments, 0, len.into());
        self.layer.read(&mut self.pieces, span, offset)?;
        let mut bytes = vec![0; len as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(AT))
            .unwrap();
        Ok(bytes)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // In two pieces behind a header that is not theirs.
        let half = bytes.len() as u32 / 2;
        let segments = [
            Segment {
                address: GuestAddress(AT),
                len: 16 + half,
            },
            Segment {
                address: GuestAddress(AT + 0x20_0000),
                len: bytes.len() as u32 - half,
            },
        ];
        let (one, two) = bytes.split_at(half as usize);
        self.memory.write_slice(one, GuestAddress(AT + 16)).unwrap();
        self.memory
            .write_slice(two, GuestAddress(AT + 0x20_0000))
            .unwrap();
        let span = Span::new(&self.memory, &segments, 16, bytes.len() as u64);
        self.layer.write(&mut self.pieces, span, offset)
    }

    /// What a machine that starts later with the same files sees.
    fn reopened(&self, len: u64, most: u64) -> Self {
        let clone = |file: &File| file.try_clone().unwrap();
        Self::over(clone(&self.base), clone(&self.upper), len, most, true).unwrap()
    }
}

const MIB: u64 = 1 << 20;

#[test]
fn writes_stay_in_the_layer_and_the_image_shows_around_them() {
    let mut rig = Rig::new(MIB, MIB, false);
    let mut before = vec![0; MIB as usize];
    super::read(&rig.base, &mut before, 0).unwrap();
    rig.write(CLUSTER - 512, &[0xee; 1024]).unwrap();
    let mut expected = before.clone();
    expected[CLUSTER as usize - 512..][..1024].fill(0xee);
    assert_eq!(rig.read(0, MIB as u32).unwrap(), expected);
    assert_eq!(rig.layer.used, 2);
    let mut after = vec![0; MIB as usize];
    super::read(&rig.base, &mut after, 0).unwrap();
    assert!(before == after, "the image is only read");
    // Found again by who opens it next, without an orderly end.
    assert_eq!(
        rig.reopened(MIB, MIB).read(0, MIB as u32).unwrap(),
        expected
    );
}

#[test]
fn holds_what_it_may_and_no_more() {
    let mut rig = Rig::new(MIB, 2 * CLUSTER + CLUSTER / 2, false);
    rig.write(0, &[1; 512]).unwrap();
    rig.write(5 * CLUSTER, &[2; CLUSTER as usize]).unwrap();
    for _ in 0..3 {
        let full = rig.write(7 * CLUSTER, &[3; 512]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        let full = rig.layer.zero(7 * CLUSTER, CLUSTER).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    }
    // What it has can still be written, and what it has not be read.
    rig.write(512, &[4; 512]).unwrap();
    assert_eq!(
        rig.read(7 * CLUSTER, 512).unwrap(),
        [((7 * 128) % 251) as u8 + 1; 512]
    );
    // Room that the guest gives back is room.
    rig.layer.discard(5 * CLUSTER, CLUSTER).unwrap();
    rig.write(7 * CLUSTER, &[3; 512]).unwrap();
    let full = rig.write(5 * CLUSTER, &[3; 512]).unwrap_err();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    use std::os::unix::fs::MetadataExt as _;
    let blocks = rig.upper.metadata().unwrap().blocks() * 512;
    assert!(blocks <= 3 * CLUSTER, "{blocks}");
}

#[test]
fn what_a_flush_promised_is_found_again_and_what_it_did_not_is_whole() {
    let mut rig = Rig::new(MIB, MIB, true);
    rig.write(0, &[1; 512]).unwrap();
    // The bitmap waits: a host that dies here has the image's bytes.
    let mut later = rig.reopened(MIB, MIB);
    assert_eq!(later.read(0, 512).unwrap(), [1; 512].map(|_| 1));
    assert_eq!(later.layer.used, 0);
    drop(later);
    rig.layer.flush().unwrap();
    let later = rig.reopened(MIB, MIB);
    assert_eq!(later.layer.used, 1);
    drop(later);
    // An orderly end loses nothing either.
    rig.write(CLUSTER, &[9; 512]).unwrap();
    let (base, upper) = (
        rig.base.try_clone().unwrap(),
        rig.upper.try_clone().unwrap(),
    );
    drop(rig);
    let mut later = Rig::over(base, upper, MIB, MIB, true).unwrap();
    assert_eq!(later.read(CLUSTER, 512).unwrap(), [9; 512]);
}

#[test]
fn refuses_files_that_are_no_layer() {
    let file = |len: u64| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    };
    let open = |upper: File, len| Layer::open(base(512), upper, len, MIB, false);
    let needed = file_len(MIB);
    assert_eq!(needed, MIB + 4096 + 4096);
    let short = open(file(needed - 1), MIB).unwrap_err().to_string();
    assert!(short.contains(&format!("truncate -s {needed}")), "{short}");
    let used = file(needed);
    open(used.try_clone().unwrap(), MIB).unwrap();
    open(used.try_clone().unwrap(), MIB).unwrap();
    // Another image's.
    used.set_len(file_len(2 * MIB)).unwrap();
    let moved = open(used.try_clone().unwrap(), MIB - 512);
    assert!(matches!(moved, Err(Error::NotALayer(_))));
    for at in [MIB, needed - 4096] {
        let strange = file(needed);
        write(&strange, &[1], at).unwrap();
        let error = open(strange, MIB).unwrap_err();
        assert!(matches!(error, Error::NotALayer(_)), "{at}");
    }
    // Nothing at all is a disk too.
    open(file(file_len(0)), 0).unwrap();
}

#[derive(Clone, Debug)]
enum Act {
    Read(u64, u64),
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
    Reopen,
}

/// Sectors of the disk of the property test: its last cluster is a short one.
const SECTORS: u64 = 6 * 128 + 37;

fn act() -> impl Strategy<Value = Act> {
    let range = || (0..SECTORS, 1..300_u64).prop_map(|(at, len)| (at, len.min(SECTORS - at)));
    prop_oneof![
        range().prop_map(|(at, len)| Act::Read(at, len)),
        (range(), 1..255_u8).prop_map(|((at, len), byte)| Act::Write(at, len, byte)),
        range().prop_map(|(at, len)| Act::Zero(at, len)),
        range().prop_map(|(at, len)| Act::Discard(at, len)),
        Just(Act::Flush),
        Just(Act::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Against a disk that is an array, where `None` is what the guest discarded and may be anything.
    #[test]
    fn behaves_as_a_disk(
        acts in prop::collection::vec(act(), 1..40), most in 0..8_u64, deferred in any::<bool>(),
    ) {
        let (len, most) = (SECTORS * 512, most * CLUSTER);
        let mut rig = Rig::new(len, most, deferred);
        let mut model: Vec<Option<u8>> =
            (0..SECTORS).map(|sector| Some((sector % 251) as u8 + 1)).collect();
        for act in acts {
            let part = |model: &mut Vec<Option<u8>>, at: u64, len: u64, value| {
                model[at as usize..(at + len) as usize].fill(value);
            };
            match act {
                Act::Read(at, len) => {
                    let bytes = rig.read(at * 512, len as u32 * 512).unwrap();
                    for (sector, expected) in bytes.chunks(512).zip(&model[at as usize..]) {
                        if let Some(expected) = expected {
                            prop_assert_eq!(sector, &[*expected; 512][..]);
                        }
                    }
                }
                Act::Write(at, len, byte) => {
                    match rig.write(at * 512, &vec![byte; len as usize * 512]) {
                        Ok(()) => part(&mut model, at, len, Some(byte)),
                        // Some of it may have been written.
                        Err(error) => {
                            prop_assert_eq!(error.kind(), io::ErrorKind::StorageFull);
                            part(&mut model, at, len, None);
                        }
                    }
                }
                Act::Zero(at, len) => match rig.layer.zero(at * 512, len * 512) {
                    Ok(()) => part(&mut model, at, len, Some(0)),
                    Err(error) => {
                        prop_assert_eq!(error.kind(), io::ErrorKind::StorageFull);
                        part(&mut model, at, len, None);
                    }
                },
                Act::Discard(at, len) => {
                    rig.layer.discard(at * 512, len * 512).unwrap();
                    part(&mut model, at, len, None);
                }
                Act::Flush => rig.layer.flush().unwrap(),
                Act::Reopen => {
                    let (base, upper) = (
                        rig.base.try_clone().unwrap(),
                        rig.upper.try_clone().unwrap(),
                    );
                    drop(rig);
                    rig = Rig::over(base, upper, len, most, deferred).unwrap();
                }
            }
            let counted: u32 = rig.layer.present.iter().map(|byte| byte.count_ones()).sum();
            prop_assert_eq!(u64::from(counted), rig.layer.used);
            prop_assert!(rig.layer.used <= most / CLUSTER);
        }
    }
}

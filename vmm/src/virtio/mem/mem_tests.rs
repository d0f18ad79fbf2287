//! The memory device against drivers that do what they should, and others.

use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::memory::add_hotplug;
use crate::virtio::testing::{DATA, Rig, memory};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const START: u64 = 4 << 30;
const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// 64 MiB in blocks of 2, of which 16 should be plugged in.
fn rig() -> Rig<Mem> {
    let memory = add_hotplug(&memory(), 64 * MIB, BLOCK).unwrap();
    let options = MemOptions {
        region: Arc::clone(memory.hotplug().unwrap()),
        requested_size_mib: 16,
    };
    Rig::on(memory, Mem::new(options).unwrap(), 0, 16)
}

impl Rig<Mem> {
    /// Sends a request, and returns type and state of the answer.
    fn request(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        let mut bytes = [0xee; request::LEN];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
        let driver = &mut self.drivers[0];
        driver.put(DATA, &bytes);
        driver.put(DATA + 0x100, &[0xee; 16]);
        driver.add(&[(DATA, 24, false), (DATA + 0x100, 10, true)]);
        self.kick(0);
        let driver = &mut self.drivers[0];
        assert_eq!(driver.used().map(|(_, len)| len), Some(10));
        let answer = driver.get(DATA + 0x100, 11);
        assert_eq!(answer[2..8], [0; 6]);
        assert_eq!(answer[10], 0xee, "nothing beside it");
        let word = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
        (word(0), word(8))
    }

    fn kind(&mut self, kind: u16, address: u64, blocks: u16) -> u16 {
        self.request(kind, address, blocks).0
    }

    fn ask(&mut self, command: Command) -> Result<update::Answer, Error> {
        match self.device.update(Update::Mem(command)) {
            Ok(answer) => Ok(answer),
            Err(UpdateError::Mem(error)) => Err(error),
            Err(other) => panic!("{other}"),
        }
    }

    fn status(&mut self) -> Status {
        match self.ask(Command::Report) {
            Ok(update::Answer::Mem(status)) => status,
            other => panic!("{other:?}"),
        }
    }

    fn config(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.device.config().read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

#[test]
fn shows_where_memory_may_come() {
    let rig = rig();
    let fields: Vec<u64> = (0..7).map(|n| rig.config(n * 8)).collect();
    assert_eq!(fields, [BLOCK, 0, START, 64 * MIB, 64 * MIB, 0, 16 * MIB]);
    assert_eq!(rig.device.config().bytes().len(), 56);
}

#[test]
fn blocks_come_and_go() {
    let mut rig = rig();
    assert_eq!(rig.request(STATE, START, 32), (ACK, 1));
    assert_eq!(rig.kind(PLUG, START + 2 * BLOCK, 3), ACK);
    assert_eq!(rig.config(40), 3 * BLOCK);
    assert_eq!(rig.request(STATE, START + 2 * BLOCK, 3), (ACK, 0));
    assert_eq!(rig.request(STATE, START + BLOCK, 2), (ACK, 2));
    // The device's own thread sees it as memory, a queue's buffers too.
    assert_eq!(rig.kind(PLUG, START, 1), ACK);
    rig.drivers[0].put(START + 0x100, &[STATE as u8]);
    rig.drivers[0].add(&[(START + 0x100, 24, false), (START + 0x200, 10, true)]);
    rig.kick(0);
    assert_eq!(rig.drivers[0].used().map(|(_, len)| len), Some(10));
    assert_eq!(
        rig.drivers[0].get(START + 0x200, 2),
        [3, 0],
        "no block asked for"
    );
    assert_eq!(rig.kind(UNPLUG, START, 1), ACK);
    assert!(rig.memory.read_obj::<u8>(GuestAddress(START)).is_err());
    assert_eq!(rig.kind(UNPLUG_ALL, 1, 1), ACK);
    assert_eq!(rig.config(40), 0);
    assert_eq!(rig.device.blocks.metrics.plug_bytes.total(), 4 * BLOCK);
}

#[test]
fn no_more_than_is_requested() {
    let mut rig = rig();
    assert_eq!(rig.kind(PLUG, START, 9), NACK);
    assert_eq!(rig.kind(PLUG, START, 8), ACK);
    assert_eq!(rig.kind(PLUG, START + 8 * BLOCK, 1), NACK);
    assert_eq!(rig.ask(Command::Resize(18)), Ok(update::Answer::Done));
    assert_eq!((rig.config(48), rig.signal.config_changes()), (18 * MIB, 1));
    assert_eq!(rig.kind(PLUG, START + 8 * BLOCK, 1), ACK);
    // Less is wanted: what is there stays until the driver takes it away, and no more comes.
    assert_eq!(rig.ask(Command::Resize(0)), Ok(update::Answer::Done));
    assert_eq!(rig.kind(PLUG, START + 9 * BLOCK, 1), NACK);
    assert_eq!(rig.status().plugged_size, 18 * MIB);
    assert_eq!(rig.kind(UNPLUG, START, 9), ACK);
    let expected = Status {
        total_size: 64 * MIB,
        block_size: BLOCK,
        plugged_size: 0,
        requested_size: 0,
    };
    assert_eq!(rig.status(), expected);
}

#[test]
fn nonsense_is_an_error_and_changes_nothing() {
    let mut rig = rig();
    assert_eq!(rig.ask(Command::Resize(64)), Ok(update::Answer::Done));
    assert_eq!(rig.kind(PLUG, START + 4 * BLOCK, 4), ACK);
    for (address, blocks) in [
        (START, 0),
        (START + 4096, 1),
        (START - BLOCK, 1),
        (START, 33),
        (START, u16::MAX),
        (START + 31 * BLOCK, 2),
        (START + 32 * BLOCK, 1),
        (0, 1),
        (DATA & !(BLOCK - 1), 1),
        (u64::MAX, 1),
        (0u64.wrapping_sub(BLOCK), 1),
        (0u64.wrapping_sub(BLOCK), u16::MAX),
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            let answer = rig.kind(kind, address, blocks);
            assert_eq!(answer, ERROR, "{kind} of {blocks} at {address:#x}");
        }
    }
    // Plugged in already, in part, and not at all.
    for (kind, block, blocks) in [(PLUG, 4, 4), (PLUG, 3, 2), (UNPLUG, 0, 1), (UNPLUG, 3, 2)] {
        assert_eq!(rig.kind(kind, START + block * BLOCK, blocks), ERROR);
    }
    for kind in [4, 5, 256, u16::MAX] {
        assert_eq!(rig.kind(kind, START, 1), ERROR);
    }
    assert_eq!(rig.config(40), 4 * BLOCK);
    assert_eq!(rig.request(STATE, START + 4 * BLOCK, 4), (ACK, 0));
}

#[test]
fn odd_chains_are_answered_where_there_is_room() {
    let mut rig = rig();
    let driver = &mut rig.drivers[0];
    driver.add(&[(DATA, 23, false), (DATA + 0x100, 10, true)]);
    driver.add(&[(DATA + 0x100, 10, true)]);
    rig.kick(0);
    for _ in 0..2 {
        assert_eq!(rig.drivers[0].used().map(|(_, len)| len), Some(10));
        assert_eq!(rig.drivers[0].get(DATA + 0x100, 2), [3, 0]);
    }
    for chain in [[(DATA, 24, false)], [(DATA, 9, true)]] {
        let mut rig = self::rig();
        rig.drivers[0].add(&chain);
        assert!(rig.handle(Event::Queue(0)).is_err());
    }
}

#[test]
fn a_reset_takes_nothing_away() {
    let mut rig = rig();
    assert_eq!(rig.kind(PLUG, START, 2), ACK);
    let states = rig.device.stop();
    assert_eq!(rig.ask(Command::Resize(32)), Ok(update::Answer::Done));
    assert_eq!(rig.signal.config_changes(), 0);
    rig.start(&states, 0);
    assert_eq!(rig.request(STATE, START, 2), (ACK, 0));
    assert_eq!((rig.config(40), rig.config(48)), (2 * BLOCK, 32 * MIB));
}

#[test]
fn what_does_not_fit_is_not_requested() {
    let mut rig = rig();
    let too_large = |wanted| Error::TooLarge { wanted, total: 64 };
    assert_eq!(rig.ask(Command::Resize(66)), Err(too_large(66)));
    assert_eq!(rig.ask(Command::Resize(u32::MAX)), Err(too_large(u32::MAX)));
    let odd = Error::Misaligned {
        wanted: 3,
        block: 2,
    };
    assert_eq!(rig.ask(Command::Resize(3)), Err(odd));
    assert_eq!(rig.status().requested_size, 16 * MIB);
}

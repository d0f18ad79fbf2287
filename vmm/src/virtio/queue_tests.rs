use super::*;
use crate::virtio::testing::{Counter, DATA, Driver, END, INDIRECT, NEXT, WRITE, memory};
use proptest::prelude::*;

fn state() -> QueueState {
    Driver::new(&memory(), 0, 8).state
}

fn check(state: &QueueState) -> Result<Queue, Error> {
    Queue::new(0, state, 16, true, &memory())
}

/// Takes one chain, or says why there is none.
fn pop(driver: &Driver) -> Result<Option<Chain>, Error> {
    let mut chain = Chain::default();
    let mut queue = driver.queue(16, true);
    Ok(queue.pop(&driver.memory, &mut chain)?.then_some(chain))
}

#[test]
fn refuses_sizes_that_are_none() {
    for size in [0, 3, 7, 15, 17, 32, 0x8000, 0xffff] {
        let bad = QueueState { size, ..state() };
        assert!(matches!(check(&bad), Err(Error::Size { .. })), "{size}");
    }
    for size in [1, 2, 4, 8, 16] {
        assert!(check(&QueueState { size, ..state() }).is_ok(), "{size}");
    }
}

#[test]
fn refuses_rings_in_wrong_places() {
    let good = state();
    for bad in [
        QueueState {
            descriptors: good.descriptors + 8,
            ..good
        },
        QueueState {
            available: good.available + 1,
            ..good
        },
        QueueState {
            used: good.used + 2,
            ..good
        },
    ] {
        assert!(
            matches!(check(&bad), Err(Error::Misaligned { .. })),
            "{bad:?}"
        );
    }
    for bad in [
        QueueState {
            descriptors: END,
            ..good
        },
        QueueState {
            descriptors: END - 8 * 16 + 16,
            ..good
        },
        QueueState {
            available: END - 20,
            ..good
        },
        QueueState {
            used: END - 68,
            ..good
        },
        QueueState {
            used: 0xc000_0000,
            ..good
        },
        QueueState {
            used: u64::MAX - 3,
            ..good
        },
        QueueState {
            available: u64::MAX - 1,
            ..good
        },
        QueueState {
            descriptors: u64::MAX - 15,
            ..good
        },
    ] {
        assert!(
            matches!(check(&bad), Err(Error::OutOfMemory { .. })),
            "{bad:?}"
        );
    }
    for bad in [
        QueueState {
            available: good.descriptors,
            ..good
        },
        QueueState {
            available: good.descriptors + 8 * 16 - 2,
            ..good
        },
        QueueState {
            used: good.available,
            ..good
        },
        QueueState {
            used: good.descriptors + 16,
            ..good
        },
    ] {
        assert!(matches!(check(&bad), Err(Error::Overlap { .. })), "{bad:?}");
    }
}

#[test]
fn chains_arrive_as_they_were_made() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    assert!(pop(&driver).unwrap().is_none());
    let head = driver.add(&[
        (DATA, 16, false),
        (DATA + 64, 0, false),
        (DATA + 128, 9, true),
    ]);
    let chain = pop(&driver).unwrap().unwrap();
    assert_eq!(chain.head(), head);
    assert_eq!((chain.readable_len(), chain.writable_len()), (16, 9));
    assert_eq!(chain.readable().len(), 2);
}

#[test]
fn copies_across_buffers_and_no_further() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    driver.add(&[
        (DATA, 3, false),
        (DATA + 64, 5, false),
        (DATA + 128, 2, true),
        (DATA + 256, 2, true),
    ]);
    driver.put(DATA, b"abc");
    driver.put(DATA + 64, b"defgh");
    let chain = pop(&driver).unwrap().unwrap();
    let mut data = [0; 4];
    chain.read_at(&memory, 2, &mut data).unwrap();
    assert_eq!(&data, b"cdef");
    assert!(chain.read_at(&memory, 5, &mut data).is_err());
    assert!(chain.read_at(&memory, u64::MAX, &mut data).is_err());
    chain.write_at(&memory, 1, b"xyz").unwrap();
    assert_eq!(driver.get(DATA + 129, 1), b"x");
    assert_eq!(driver.get(DATA + 256, 2), b"yz");
    assert!(chain.write_at(&memory, 2, b"xyz").is_err());
}

#[test]
fn malformed_chains_are_told_from_finished_ones() {
    type Case = (&'static str, fn(&mut Driver));
    let cases: &[Case] = &[
        ("loops to itself", |d| d.describe(0, DATA, 1, NEXT, 0)),
        ("loops to another", |d| {
            d.describe(0, DATA, 1, NEXT, 1);
            d.describe(1, DATA, 1, NEXT, 0);
        }),
        ("next out of range", |d| d.describe(0, DATA, 1, NEXT, 8)),
        ("next far out of range", |d| {
            d.describe(0, DATA, 1, NEXT, 0xffff)
        }),
        ("readable after writable", |d| {
            d.describe(0, DATA, 1, NEXT | WRITE, 1);
            d.describe(1, DATA, 1, 0, 0);
        }),
        ("buffer outside memory", |d| d.describe(0, END, 1, 0, 0)),
        ("buffer over the end", |d| {
            d.describe(0, END - 1, 2, WRITE, 0)
        }),
        ("buffer that wraps", |d| d.describe(0, u64::MAX, 2, 0, 0)),
        ("buffer of 4 GiB", |d| d.describe(0, 0, u32::MAX, 0, 0)),
        ("indirect table of odd length", |d| {
            d.describe(0, DATA, 17, INDIRECT, 0)
        }),
        ("indirect table of length 0", |d| {
            d.describe(0, DATA, 0, INDIRECT, 0)
        }),
        ("indirect table outside memory", |d| {
            d.describe(0, END, 16, INDIRECT, 0)
        }),
        ("indirect table too long", |d| {
            d.describe(0, DATA, 0xffff_fff0, INDIRECT, 0)
        }),
        ("indirect in indirect", |d| {
            d.describe(0, DATA, 16, INDIRECT, 0);
            d.describe_at(DATA, 0, DATA + 64, 16, INDIRECT, 0);
        }),
        ("indirect after a buffer, nested", |d| {
            d.describe(0, DATA, 1, NEXT, 1);
            d.describe(1, DATA, 32, INDIRECT, 0);
            d.describe_at(DATA, 0, DATA, 1, NEXT, 1);
            d.describe_at(DATA, 1, DATA, 16, INDIRECT, 0);
        }),
        ("indirect loop", |d| {
            d.describe(0, DATA, 32, INDIRECT, 0);
            d.describe_at(DATA, 0, DATA, 1, NEXT, 1);
            d.describe_at(DATA, 1, DATA, 1, NEXT, 0);
        }),
        ("indirect next out of range", |d| {
            d.describe(0, DATA, 16, INDIRECT, 0);
            d.describe_at(DATA, 0, DATA, 1, NEXT, 1);
        }),
    ];
    for (name, make) in cases {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 8);
        make(&mut driver);
        driver.offer(0);
        assert!(matches!(pop(&driver), Err(Error::Chain { .. })), "{name}");
    }
}

#[test]
fn an_indirect_chain_over_the_bound_is_refused_and_one_below_is_not() {
    for (count, ok) in [(chain::MAX_SEGMENTS as u16, true), (2000, false)] {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 8);
        driver.describe(0, DATA, u32::from(count) * 16, INDIRECT, 0);
        for i in 0..count {
            let flags = if i + 1 < count { NEXT } else { 0 };
            driver.describe_at(DATA, i, DATA, 1, flags, i + 1);
        }
        driver.offer(0);
        assert_eq!(pop(&driver).is_ok(), ok, "{count}");
    }
}

/// A chain of the whole memory, over and over, that holds 4 GiB less `missing` bytes. `direct` of its descriptors lie
/// in the queue's own table and the others behind them in an indirect one.
fn of_4_gib_but(missing: u32, direct: u16, flags: u16) -> Driver {
    const COUNT: u16 = ((1 << 32) / END) as u16;
    let mut driver = Driver::new(&memory(), 0, 8);
    for i in 0..direct {
        driver.describe(i, 0, END as u32, flags | NEXT, i + 1);
    }
    let rest = COUNT - direct;
    driver.describe(direct, DATA, u32::from(rest) * 16, INDIRECT, 0);
    for i in 0..rest {
        let last = i + 1 == rest;
        let len = END as u32 - if last { missing } else { 0 };
        let next = if last { 0 } else { NEXT };
        driver.describe_at(DATA, i, 0, len, flags | next, i + 1);
    }
    driver.offer(0);
    driver
}

#[test]
fn a_chain_of_4_gib_is_refused_and_one_a_byte_shorter_is_not() {
    for flags in [0, WRITE] {
        for direct in [0, 7] {
            let error = pop(&of_4_gib_but(0, direct, flags)).unwrap_err();
            let Error::Chain { source, .. } = error else {
                panic!("{error}");
            };
            let segments = chain::MAX_SEGMENTS - 1;
            assert_eq!(source, chain::Error::Broken { head: 0, segments });
            let chain = pop(&of_4_gib_but(1, direct, flags)).unwrap().unwrap();
            let lengths = (chain.readable_len(), chain.writable_len());
            let all = u64::from(u32::MAX);
            let expected = if flags == WRITE { (0, all) } else { (all, 0) };
            assert_eq!(lengths, expected, "{direct}");
        }
    }
}

#[test]
fn a_head_that_is_no_descriptor_is_refused() {
    for head in [8, 16, 0xffff] {
        let mut driver = Driver::new(&memory(), 0, 8);
        driver.offer(head);
        assert!(pop(&driver).is_err(), "{head}");
    }
}

#[test]
fn an_available_index_that_jumps_is_refused() {
    for index in [9, 100, 0x8000, 0xffff] {
        let mut driver = Driver::new(&memory(), 0, 8);
        driver.set_available_index(index);
        assert!(matches!(pop(&driver), Err(Error::Ring { .. })), "{index}");
    }
}

#[test]
fn work_is_bounded_and_goes_on() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    for _ in 0..8 {
        driver.add(&[(DATA, 1, true)]);
    }
    let mut queue = driver.queue(16, true);
    let signal = Counter::default();
    let mut seen = 0;
    let mut count = |_: &Chain| {
        seen += 1;
        Ok(Verdict::Used(1))
    };
    for _ in 0..2 {
        let progress = queue.process(&memory, &signal, 3, &mut count).unwrap();
        assert_eq!(progress, Progress::More);
    }
    let progress = queue.process(&memory, &signal, 3, &mut count).unwrap();
    assert_eq!((progress, seen), (Progress::Done, 8));
    assert_eq!(std::iter::from_fn(|| driver.used()).count(), 8);
    assert_eq!(driver.wanted_doorbell(), 8);
}

#[test]
fn a_kept_chain_stays_available() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    let head = driver.add(&[(DATA, 1, true)]);
    let mut queue = driver.queue(16, true);
    let signal = Counter::default();
    let kept = queue.process(&memory, &signal, 8, |_| Ok(Verdict::Keep));
    assert_eq!(kept.unwrap(), Progress::Done);
    assert_eq!(driver.used(), None);
    queue
        .process(&memory, &signal, 8, |_| Ok(Verdict::Used(1)))
        .unwrap();
    assert_eq!(driver.used(), Some((u32::from(head), 1)));
    assert_eq!(signal.count(), 1);
}

#[test]
fn signals_when_the_driver_asked_to() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    let mut queue = driver.queue(16, true);
    let signal = Counter::default();
    driver.want_interrupt_after(1);
    for expected in [0, 1, 1] {
        driver.add(&[(DATA, 1, true)]);
        queue
            .process(&memory, &signal, 8, |_| Ok(Verdict::Used(0)))
            .unwrap();
        assert_eq!(signal.count(), expected);
    }
    // Without EVENT_IDX every batch signals, an empty one does not.
    let mut queue = driver.queue(16, false);
    let before = signal.count();
    queue
        .process(&memory, &signal, 8, |_| Ok(Verdict::Used(0)))
        .unwrap();
    assert_eq!(signal.count(), before + 1);
    queue
        .process(&memory, &signal, 8, |_| Ok(Verdict::Used(0)))
        .unwrap();
    assert_eq!(signal.count(), before + 1);
}

#[test]
fn chains_completed_together_appear_together_and_always_signal() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 4);
    let mut queue = driver.queue(16, true);
    let signal = Counter::default();
    // The second round wraps around the ring.
    for round in 0..2 {
        let heads: Vec<u16> = (0..3).map(|_| driver.add(&[(DATA, 8, true)])).collect();
        let mut chain = Chain::default();
        let mut chains = Vec::new();
        while queue.pop(&memory, &mut chain).unwrap() {
            chains.push((chain.head(), 7));
        }
        // In the middle of them: a plain count would miss it.
        driver.want_interrupt_after(round * 3);
        queue.complete_together(&memory, &chains).unwrap();
        queue.signal(&memory, &signal).unwrap();
        assert_eq!(signal.count(), usize::from(round) + 1);
        for head in heads {
            assert_eq!(driver.used(), Some((u32::from(head), 7)));
        }
        assert_eq!(driver.used(), None);
    }
    queue.complete_together(&memory, &[]).unwrap();
}

#[test]
fn a_queue_runs_on_from_its_state() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 8);
    let signal = Counter::default();
    let mut state = driver.state;
    for _ in 0..20 {
        driver.add(&[(DATA, 1, true)]);
        let mut queue = Queue::new(0, &state, 16, true, &memory).unwrap();
        queue
            .process(&memory, &signal, 8, |_| Ok(Verdict::Used(1)))
            .unwrap();
        state = queue.state();
        assert!(driver.used().is_some());
    }
    assert_eq!((state.next_available, state.next_used), (20, 20));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is in the rings, processing ends, and what is accepted lies in memory.
    #[test]
    fn any_ring_is_safe(
        descriptors in prop::collection::vec(
            (prop_oneof![0..END + 64, any::<u64>()], prop_oneof![0..0x2000u32, any::<u32>()], 0..8u16, 0..10u16),
            16,
        ),
        heads in prop::collection::vec(0..10u16, 8),
        available in prop_oneof![0..10u16, any::<u16>()],
        event_idx: bool,
    ) {
        let memory = memory();
        let driver = Driver::new(&memory, 0, 8);
        for (i, &(addr, len, flags, next)) in descriptors.iter().enumerate() {
            driver.describe(i as u16, addr, len, flags, next);
            driver.describe_at(DATA, i as u16, addr, len, flags, next);
        }
        for (i, &head) in heads.iter().enumerate() {
            driver.put16(driver.state.available + 4 + i as u64 * 2, head);
        }
        driver.put16(driver.state.available + 2, available);
        let mut queue = driver.queue(16, event_idx);
        let mut seen = 0;
        let result = queue.process(&memory, &Counter::default(), 100, |chain| {
            seen += 1;
            for segment in chain.readable().iter().chain(chain.writable()) {
                assert!(segment.address.0 + u64::from(segment.len) <= END || segment.len == 0);
            }
            Ok(Verdict::Used(0))
        });
        prop_assert!(seen <= 8);
        prop_assert!(!matches!(result, Ok(Progress::More)));
    }

    /// Whatever the driver configures, a queue that starts lies in memory.
    #[test]
    fn any_configuration_is_safe(
        size: u16,
        descriptors in prop_oneof![0..END + 64, any::<u64>()],
        available in prop_oneof![0..END + 64, any::<u64>()],
        used in prop_oneof![0..END + 64, any::<u64>()],
        next_available: u16,
        next_used: u16,
    ) {
        let state = QueueState { size, descriptors, available, used, next_available, next_used };
        if let Ok(mut queue) = check(&state) {
            prop_assert!(used + u64::from(size) * 8 + 6 <= END);
            prop_assert_eq!(queue.state(), state);
            let _ = queue.process(&memory(), &Counter::default(), 100, |_| Ok(Verdict::Used(0)));
        }
    }
}

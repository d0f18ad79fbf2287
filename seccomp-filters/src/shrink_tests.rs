//! Whether the build, when it shrinks filters, leaves what they say of calls as it is.

use std::collections::{BTreeMap, BTreeSet};

use crate::evaluator::{Call, X86_64, run};
use crate::{Patch, Role, Stage, sock_filter, template};

#[path = "../build/shrink.rs"]
mod shrink;

const PATCH: Patch = Patch { tgid: 4321 };

/// Offsets in a call as a filter sees it: all behind it are the arguments' words, the lower one of each first.
const NUMBER: u32 = 0;
const ARGUMENTS: u32 = 16;

/// The arguments' words that `program` looks at for calls of `number`, with values of each that make a difference.
fn values(program: &[sock_filter], number: i64) -> BTreeMap<u32, BTreeSet<u32>> {
    let mut values: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    // Instruction, and which word is loaded under which mask.
    let mut open = vec![(0_usize, NUMBER, u32::MAX)];
    while let Some(state) = open.pop() {
        if !seen.insert(state) {
            continue;
        }
        let (at, word, mask) = state;
        let sock_filter { code, jt, jf, k } = program[at];
        let behind = |offset: u8| at + 1 + usize::from(offset);
        match code {
            0x20 => open.push((at + 1, k, u32::MAX)),
            0x54 => open.push((at + 1, word, mask & k)),
            0x05 => open.push((at + 1 + k as usize, word, mask)),
            0x06 => {}
            _ if word < ARGUMENTS => {
                let loaded = if word == NUMBER {
                    number as u32
                } else {
                    X86_64
                };
                let taken = if code == 0x15 {
                    loaded == k
                } else {
                    loaded >= k
                };
                open.push((behind(if taken { jt } else { jf }), word, mask));
            }
            _ => {
                assert_eq!(code, 0x15, "a comparison that this test does not know");
                let bit = |at: u32| 1_u32.checked_shl(at).unwrap_or(0);
                let (low, high) = (
                    bit(mask.trailing_zeros()),
                    bit(31 - mask.leading_zeros().min(31)),
                );
                let near = [k, k ^ low, k ^ high, k | !mask, 0, u32::MAX];
                values.entry(word).or_default().extend(near);
                open.extend([(behind(jt), word, mask), (behind(jf), word, mask)]);
            }
        }
    }
    values
}

/// Calls `check` with each combination of `values`.
fn for_each(values: &[(u32, BTreeSet<u32>)], call: Call, check: &mut impl FnMut(&Call)) {
    let Some(((word, candidates), others)) = values.split_first() else {
        return check(&call);
    };
    let shift = (word & 4) * 8;
    for &value in candidates {
        let mut call = call;
        let argument = &mut call.args[((word - ARGUMENTS) / 8) as usize];
        *argument = *argument & !(0xffff_ffff << shift) | u64::from(value) << shift;
        for_each(others, call, check);
    }
}

#[test]
fn a_shrunk_filter_says_what_it_said() {
    for (role, stage) in Role::ALL
        .iter()
        .flat_map(|role| Stage::ALL.map(|stage| (*role, stage)))
    {
        let template = template(role, stage);
        let (before, after) = (
            template.unshrunk.patched(&PATCH),
            template.program.patched(&PATCH),
        );
        let mut verdicts = BTreeMap::new();
        let mut check = |call: &Call| {
            let verdict = run(&before, call);
            let (number, args) = (call.number, call.args);
            let shown = format!(
                "{role:?} {stage:?}: call {number} of {:#x}, {args:x?}",
                call.arch
            );
            assert_eq!(run(&after, call), verdict, "{shown}");
            *verdicts.entry(verdict).or_insert(0) += 1;
        };
        for number in (0..600).chain([0x4000_0000, 0x4000_0001, 0xffff_ffff]) {
            let call = |arch| Call {
                arch,
                number,
                args: [0; 6],
            };
            // Both have seen the same of a call when they have compared it with the same.
            let mut all = values(&before, number);
            for (word, more) in values(&after, number) {
                all.entry(word).or_default().extend(more);
            }
            let all: Vec<_> = all.into_iter().collect();
            for_each(&all, call(X86_64), &mut check);
            check(&call(0x4000_0003));
        }
        assert!(
            verdicts.contains_key(&libc::SECCOMP_RET_ALLOW),
            "{role:?} {stage:?}"
        );
        assert!(
            verdicts.contains_key(&libc::SECCOMP_RET_TRAP),
            "{role:?} {stage:?}"
        );
        let (before, after) = (before.len(), after.len());
        assert!(
            after * 2 < before,
            "{role:?} {stage:?}: {after} of {before}"
        );
    }
}

/// Numbers that are always the same.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        // Knuth's multiplier and increment for 64 bits; the upper half is random enough.
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % limit
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// A program such as nobody would write: it leads forward and ends, and nothing else is to be said for it.
    fn program(&mut self) -> Vec<seccompiler::sock_filter> {
        let length = 2 + self.below(900);
        let verdicts = [libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_TRAP];
        let mut program = Vec::new();
        for at in 0..length {
            let (mut jt, mut jf) = (0, 0);
            let left = length - at - 1;
            let codes = [0x20, 0x20, 0x54, 0x15, 0x15, 0x25, 0x35, 0x05, 0x06];
            // Loads something first, and ends.
            let code = match (at, left) {
                (0, _) => 0x20,
                (_, 0) => 0x06,
                _ => self.one_of(&codes),
            };
            let k = match code {
                0x20 => self.one_of(&[16, 20, 24]),
                0x05 => self.below(left.min(300)) as u32,
                0x06 => self.one_of(&verdicts),
                _ => self.below(8) as u32,
            };
            if code & 7 == 5 && code != 0x05 {
                (jt, jf) = (
                    self.below(left.min(256)) as u8,
                    self.below(left.min(256)) as u8,
                );
            }
            program.push(seccompiler::sock_filter { code, jt, jf, k });
        }
        program
    }
}

#[test]
fn any_program_says_what_it_said() {
    let own = |program: &[seccompiler::sock_filter]| -> Vec<sock_filter> {
        let own = |one: &seccompiler::sock_filter| sock_filter {
            code: one.code,
            jt: one.jt,
            jf: one.jf,
            k: one.k,
        };
        program.iter().map(own).collect()
    };
    let mut numbers = Numbers(1);
    for round in 0..2000 {
        let before = numbers.program();
        let after = own(&shrink::shrink(&before).unwrap());
        let before = own(&before);
        for _ in 0..50 {
            let mut args = [0; 6];
            args[0] = (numbers.below(8) | numbers.below(8) << 32) as u64;
            args[1] = numbers.below(8) as u64;
            let call = Call {
                arch: X86_64,
                number: 0,
                args,
            };
            let (expected, found) = (run(&before, &call), run(&after, &call));
            assert_eq!(found, expected, "program {round}, {args:x?}");
        }
    }
}

#[test]
fn what_is_no_program_is_refused() {
    let refused = |code, jt, k| shrink::shrink(&[seccompiler::sock_filter { code, jt, jf: 0, k }]);
    assert!(shrink::shrink(&[]).is_err());
    // Behind its end; and an addition.
    for (code, jt, k) in [
        (0x05, 0, 0),
        (0x05, 0, u32::MAX),
        (0x15, 1, 0),
        (0x20, 0, 0),
        (0x04, 0, 0),
    ] {
        assert!(refused(code, jt, k).is_err(), "{code:#x}");
    }
    assert!(refused(0x06, 0, 0).is_ok());
}

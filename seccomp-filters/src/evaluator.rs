//! A small interpreter of classic BPF, so that policies are tested as the kernel would run them,
//! without entering them. Written from the kernel's description of the machine and independent of
//! the compiler in the build script.

use crate::sock_filter;

pub const X86_64: u32 = 0xc000_003e;

/// A system call as a filter sees it (struct seccomp_data of linux/seccomp.h).
#[derive(Clone, Copy)]
pub struct Call {
    pub arch: u32,
    pub number: i64,
    pub args: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        let args = |index: u32| self.args[(index / 8) as usize];
        match offset {
            0 => self.number as u32,
            4 => self.arch,
            16..64 if offset & 7 == 0 => args(offset - 16) as u32,
            16..64 if offset & 7 == 4 => (args(offset - 20) >> 32) as u32,
            _ => panic!("load at {offset}"),
        }
    }
}

/// Runs `program` on `call` and returns its verdict.
pub fn run(program: &[sock_filter], call: &Call) -> u32 {
    let mut accumulator = 0_u32;
    let mut at = 0_usize;
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        let jump = |taken: bool| usize::from(if taken { jt } else { jf });
        match code {
            0x20 => accumulator = call.word(k), // ld [k]
            0x54 => accumulator &= k,           // and #k
            0x05 => at += k as usize,           // ja k
            0x15 => at += jump(accumulator == k),
            0x25 => at += jump(accumulator > k),
            0x35 => at += jump(accumulator >= k),
            0x06 => return k, // ret #k
            _ => panic!("instruction {code:#x}"),
        }
    }
}

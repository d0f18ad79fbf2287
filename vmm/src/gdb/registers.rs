//! Registers between KVM's form and gdb's.

use gdbstub_arch::x86::reg::{X86_64CoreRegs, X86SegmentRegs, X87FpuInternalRegs};
use kvm_bindings::{kvm_fpu, kvm_regs, kvm_sregs};

/// As gdb wants them.
pub fn to_gdb(general: &kvm_regs, special: &kvm_sregs, fpu: &kvm_fpu) -> X86_64CoreRegs {
    let mut registers = X86_64CoreRegs {
        regs: [
            general.rax,
            general.rbx,
            general.rcx,
            general.rdx,
            general.rsi,
            general.rdi,
            general.rbp,
            general.rsp,
            general.r8,
            general.r9,
            general.r10,
            general.r11,
            general.r12,
            general.r13,
            general.r14,
            general.r15,
        ],
        // The upper half is reserved.
        eflags: general.rflags as u32,
        rip: general.rip,
        segments: X86SegmentRegs {
            cs: special.cs.selector.into(),
            ss: special.ss.selector.into(),
            ds: special.ds.selector.into(),
            es: special.es.selector.into(),
            fs: special.fs.selector.into(),
            gs: special.gs.selector.into(),
        },
        fpu: X87FpuInternalRegs {
            fctrl: fpu.fcw.into(),
            fstat: fpu.fsw.into(),
            ftag: full_tags(fpu.ftwx),
            fop: fpu.last_opcode.into(),
            fioff: fpu.last_ip as u32,
            fiseg: (fpu.last_ip >> 32) as u32,
            fooff: fpu.last_dp as u32,
            foseg: (fpu.last_dp >> 32) as u32,
        },
        mxcsr: fpu.mxcsr,
        ..Default::default()
    };
    for (register, value) in registers.st.iter_mut().zip(&fpu.fpr) {
        // Ten bytes of sixteen.
        for (byte, from) in register.iter_mut().zip(value) {
            *byte = *from;
        }
    }
    for (register, value) in registers.xmm.iter_mut().zip(&fpu.xmm) {
        *register = u128::from_le_bytes(*value);
    }
    registers
}

/// The general ones of gdb's.
pub fn general(registers: &X86_64CoreRegs) -> kvm_regs {
    let [
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rbp,
        rsp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = registers.regs;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: registers.rip,
        rflags: registers.eflags.into(),
    }
}

/// Whether they differ in what [`general`] leaves out.
pub fn differ_elsewhere(one: &X86_64CoreRegs, other: &X86_64CoreRegs) -> bool {
    let with_general_of_one = X86_64CoreRegs {
        regs: one.regs,
        rip: one.rip,
        eflags: one.eflags,
        ..other.clone()
    };
    *one != with_general_of_one
}

/// FXSAVE keeps one bit for each register, used or not; gdb shows two: 0 is a number, 3 is empty.
fn full_tags(used: u8) -> u32 {
    let empty = (0..8).filter(|n| used >> n & 1 == 0);
    empty.map(|n| 0b11 << (2 * n)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_come_back() {
        let mut before = kvm_regs {
            rflags: 0x246,
            rip: 0xffff_ffff_8100_0000,
            ..Default::default()
        };
        let all = [
            &mut before.rax,
            &mut before.rbx,
            &mut before.rcx,
            &mut before.rdx,
            &mut before.rsi,
            &mut before.rdi,
            &mut before.rbp,
            &mut before.rsp,
            &mut before.r8,
            &mut before.r9,
            &mut before.r10,
            &mut before.r11,
            &mut before.r12,
            &mut before.r13,
            &mut before.r14,
            &mut before.r15,
        ];
        for (register, value) in all.into_iter().zip(1..) {
            *register = value;
        }
        let there = to_gdb(&before, &kvm_sregs::default(), &kvm_fpu::default());
        assert_eq!(
            there.regs,
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
        );
        assert_eq!(general(&there), before);
    }

    #[test]
    fn the_rest_is_compared() {
        let one = X86_64CoreRegs::default();
        let mut other = one.clone();
        other.regs[3] = 1;
        other.rip = 2;
        assert!(!differ_elsewhere(&one, &other));
        other.xmm[15] = 1;
        assert!(differ_elsewhere(&one, &other));
    }

    #[test]
    fn tags_are_two_bits_each() {
        assert_eq!(full_tags(0), 0xffff);
        assert_eq!(full_tags(0b1000_0001), 0x3ffc);
    }
}

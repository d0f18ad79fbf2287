//! The templates that have names. Each hides what its model CPU does not have, so that a guest
//! which was started on one host finds nothing missing on another.
//!
//! Bits are those of Intel's SDM volume 2A "CPUID" and AMD's APM volume 3 appendix E.

use crate::config::{
    Bitmap, CpuTemplate, CpuidModifier, CpuidRegister, CpuidRegisterModifier, MsrModifier,
    NamedCpuTemplate,
};

/// IA32_ARCH_CAPABILITIES: which weaknesses a CPU does not have.
const ARCH_CAPABILITIES: u32 = 0x10a;
/// Subleaves of these leaves mean something (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
const INDEXED: u32 = 1;

/// Leaf 1, EAX: all but the reserved bits 31..28 and 15..14.
const SIGNATURE: u32 = 0x0fff_3fff;
/// Haswell-EP, stepping 2; Ivy Bridge-EP, stepping 4; Milan, stepping 1.
const HASWELL: u32 = 0x0003_06f2;
const IVY_BRIDGE: u32 = 0x0003_06e4;
const MILAN: u32 = 0x00a0_0f11;

/// One register of one subleaf: what is hidden, and what is said instead.
struct Mask(u32, u32, CpuidRegister, u32, u32);

const fn bits(positions: &[u32]) -> u32 {
    let mut mask = 0;
    let mut at = 0;
    while at < positions.len() {
        mask |= 1 << positions[at];
        at += 1;
    }
    mask
}

/// Leaf 7.0, EBX, of after Haswell: RTM and HLE (switched off in most), resource monitoring and
/// allocation, MPX, RDSEED, ADX, SMAP is kept; CLFLUSHOPT, CLWB, processor trace, SHA, and AVX-512 F,
/// DQ, IFMA, PF, ER, CD, BW, VL.
const AFTER_HASWELL_7_EBX: u32 = bits(&[
    2, 4, 11, 12, 14, 15, 16, 17, 18, 19, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
]);
/// Leaf 7.0, ECX, of after Haswell: AVX-512 VBMI, UMIP, PKU, OSPKE, WAITPKG, VBMI2, shadow stacks, GFNI,
/// VAES, VPCLMULQDQ, VNNI, BITALG, TME, VPOPCNTDQ, LA57, RDPID, key locker, bus-lock detection,
/// CLDEMOTE, MOVDIRI, MOVDIR64B, ENQCMD, SGX launch control, PKS.
const AFTER_HASWELL_7_ECX: u32 = bits(&[
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 22, 23, 24, 25, 27, 28, 29, 30, 31,
]);
/// Leaf 7.0, EDX, of after Haswell: AVX-512 4VNNIW and 4FMAPS, fast short REP MOV, user interrupts,
/// VP2INTERSECT, SERIALIZE, TSX suspend, branch tracking, AMX BF16, AVX-512 FP16, AMX TILE and INT8. What
/// a guest needs against weaknesses (MD_CLEAR, IBRS, STIBP, L1D_FLUSH, SSBD) stays.
const AFTER_HASWELL_7_EDX: u32 = bits(&[2, 3, 4, 5, 8, 14, 16, 20, 22, 23, 24, 25]);
/// Leaf 0xd.0, EAX: every state but x87's, SSE's and AVX's.
const XSTATE_AFTER_AVX: u32 = !0b111;
/// Leaf 0xd.1, EAX: XSAVEC, XGETBV with ECX = 1, XSAVES, XFD. XSAVEOPT stays.
const XSAVE_AFTER_HASWELL: u32 = bits(&[1, 2, 3, 4]);

/// Haswell as most clouds offered it.
const T2: &[Mask] = &[
    Mask(0x1, 0, CpuidRegister::Eax, SIGNATURE, HASWELL),
    Mask(0x7, 0, CpuidRegister::Ebx, AFTER_HASWELL_7_EBX, 0),
    Mask(0x7, 0, CpuidRegister::Ecx, AFTER_HASWELL_7_ECX, 0),
    Mask(0x7, 0, CpuidRegister::Edx, AFTER_HASWELL_7_EDX, 0),
    // AVX-VNNI, BF16, fast zero-length REP, AMX FP16, AVX-IFMA, LAM and all that came later.
    Mask(0x7, 1, CpuidRegister::Eax, u32::MAX, 0),
    Mask(0x7, 1, CpuidRegister::Ebx, u32::MAX, 0),
    Mask(0x7, 1, CpuidRegister::Ecx, u32::MAX, 0),
    Mask(0x7, 1, CpuidRegister::Edx, u32::MAX, 0),
    Mask(0xd, 0, CpuidRegister::Eax, XSTATE_AFTER_AVX, 0),
    Mask(0xd, 1, CpuidRegister::Eax, XSAVE_AFTER_HASWELL, 0),
    // PREFETCHW; pages of 1 GiB; WBNOINVD.
    Mask(0x8000_0001, 0, CpuidRegister::Ecx, bits(&[8]), 0),
    Mask(0x8000_0001, 0, CpuidRegister::Edx, bits(&[26]), 0),
    Mask(0x8000_0008, 0, CpuidRegister::Ebx, bits(&[9]), 0),
];

/// Ivy Bridge: like T2, and without what Haswell brought.
const C3: &[Mask] = &[
    Mask(0x1, 0, CpuidRegister::Eax, SIGNATURE, IVY_BRIDGE),
    // FMA, MOVBE.
    Mask(0x1, 0, CpuidRegister::Ecx, bits(&[12, 22]), 0),
    // BMI1, AVX2, BMI2, INVPCID, and all that T2 hides.
    Mask(
        0x7,
        0,
        CpuidRegister::Ebx,
        AFTER_HASWELL_7_EBX | bits(&[3, 5, 8, 10]),
        0,
    ),
    Mask(0x7, 0, CpuidRegister::Ecx, AFTER_HASWELL_7_ECX, 0),
    Mask(0x7, 0, CpuidRegister::Edx, AFTER_HASWELL_7_EDX, 0),
    Mask(0x7, 1, CpuidRegister::Eax, u32::MAX, 0),
    Mask(0x7, 1, CpuidRegister::Ebx, u32::MAX, 0),
    Mask(0x7, 1, CpuidRegister::Ecx, u32::MAX, 0),
    Mask(0x7, 1, CpuidRegister::Edx, u32::MAX, 0),
    Mask(0xd, 0, CpuidRegister::Eax, XSTATE_AFTER_AVX, 0),
    Mask(0xd, 1, CpuidRegister::Eax, XSAVE_AFTER_HASWELL, 0),
    // LZCNT, PREFETCHW; pages of 1 GiB.
    Mask(0x8000_0001, 0, CpuidRegister::Ecx, bits(&[5, 8]), 0),
    Mask(0x8000_0001, 0, CpuidRegister::Edx, bits(&[26]), 0),
];

/// An AMD CPU (Milan) with what T2 has: programs that run on either find the same instructions.
const T2A: &[Mask] = &[
    Mask(0x1, 0, CpuidRegister::Eax, SIGNATURE, MILAN),
    Mask(0x7, 0, CpuidRegister::Ebx, AFTER_HASWELL_7_EBX, 0),
    Mask(0x7, 0, CpuidRegister::Ecx, AFTER_HASWELL_7_ECX, 0),
    Mask(0x7, 0, CpuidRegister::Edx, AFTER_HASWELL_7_EDX, 0),
    Mask(0x7, 1, CpuidRegister::Eax, u32::MAX, 0),
    Mask(0xd, 0, CpuidRegister::Eax, XSTATE_AFTER_AVX, 0),
    Mask(0xd, 1, CpuidRegister::Eax, XSAVE_AFTER_HASWELL, 0),
    // AMD's alone: SSE4A, misaligned SSE, PREFETCHW, XOP, FMA4, TBM.
    Mask(
        0x8000_0001,
        0,
        CpuidRegister::Ecx,
        bits(&[6, 7, 8, 11, 16, 21]),
        0,
    ),
    // MMX extensions, fast FXSAVE, pages of 1 GiB.
    Mask(0x8000_0001, 0, CpuidRegister::Edx, bits(&[22, 25, 26]), 0),
    // CLZERO, RDPRU, WBNOINVD.
    Mask(0x8000_0008, 0, CpuidRegister::Ebx, bits(&[0, 4, 9]), 0),
];

/// T2S: as vulnerable as any of the CPUs that it covers, so that a guest which moves to one of them
/// is protected there. RSBA and RRSBA (return predictions may come from elsewhere), FB_CLEAR (VERW
/// clears fill buffers, with every current microcode), and no weakness denied.
const T2S_ARCH_CAPABILITIES: u64 = 1 << 2 | 1 << 17 | 1 << 19;
/// T2CL: of what Cascade Lake can deny, what this host denies: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY,
/// MDS_NO, IF_PSCHANGE_MC_NO, TSX_CTRL, TAA_NO, FB_CLEAR, RRSBA, PBRSB_NO. The rest is hidden.
const T2CL_KEPT: u64 =
    1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 17 | 1 << 19 | 1 << 24;

/// The vendor whose CPUs a template is for, as CPUID leaf 0 names it.
pub fn vendor(name: NamedCpuTemplate) -> &'static str {
    match name {
        NamedCpuTemplate::T2A => "AuthenticAMD",
        _ => "GenuineIntel",
    }
}

/// What a template changes.
pub fn masks(name: NamedCpuTemplate) -> CpuTemplate {
    let all = u64::MAX;
    let (masks, msr) = match name {
        NamedCpuTemplate::None => (&[][..], None),
        NamedCpuTemplate::C3 => (C3, None),
        NamedCpuTemplate::T2 => (T2, None),
        NamedCpuTemplate::T2S => (T2, Some((all, T2S_ARCH_CAPABILITIES))),
        NamedCpuTemplate::T2CL => (T2, Some((all & !T2CL_KEPT, 0))),
        NamedCpuTemplate::T2A => (T2A, None),
    };
    let msr = msr.map(|(filter, value)| MsrModifier {
        addr: ARCH_CAPABILITIES,
        bitmap: Bitmap { filter, value },
    });
    CpuTemplate {
        kvm_capabilities: Vec::new(),
        cpuid_modifiers: masks.iter().map(modifier).collect(),
        msr_modifiers: msr.into_iter().collect(),
    }
}

fn modifier(&Mask(leaf, subleaf, register, hidden, said): &Mask) -> CpuidModifier {
    let indexed = matches!(leaf, 0x7 | 0xd);
    CpuidModifier {
        leaf,
        subleaf,
        flags: if indexed { INDEXED } else { 0 },
        modifiers: vec![CpuidRegisterModifier {
            register,
            bitmap: Bitmap {
                filter: hidden.into(),
                value: said.into(),
            },
        }],
    }
}

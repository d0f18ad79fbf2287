//! Registers at the guest's first instruction.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::boot::{EntryState, Protocol};
use crate::memory::layout;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Selectors of the GDT that `boot` writes: Linux's `__BOOT_CS` and `__BOOT_DS`, then a TSS.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
/// Last byte of that table of six entries.
const GDT_LIMIT: u16 = 0x2f;

/// General registers.
pub fn general(entry: &EntryState) -> kvm_regs {
    kvm_regs {
        rip: entry.rip,
        rsi: entry.rsi,
        rbx: entry.rbx,
        rsp: layout::BOOT_STACK_POINTER,
        rbp: layout::BOOT_STACK_POINTER,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    }
}

/// Puts the vCPU in the mode that the protocol asks for.
pub fn enter_mode(special: &mut kvm_sregs, protocol: Protocol) {
    let long = protocol == Protocol::Linux64;
    special.cs = segment(CODE_SELECTOR, 0xb, long);
    special.cs.db = u8::from(!long);
    for data in [
        &mut special.ds,
        &mut special.es,
        &mut special.fs,
        &mut special.gs,
        &mut special.ss,
    ] {
        *data = segment(DATA_SELECTOR, 0x3, false);
    }
    special.tr = kvm_segment {
        base: 0,
        limit: 0x67,
        selector: TSS_SELECTOR,
        // A busy TSS.
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    special.gdt = kvm_dtable {
        base: layout::GDT_START,
        limit: GDT_LIMIT,
        ..Default::default()
    };
    // Empty: an exception before the guest has its own table is a triple fault.
    special.idt = kvm_dtable {
        base: layout::IDT_START,
        limit: 0,
        ..Default::default()
    };
    special.cr0 = CR0_PE | CR0_ET;
    (special.cr3, special.cr4, special.efer) = (0, 0, 0);
    if long {
        special.cr0 |= CR0_PG;
        special.cr3 = layout::PML4_START;
        special.cr4 = CR4_PAE;
        special.efer = EFER_LME | EFER_LMA;
    }
}

/// A flat segment of ring 0.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

use std::io::Write as _;

use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::testing::*;
use super::*;

const MIB: usize = 1 << 20;

fn load_with(
    memory: &GuestMemory,
    kernel: &TestKernel,
    initrd: Option<&[u8]>,
    boot_args: &str,
    protocol: Option<Protocol>,
) -> Result<EntryState, Error> {
    let initrd = initrd.map(file);
    let kernel = kernel.file();
    load(
        memory,
        &kernel,
        initrd.as_ref(),
        boot_args,
        protocol,
        &machine(2),
    )
}

fn text_at(memory: &GuestMemory, address: u64, length: usize) -> String {
    let mut bytes = vec![0; length];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn linux64_gets_a_zero_page() {
    let memory = memory(&[(0, 64 * MIB), (1 << 32, 16 * MIB)]);
    let initrd = vec![0x5a; 5000];
    let kernel = TestKernel::new();
    let state = load_with(&memory, &kernel, Some(&initrd), "console=ttyS0 quiet", None).unwrap();
    assert_eq!(
        state,
        EntryState {
            protocol: Protocol::Linux64,
            rip: LINKED_AT,
            rsi: layout::ZERO_PAGE_START,
            rbx: 0,
            kaslr: KaslrOutcome::NoRelocations,
        }
    );
    let params: boot_params = read(&memory, layout::ZERO_PAGE_START);
    assert_eq!({ params.hdr.header }, 0x5372_6448);
    assert_eq!({ params.hdr.boot_flag }, 0xaa55);
    assert_eq!(params.hdr.type_of_loader, 0xff);
    assert_eq!(params.hdr.loadflags, 1);
    assert_eq!({ params.hdr.cmd_line_ptr }, 0x20000);
    assert_eq!({ params.hdr.kernel_alignment }, 0x20_0000);
    assert_eq!(params.sentinel, 0);
    assert_eq!({ params.acpi_rsdp_addr }, 0xe0000);
    assert_eq!(text_at(&memory, 0x20000, 20), "console=ttyS0 quiet\0");

    // The initrd: at a page, as high as low memory goes.
    let start = u64::from(params.hdr.ramdisk_image);
    assert_eq!(start, 64 * MIB as u64 - 8192);
    assert_eq!({ params.hdr.ramdisk_size }, 5000);
    let mut bytes = vec![0; 5000];
    memory.read_slice(&mut bytes, GuestAddress(start)).unwrap();
    assert!(bytes == initrd);

    let entries = { params.e820_table };
    let map: Vec<_> = entries[..params.e820_entries.into()]
        .iter()
        .map(|entry| ({ entry.addr }, { entry.size }, { entry.r#type }))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9fc00, 1),
            (0xe0000, 0x1d000, 3),
            (0xfd000, 0x2000, 2),
            (0xffff0, 0x10, 2),
            (0x100000, 63 * MIB as u64, 1),
            (0xc000_0000, 1 << 30, 2),
            (1 << 32, 16 * MIB as u64, 1),
        ]
    );

    // Real-mode code behind the map's reserved entry: a guest that restarts the old way finds it.
    assert_eq!(read::<u8>(&memory, 0xffff0), 0xb0);

    let mut loaded = vec![0; 256];
    memory
        .read_slice(&mut loaded, GuestAddress(LINKED_AT))
        .unwrap();
    assert_eq!(loaded, kernel.content);
}

#[test]
fn cpu_tables_are_flat_and_identical() {
    let memory = memory(&[(0, 64 * MIB)]);
    load_with(&memory, &TestKernel::new(), None, "", None).unwrap();
    let long = |address| read::<u64>(&memory, address);
    // Code 64-bit (L, not D), data writable, both flat and present; the TSS busy.
    assert_eq!(long(0x500 + 0x10), 0x00af_9b00_0000_ffff);
    assert_eq!(long(0x500 + 0x18), 0x00cf_9300_0000_ffff);
    assert_eq!(long(0x500 + 0x20), 0x0000_8b00_0000_ffff);
    const { assert!(layout::GDT_START + 6 * 8 <= layout::IDT_START) };
    // Walk the page tables for addresses in each gigabyte.
    for address in [
        0_u64,
        0x1234_5678,
        0x7fff_ffff,
        0x8000_0000,
        0xfee0_0000,
        0xffff_ffff,
    ] {
        let pdpt = long(layout::PML4_START + ((address >> 39) & 511) * 8);
        assert_eq!(pdpt & 0xfff, 3);
        let directory = long((pdpt & !0xfff) + ((address >> 30) & 511) * 8);
        assert_eq!(directory & 0xfff, 3);
        let page = long((directory & !0xfff) + ((address >> 21) & 511) * 8);
        assert_eq!(page, (address & !0x1f_ffff) | 0x83);
    }
}

#[test]
fn pvh_gets_start_info() {
    let memory = memory(&[(0, 64 * MIB)]);
    let kernel = TestKernel::new().with_pvh(LINKED_AT as u32 + 16);
    let state = load_with(&memory, &kernel, Some(&[1; 10]), "a=b", None).unwrap();
    assert_eq!(state.protocol, Protocol::Pvh);
    assert_eq!(state.rip, LINKED_AT + 16);
    assert_eq!((state.rbx, state.rsi), (layout::PVH_INFO_START, 0));
    let info: hvm_start_info = read(&memory, state.rbx);
    assert_eq!({ info.magic }, 0x336e_c578);
    assert_eq!({ info.version }, 1);
    assert_eq!(text_at(&memory, info.cmdline_paddr, 4), "a=b\0");
    assert_eq!({ info.rsdp_paddr }, 0xe0000);
    assert_eq!({ info.nr_modules }, 1);
    let module: hvm_modlist_entry = read(&memory, info.modlist_paddr);
    assert_eq!({ module.size }, 10);
    assert_eq!(read::<u8>(&memory, module.paddr), 1);
    assert_eq!({ info.memmap_entries }, 6);
    let entry: hvm_memmap_table_entry = read(&memory, info.memmap_paddr + 4 * 24);
    assert_eq!(
        (entry.addr, entry.size, entry.type_),
        (0x100000, 63 * MIB as u64, 1)
    );

    // The operator's choice wins, and PVH without an entry is an error.
    let linux = load_with(&memory, &kernel, None, "", Some(Protocol::Linux64)).unwrap();
    assert_eq!((linux.protocol, linux.rip), (Protocol::Linux64, LINKED_AT));
    let error = load_with(&memory, &TestKernel::new(), None, "", Some(Protocol::Pvh)).unwrap_err();
    assert!(matches!(error, Error::NoPvhEntry), "{error}");
}

#[test]
fn hostile_notes_end() {
    let entry = |notes: &[u8]| {
        let kernel = TestKernel {
            notes: notes.to_vec(),
            ..TestKernel::new()
        };
        load_with(&memory(&[(0, 32 * MIB)]), &kernel, None, "", None).map(|s| s.protocol)
    };
    let huge = [[0xff; 8].as_slice(), &[18, 0, 0, 0], b"Xen\0"].concat();
    let short = note(b"Xen\0", 18, &[1]);
    let empty = note(b"", 0, b"").repeat(5000);
    for notes in [&huge[..], &short, &empty, &short[..13], &[0; 11]] {
        assert_eq!(entry(notes).unwrap(), Protocol::Linux64);
    }
}

/// A kernel with one relocation of each kind; what is there before and after.
#[test]
fn relocations_move_addresses() {
    let mut kernel = TestKernel::new().with_pvh(LINKED_AT as u32);
    let target = KERNEL_MAP + LINKED_AT + 0x40;
    kernel.content[0x10..0x18].copy_from_slice(&target.to_le_bytes());
    kernel.content[0x21..0x25].copy_from_slice(&(target as u32).to_le_bytes());
    kernel.content[0x30..0x34].copy_from_slice(&(-0x40_i32).to_le_bytes());
    let place = |offset: u64| (KERNEL_MAP + LINKED_AT + offset) as i32;
    kernel.relocations = vec![0, place(0x10), 0, place(0x30), 0, place(0x21)];

    let mut seen = std::collections::HashSet::new();
    for _ in 0..16 {
        let memory = memory(&[(0, 64 * MIB)]);
        let state = load_with(&memory, &kernel, Some(&[0; 4096]), "", None).unwrap();
        // Relocations win over the PVH note.
        assert_eq!(state.protocol, Protocol::Linux64);
        let KaslrOutcome::Applied {
            virtual_offset,
            physical_offset,
        } = state.kaslr
        else {
            panic!("{:?}", state.kaslr);
        };
        assert_eq!(virtual_offset % kaslr::ALIGNMENT, 0);
        assert_eq!(physical_offset % kaslr::ALIGNMENT, 0);
        assert!(LINKED_AT + virtual_offset + kernel.memory_size <= 1 << 30);
        assert!(LINKED_AT + physical_offset + kernel.memory_size <= 64 * MIB as u64 - 4096);
        let base = LINKED_AT + physical_offset;
        assert_eq!(state.rip, base);
        assert_eq!(read::<u64>(&memory, base + 0x10), target + virtual_offset);
        assert_eq!(
            read::<u32>(&memory, base + 0x21),
            (target + virtual_offset) as u32
        );
        let inverse = (-0x40_i64 - virtual_offset.cast_signed()) as i32;
        assert_eq!(read::<i32>(&memory, base + 0x30), inverse);
        // Nothing else changed.
        assert_eq!(read::<u8>(&memory, base + 0x20), 0x20);
        assert_eq!(read::<u8>(&memory, base + 0x25), 0x25);
        let params: boot_params = read(&memory, state.rsi);
        assert_eq!(params.hdr.loadflags, 0b11);
        seen.insert((virtual_offset, physical_offset));
    }
    // 503 slots times 23: sixteen equal draws mean that nothing is drawn.
    assert!(seen.len() > 1);
}

#[test]
fn relocations_are_left_alone_when_they_must_be() {
    let mut kernel = TestKernel::new().with_pvh(LINKED_AT as u32);
    let place = (KERNEL_MAP + LINKED_AT) as i32;
    kernel.relocations = vec![0, place, 0, 0];
    let memory = memory(&[(0, 64 * MIB)]);
    let fixed = load_with(&memory, &kernel, None, "quiet nokaslr", None).unwrap();
    assert_eq!(fixed.kaslr, KaslrOutcome::DisabledByCommandLine);
    assert_eq!(fixed.rip, LINKED_AT);
    let params: boot_params = read(&memory, fixed.rsi);
    assert_eq!(params.hdr.loadflags, 1);
    assert_eq!(read::<u64>(&memory, LINKED_AT), 0x0706_0504_0302_0100);
    let pvh = load_with(&memory, &kernel, None, "", Some(Protocol::Pvh)).unwrap();
    assert_eq!(pvh.kaslr, KaslrOutcome::NotWithPvh);
    // A word that only contains it is another parameter.
    let other = load_with(&memory, &kernel, None, "x=nokaslr", None).unwrap();
    assert!(matches!(other.kaslr, KaslrOutcome::Applied { .. }));
}

#[test]
fn the_kernel_stays_in_the_memory_that_the_command_line_leaves() {
    let mut kernel = TestKernel::new();
    kernel.relocations = vec![0, (KERNEL_MAP + LINKED_AT) as i32, 0, 0];
    for (boot_args, end) in [
        ("mem=20M", 20 * MIB as u64),
        ("mem=8M", LINKED_AT + kernel.memory_size),
        ("memmap=16M$32M", LINKED_AT + kernel.memory_size),
    ] {
        for _ in 0..16 {
            let memory = memory(&[(0, 64 * MIB)]);
            let state = load_with(&memory, &kernel, None, boot_args, None).unwrap();
            assert!(state.rip + kernel.memory_size <= end, "{boot_args}");
        }
    }
}

#[test]
fn a_bzimage_is_unpacked_and_its_header_used() {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&TestKernel::new().bytes()).unwrap();
    let payload = encoder.finish().unwrap();
    let mut bytes = vec![0; 1024];
    let mut put = |offset: usize, field: &[u8]| {
        bytes[offset..offset + field.len()].copy_from_slice(field);
    };
    put(0x1f1, &[1]);
    put(0x200, b"\xeb\x6aHdrS\x0f\x02");
    put(0x218, &[0xff; 16]); // pointers to an initrd and a command line that nobody gave
    put(0x22c, &0x0fff_ffff_u32.to_le_bytes());
    put(0x230, &0x40_0000_u32.to_le_bytes());
    put(0x238, &100_u32.to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x250, &[0xff; 8]); // setup_data
    bytes.extend(payload);
    let kernel = file(&bytes);
    let memory = memory(&[(0, 512 * MIB)]);
    let load_args = |args: &str, initrd| load(&memory, &kernel, initrd, args, None, &machine(0));
    let initrd = file(&[1; 4096]);
    let state = load_args("quiet", Some(&initrd)).unwrap();
    assert_eq!(state.rip, LINKED_AT);
    let params: boot_params = read(&memory, state.rsi);
    assert_eq!({ params.hdr.kernel_alignment }, 0x40_0000);
    assert_eq!({ params.hdr.setup_data }, 0);
    assert_eq!({ params.hdr.cmd_line_ptr }, 0x20000);
    assert_eq!({ params.hdr.ramdisk_image }, 0x1000_0000 - 4096);
    let state = load_args("quiet", None).unwrap();
    let params: boot_params = read(&memory, state.rsi);
    assert_eq!(
        ({ params.hdr.ramdisk_image }, { params.hdr.ramdisk_size }),
        (0, 0)
    );
    let error = load_args(&"x".repeat(101), None).unwrap_err();
    assert!(
        matches!(error, Error::CmdlineTooLong { limit: 100, .. }),
        "{error}"
    );
}

#[test]
fn devices_are_named_once() {
    let memory = memory(&[(0, 64 * MIB)]);
    let line = |args: &str| {
        load_with(&memory, &TestKernel::new(), None, args, None).unwrap();
        let text = text_at(&memory, 0x20000, 2048);
        text.split('\0').next().unwrap_or_default().to_owned()
    };
    assert_eq!(line("quiet"), "quiet");
    assert_eq!(line("xacpi=off"), "xacpi=off");
    assert_eq!(
        line("task=blk acpi=off -- init"),
        "task=blk acpi=off virtio_mmio.device=4K@0xc0001000:6 \
         virtio_mmio.device=4K@0xc0002000:7 -- init"
    );
}

#[test]
fn bad_command_lines_are_refused() {
    let memory = memory(&[(0, 64 * MIB)]);
    let refused = |args: &str| load_with(&memory, &TestKernel::new(), None, args, None).is_err();
    assert!(refused(&"x".repeat(2048)));
    assert!(!refused(&"x".repeat(2047)));
    assert!(refused("a\0b"));
    assert!(refused("a\nb"));
    assert!(refused("caf\u{e9}"));
}

#[test]
fn kernels_that_do_not_fit_are_refused() {
    let refused = |memory: &GuestMemory, kernel: &TestKernel, initrd: Option<&[u8]>| {
        load_with(memory, kernel, initrd, "", None).unwrap_err()
    };
    let outside = |error: &Error| matches!(error, Error::KernelOutsideMemory { .. });
    let plenty = memory(&[(0, 64 * MIB)]);
    for mib in [1, 2, 16] {
        let error = refused(&memory(&[(0, mib * MIB)]), &TestKernel::new(), None);
        assert!(outside(&error), "{mib} MiB: {error}");
    }
    // Over the zero page and the tables; across the start of high memory; in the MMIO hole.
    for physical in [0, 0x7000, 0xff000, 0xc000_0000, u64::MAX - 8192] {
        let kernel = TestKernel {
            physical,
            entry: physical,
            ..TestKernel::new()
        };
        let error = refused(&plenty, &kernel, None);
        assert!(outside(&error), "{physical:#x}: {error}");
    }
    let kernel = TestKernel {
        memory_size: 60 << 20,
        ..TestKernel::new()
    };
    assert!(outside(&refused(&plenty, &kernel, None)));
    // It fits, but not beside the initrd.
    let kernel = TestKernel {
        memory_size: 48 << 20,
        ..TestKernel::new()
    };
    assert!(load_with(&plenty, &kernel, None, "", None).is_ok());
    assert!(outside(&refused(&plenty, &kernel, Some(&[0]))));
    for entry in [0, LINKED_AT - 1, LINKED_AT + 4096, u64::MAX] {
        let kernel = TestKernel {
            entry,
            ..TestKernel::new()
        };
        let error = refused(&plenty, &kernel, None);
        assert!(matches!(error, Error::EntryOutsideKernel { .. }), "{error}");
    }
    let kernel = TestKernel::new().with_pvh(0x1000);
    let error = refused(&plenty, &kernel, None);
    assert!(matches!(error, Error::EntryOutsideKernel { .. }), "{error}");
}

#[test]
fn initrds_that_do_not_fit_are_refused() {
    let memory = memory(&[(0, 32 * MIB)]);
    let error =
        |initrd: &[u8]| load_with(&memory, &TestKernel::new(), Some(initrd), "", None).unwrap_err();
    assert!(matches!(error(&[]), Error::InitrdEmpty));
    for size in [31 * MIB + 1, 32 * MIB, 33 * MIB] {
        let error = error(&vec![0; size]);
        assert!(matches!(error, Error::InitrdTooLarge { .. }), "{error}");
    }
}

#[test]
fn what_is_no_kernel_is_refused() {
    let memory = memory(&[(0, 64 * MIB)]);
    for bytes in [&b""[..], b"\x7fEL", b"#!/bin/sh\n", &[0; 5000], b"\x7fELF"] {
        let error = load(&memory, &file(bytes), None, "", None, &machine(0)).unwrap_err();
        assert!(matches!(error, Error::Image(_)), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_header_panics(
        patches in prop::collection::vec((4_usize..400, any::<u8>()), 1..12),
        protocol in prop_oneof![Just(None), Just(Some(Protocol::Linux64)), Just(Some(Protocol::Pvh))],
    ) {
        let mut kernel = TestKernel::new().with_pvh(LINKED_AT as u32);
        kernel.relocations = vec![0, (KERNEL_MAP + LINKED_AT) as i32, 0, 0];
        let mut bytes = kernel.bytes();
        for (offset, value) in patches {
            bytes[offset] = value;
        }
        let memory = memory(&[(0, 32 * MIB)]);
        let _ = load(&memory, &file(&bytes), None, "", protocol, &machine(1));
    }
}
